"""TRL's own trainers for post-training (docs/post-training.md): supervised, and RL with a reward of the caller's."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from forethought.config import Config
from forethought.tools.trl import ending_with, machine, optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are sampled in `reinforce`."""

    group: int  # of each prompt
    longest: int  # tokens
    temperature: float
    end: int | None  # the token that ends one; None: the tokenizer's end of text


Seen = Callable[[int, int], None]
"""Told the steps that are done, and how many there are."""


def supervise(
    start: tuple[Any, Any], rows: Sequence[tuple[list[int], list[int]]], config: Config, seen: Seen
) -> list[dict[str, Any]]:
    """SFT with TRL's `SFTTrainer`: next-token loss on the completion of each (prompt, completion), in their order.

    `start`: model and tokenizer. train.batch rows a step; weights are changed in place. Returns what TRL logged.
    """
    model, tokenizer = start
    labelled = [{"input_ids": a + b, "labels": [-100] * len(a) + b} for a, b in rows]
    with TemporaryDirectory() as folder, _own_ends(model):
        settings = SFTConfig(
            **_passing(config, folder),
            per_device_train_batch_size=config.train.batch,
            train_sampling_strategy="sequential",
            max_length=None,
        )
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(labelled),
            processing_class=copy.deepcopy(tokenizer),
            callbacks=[_Progress(seen)],
        )
        return _trained(trainer)


def reinforce(
    start: tuple[Any, Any],
    rows: Sequence[dict[str, Any]],
    reward: Any,
    sampling: Sampling,
    config: Config,
    seen: Seen,
) -> list[dict[str, Any]]:
    """RL with TRL's `GRPOTrainer` and its own defaults, on rows with a `prompt` and what `reward` takes, in order.

    `start`: model and tokenizer. A prompt is a list of tokens. train.batch prompts a step; weights are changed in
    place. Returns what TRL logged.
    """
    model, tokenizer = start
    with TemporaryDirectory() as folder, _own_ends(model):
        ending = copy.deepcopy(tokenizer) if sampling.end is None else ending_with(sampling.end, tokenizer, model)
        texts = [tokenizer.decode(row["prompt"]) for row in rows]
        _reads(ending, dict(zip(texts, (row["prompt"] for row in rows), strict=True)))
        settings = GRPOConfig(
            **_passing(config, folder),
            per_device_train_batch_size=config.train.batch * sampling.group,
            num_generations=sampling.group,
            max_completion_length=sampling.longest,
            temperature=sampling.temperature,
            disable_dropout=True,
            shuffle_dataset=False,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list([row | {"prompt": text} for row, text in zip(rows, texts, strict=True)]),
            processing_class=ending,
            callbacks=[_Progress(seen)],
        )
        return _trained(trainer)


def _reads(tokenizer: Any, prompts: dict[str, list[int]]) -> None:
    """Let a tokenizer read these texts as exactly these tokens, which it might cut otherwise; TRL takes text only."""
    kind = type(tokenizer)

    def read(self: Any, text: Any = None, **options: Any) -> Any:
        if isinstance(text, list) and all(one in prompts for one in text):
            return {"input_ids": [prompts[one] for one in text]}
        return kind.__call__(self, text, **options)

    tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": read})


class _Progress(TrainerCallback):
    def __init__(self, seen: Seen):
        self.seen = seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen(state.global_step, state.max_steps)


def _passing(config: Config, folder: str) -> dict[str, Any]:
    """A trainer that leaves nothing behind but the weights."""
    train = config.train
    return {
        "output_dir": folder,
        "seed": config.seed,
        "max_steps": train.steps,
        "logging_steps": train.log_every,
        "save_strategy": "no",
        "disable_tqdm": True,
        **optimizer(config.optim),
        **machine(config),
    }


def _trained(trainer: Any) -> list[dict[str, Any]]:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [line for line in trainer.state.log_history if "train_runtime" not in line]


@contextlib.contextmanager
def _own_ends(model: Any) -> Iterator[None]:
    """Afterwards the model's ends of text and padding are again what they were: trainers set them to a tokenizer's."""
    options, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    try:
        yield
    finally:
        model.config, model.generation_config = options, generation
