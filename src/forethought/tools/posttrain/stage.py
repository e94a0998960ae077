"""A post-training stage: its file, and the examples and the reward that its data define.

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
import random
import re
import reprlib
import warnings
from collections.abc import Callable, Iterator, Sequence
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
    Notice,
    Optim,
    Positive,
    UserError,
    as_json,
    explain,
    find,
    from_dict,
    merge,
    read_toml,
    to_dict,
)
from forethought.data.corpus import Windows, check_corpus, context_tokens
from forethought.data.positions import ThoughtFormat
from forethought.models.loading import THINKING
from forethought.run.folder import read_jsonl
from forethought.tools.benchmarks import grade, require_extra


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Stage:
    """The options of a stage, independent of the model that it starts from."""

    stage: Literal["sft", "rlvr"]
    """`sft`: next-token loss on completions. `rlvr`: GRPO with a reward of 1 for a right answer and 0 otherwise."""
    data: Name
    """`world:NAME/SPLIT`, an embedded world with answers, or a file of questions (.jsonl or .jsonl.gz)."""
    heldout: str = ""
    """Held-out data (sft), as in `data`: its loss before and after training goes to summary.json; empty: none."""
    heldout_rows: Positive = 64
    """Number of held-out examples; their order does not depend on the seed."""
    think: bool = True
    """Start completions inside an open thought; the answer is then what follows the closing delimiter."""
    end: str = ""
    """Text of the one token that ends a completion; empty: the tokenizer's end-of-text token."""
    group: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt (rlvr)."""
    max_tokens: Positive = 512
    """Maximum tokens of a completion (rlvr), or of prompt and completion (sft); longer ones are skipped and counted."""
    temperature: Above0 = 1.0
    """Sampling temperature (rlvr)."""
    optim: Optim = dataclasses.field(default_factory=Optim)
    """Options of the optimizer, as in training."""
    train: dict[Literal["steps", "batch", "log_every"], Positive] = Field(default_factory=dict)
    """Options of the loop, as in training; train.batch counts examples (sft) or prompts (rlvr)."""


def read(path: str | Path, overrides: dict[str, Any] | None = None) -> Stage:
    """Read a stage from a TOML file (a path, or the name of a shipped one) and overrides. Raises UserError."""
    values = merge(read_toml(find(path)), overrides or {})
    if "stage" not in values:
        raise UserError(f"{str(path)!r} has no `stage`, so it is not a post-training stage (docs/post-training.md)")
    return stage_from_dict(values, path)


def stage_from_dict(values: dict[str, Any], path: str | Path) -> Stage:
    """Validate the options of a stage; `path` is for error messages. Raises UserError."""
    try:
        return TypeAdapter(Stage).validate_json(as_json(values))
    except ValidationError as error:
        raise UserError(f"stage {str(path)!r}: {explain(error)}") from None


def stage_config(stage: Stage, start: Config, run: Path, seed: int) -> Config:
    """The config of a stage's run folder: model, corpus and evaluation of the start, training options of the stage.

    Of the start's method, only options that format, sample and score thoughts are kept, so that post-training does
    not depend on how its start was trained.
    """
    kept = {name: getattr(start.method, name) for name in (*THINKING["method"], "horizon")}
    method = dataclasses.replace(Method(), **kept)
    config = dataclasses.replace(
        start, seed=seed, run=str(run), overwrite=True, method=method, optim=stage.optim, lora=Lora()
    )
    return from_dict(merge(to_dict(config), {"train": to_dict(Config())["train"] | stage.train}))


def end_token(stage: Stage, tokenizer: Any) -> int | None:
    """The token that ends a completion; None for the tokenizer's end-of-text token. Raises UserError."""
    if not stage.end:
        if tokenizer.eos_token_id is None and stage.stage == "rlvr":
            raise UserError("end = '': this tokenizer has no end-of-text token; name a token that ends a completion")
        return None
    tokens = tokenizer.encode(stage.end, add_special_tokens=False)
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        raise UserError(f"end = {stage.end!r}: must be one token of this tokenizer, is {len(tokens)}")
    return tokens[0]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt with its completion, in tokens. With `think`, the prompt ends inside an open thought."""

    prompt: list[int]
    completion: list[int]  # empty if the data have none
    answer: str
    repeated: list[int] = dataclasses.field(default_factory=list)  # what comes between thought and answer


def examples(stage: Stage, config: Config, tokenizer: Any, form: ThoughtFormat) -> list[Example]:
    """The examples of all steps in order: train.steps * train.batch of them, repeating files. Raises UserError."""
    world = stage.data.startswith("world:")
    source = (_world_examples if world else _question_examples)(stage, config, tokenizer, form)
    found, skipped = [], 0
    while len(found) < config.train.steps * config.train.batch:
        one = next(source)
        if stage.stage == "sft" and not one.completion:
            hint = "world:NAME/worked, or set think = false" if world else "a solution"
            raise UserError(f"data = {stage.data!r}: contains no thoughts to train on; use {hint}")
        if stage.stage == "rlvr" or len(one.prompt) + len(one.completion) <= stage.max_tokens:
            found.append(one)
            continue
        skipped += 1
        if skipped > 100 * (len(found) + 1):
            break
    if skipped:
        text = f"max_tokens = {stage.max_tokens}: {skipped} of {skipped + len(found)} examples are longer"
        if skipped > 100 * (len(found) + 1):
            raise UserError(text)
        warnings.warn(f"{text} and are skipped", Notice, stacklevel=2)
    return found


def _world_examples(stage: Stage, config: Config, tokenizer: Any, form: ThoughtFormat) -> Iterator[Example]:
    """Documents of an embedded world up to their answer; a thought right before it is part of the completion."""
    options = dataclasses.replace(config.corpus, path=stage.data)
    check_corpus(options, "data")
    opening, closing = list(form.open), list(form.close)
    for window in Windows(options, tokenizer, config.seed, option="data"):
        tokens, at = window.tokens, next(iter(window.marks.get("answer", ())), 0)
        if not at:
            continue
        starts = [i for i in range(at) if tokens[i : i + len(opening)] == opening]
        thought = bool(starts) and tokens[at - len(closing) : at] == closing  # one elsewhere is context
        first = starts[-1] if thought else at
        answer = next(iter(re.findall(r"\w+", tokenizer.decode(tokens[at:]))), "")
        repeated = form.repeated(tokens[:first])
        worked = [*tokens[first + len(opening) : at], *repeated, *tokens[at:]] if thought else []
        yield Example(
            prompt=form.prompt_tokens(tokens[:first]) if stage.think else tokens[:first],
            completion=worked if stage.think else tokens[at:],
            answer=answer,
            repeated=repeated,
        )


def _question_examples(stage: Stage, config: Config, tokenizer: Any, form: ThoughtFormat) -> Iterator[Example]:
    """Questions of a file with the prompt of `forethought questions`; the worked solution is the thought."""
    rows = _read_questions(stage.data)
    rng = random.Random(f"stage {config.seed}")
    end = end_token(stage, tokenizer)
    ends = [] if (last := tokenizer.eos_token_id if end is None else end) is None else [last]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    while True:
        rng.shuffle(rows)
        for question, solution, answer in rows:
            context = context_tokens(tokenizer, f"Question: {question}\nAnswer:")
            worked = encode(f" {solution}") if solution else []
            final = [*encode(f" The answer is {answer}."), *ends]
            if stage.think:
                prompt, repeated = form.prompt_tokens(context), form.repeated(context)
                completion = [*worked, *form.close, *repeated, *final] if solution else []
                yield Example(prompt=prompt, completion=completion, answer=answer, repeated=repeated)
            else:
                yield Example(prompt=context, completion=[*worked, *final], answer=answer)


def _read_questions(path: str) -> list[tuple[str, str, str]]:
    """Question, worked solution (may be empty) and answer of each row. Raises UserError with file and line."""
    if not path.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"data = {path!r}: must be world:NAME/SPLIT or a file of questions (.jsonl or .jsonl.gz)")
    rows = []
    try:
        for number, row in read_jsonl(path):
            question, answer = row.get("question", row.get("problem")), row.get("answer")
            if not isinstance(question, str) or not isinstance(answer, str | int | float) or not str(answer).strip():
                raise UserError(
                    f"{path}:{number}: expected the fields question (or problem) and answer, got {reprlib.repr(row)}"
                )
            shown, _, final = str(answer).rpartition("####")
            solution = str(row.get("solution") or shown).split("####")[0]
            rows.append((question.strip(), re.sub(r"<<[^<>]*>>", "", solution).strip(), final.strip()))
    except OSError as error:
        raise UserError(f"data = {path!r}: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"data = {path!r}: contains no questions")
    return rows


class Verified:
    """The verifiable reward: 1 for a completion with a right answer, else 0. Logs `answered`, the share with an answer.

    With `think`, the answer is the text after the first closing delimiter and the tokens that method.repeat_context
    repeats; there is none where a thought never closes, or other tokens follow it. On an embedded world, an answer is
    right if its first word is the document's; otherwise it is graded as in `forethought questions`.
    """

    def __init__(self, stage: Stage, tokenizer: Any, form: ThoughtFormat):
        self.tokenizer, self.closing = tokenizer, form.closing if stage.think else None
        self.is_right: Callable[[str, str], bool] = lambda text, answer: re.findall(r"\w+", text)[:1] == [answer]
        if not stage.data.startswith("world:"):
            require_extra()
            self.is_right = lambda text, answer: grade(text, answer).right

    def __call__(
        self,
        completion_ids: Sequence[list[int]],
        answer: Sequence[str],
        repeated: Sequence[list[int]],
        log_metric: Any = None,
        **_: Any,
    ) -> list[float]:
        """One reward per completion. `answer` and `repeated` are those of the examples."""
        answers = [self._answer(*pair) for pair in zip(completion_ids, repeated, strict=True)]
        if log_metric is not None:
            log_metric("answered", sum(text is not None for text in answers) / len(answers))
        return [
            float(text is not None and self.is_right(text, true)) for text, true in zip(answers, answer, strict=True)
        ]

    def _answer(self, ids: list[int], repeated: list[int]) -> str | None:
        if self.closing is not None:
            if (end := self.closing.length(ids)) is None or ids[end : end + len(repeated)] != repeated:
                return None
            ids = ids[end + len(repeated) :]
        return self.tokenizer.decode(ids, skip_special_tokens=True)
