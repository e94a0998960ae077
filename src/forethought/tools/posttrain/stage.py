"""A stage of post-training: what its file says. Never imports torch.

stage = "rlvr"                      # sft: supervised; rlvr: RL with verifiable rewards
data = "world:cups/train"           # or questions: FILE.jsonl(.gz)
end = "."                           # one token that ends a completion
group = 8

[optim]
learning_rate = 1e-4
[train]
steps = 20
batch = 16
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from forethought.config import (
    Above0,
    Config,
    Lora,
    Method,
    Name,
    Optim,
    Positive,
    UserError,
    find,
    merge,
    read_toml,
    to_dict,
)
from forethought.config import from_dict as config_of


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Stage:
    """One stage, the same whatever it starts from."""

    stage: Literal["sft", "rlvr"]
    """Next-token loss on completions, or GRPO with a reward of 1 for a right answer and 0 for any other."""
    data: Name
    """`world:NAME/SPLIT`, whose documents have an answer, or questions: a .jsonl or .jsonl.gz file."""
    heldout: str = ""
    """Rows as in `data` that are only measured (sft): their loss before and after goes to summary.json; empty: none."""
    heldout_rows: Positive = 64
    """How many of them, in an order that the seed does not change."""
    think: bool = True
    """Whether a completion begins inside an opened thought; the answer is then what follows the closing delimiter."""
    end: str = ""
    """Text of the one token that ends a completion; empty: the tokenizer's end of text."""
    group: Annotated[int, Field(ge=2)] = 8
    """Completions of a prompt that are compared (rlvr)."""
    max_tokens: Positive = 512
    """Longest completion (rlvr), or longest row, prompt and completion together (sft); longer rows are left out."""
    temperature: Above0 = 1.0
    """Sampling temperature (rlvr)."""
    optim: Optim = dataclasses.field(default_factory=Optim)
    """As of a run."""
    train: dict[Literal["steps", "batch", "log_every"], Positive] = Field(default_factory=dict)
    """As of a run; train.batch counts rows (sft) or prompts (rlvr)."""


def read(path: str | Path, overrides: dict[str, Any] | None = None) -> Stage:
    """A stage's file (a path, or the name of a shipped one), with options over it. Raises UserError."""
    values = merge(read_toml(find(path)), overrides or {})
    if "stage" not in values:
        raise UserError(
            f"stage {str(path)!r}: says no stage, so it is no stage of post-training (docs/post-training.md)"
        )
    return of(values, path)


def of(values: dict[str, Any], path: str | Path) -> Stage:
    """The stage of a nested dict; `path` is for messages. Raises UserError."""
    try:
        return TypeAdapter(Stage).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if part != "[key]")
        if first["type"] == "unexpected_keyword_argument":
            raise UserError(f"stage {str(path)!r}: unknown option {name}") from None
        said = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise UserError(f"stage {str(path)!r}: {name} = {first['input']!r}: {said}") from None


def options_of(stage: Stage, start: Config, run: Path, seed: int) -> Config:
    """The whole options of a stage's run folder: model, text and evaluation of the start, training of the stage.

    Of the start's method only what surrounds and measures a thought is taken over, so that what an arm was trained
    with does not change how it is post-trained.
    """
    kept = ("open", "close", "prompt", "thought_length", "temperature", "horizon")
    method = dataclasses.replace(Method(), **{name: getattr(start.method, name) for name in kept})
    own = {"method": method, "optim": stage.optim, "lora": Lora()}
    whole = dataclasses.replace(start, seed=seed, run=str(run), overwrite=True, **own)
    return config_of(merge(to_dict(whole), {"train": to_dict(Config())["train"] | stage.train}))
