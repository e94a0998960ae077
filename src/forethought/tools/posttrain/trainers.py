"""TRL's trainers for post-training (docs/post-training.md): SFT, and GRPO with a reward function of the caller."""

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
from forethought.tools.trl import common_arguments, stopping_at

QUIET: dict[str, Any] = {"save_strategy": "no", "disable_tqdm": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How `grpo` samples completions."""

    group: int  # completions per prompt
    max_tokens: int
    temperature: float
    end: int | None  # the token that ends a completion; None: the tokenizer's end of text


Progress = Callable[[int, int], None]
"""Called after each step with the number of finished steps and of all steps."""


def sft(
    start: tuple[Any, Any], rows: Sequence[tuple[list[int], list[int]]], config: Config, progress: Progress
) -> list[dict[str, Any]]:
    """Train with `SFTTrainer` on (prompt, completion) pairs of tokens, in order; the loss covers completions only.

    `start`: model and tokenizer. A step has train.batch rows. Updates the weights in place, returns TRL's log.
    """
    model, tokenizer = start
    labeled = [{"input_ids": a + b, "labels": [-100] * len(a) + b} for a, b in rows]
    with TemporaryDirectory() as folder, _restored_configs(model):
        arguments = SFTConfig(
            **common_arguments(config, folder),
            **QUIET,
            per_device_train_batch_size=config.train.batch,
            train_sampling_strategy="sequential",
            max_length=None,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(labeled),
            processing_class=copy.deepcopy(tokenizer),
            callbacks=[_ReportProgress(progress)],
        )
        return _train(trainer)


def grpo(
    start: tuple[Any, Any],
    rows: Sequence[dict[str, Any]],
    reward: Any,
    sampling: Sampling,
    config: Config,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train with `GRPOTrainer` and its defaults on rows, in order: `prompt` (tokens) and the columns of `reward`.

    `start`: model and tokenizer. A step has train.batch prompts. Updates the weights in place, returns TRL's log.
    """
    model, tokenizer = start
    with TemporaryDirectory() as folder, _restored_configs(model):
        stopping = copy.deepcopy(tokenizer) if sampling.end is None else stopping_at(sampling.end, tokenizer, model)
        texts = [tokenizer.decode(row["prompt"]) for row in rows]
        _fix_tokens(stopping, dict(zip(texts, (row["prompt"] for row in rows), strict=True)))
        arguments = GRPOConfig(
            **common_arguments(config, folder),
            **QUIET,
            per_device_train_batch_size=config.train.batch * sampling.group,
            num_generations=sampling.group,
            max_completion_length=sampling.max_tokens,
            temperature=sampling.temperature,
            disable_dropout=True,
            shuffle_dataset=False,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list([row | {"prompt": text} for row, text in zip(rows, texts, strict=True)]),
            processing_class=stopping,
            callbacks=[_ReportProgress(progress)],
        )
        return _train(trainer)


def _fix_tokens(tokenizer: Any, prompts: dict[str, list[int]]) -> None:
    """Make the tokenizer return exactly these tokens for these texts: TRL takes prompts as text only."""
    kind = type(tokenizer)

    def call(self: Any, text: Any = None, **options: Any) -> Any:
        if isinstance(text, list) and all(one in prompts for one in text):
            return {"input_ids": [prompts[one] for one in text]}
        return kind.__call__(self, text, **options)

    tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": call})


class _ReportProgress(TrainerCallback):
    def __init__(self, progress: Progress):
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)


def _train(trainer: Any) -> list[dict[str, Any]]:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [line for line in trainer.state.log_history if "train_runtime" not in line]


@contextlib.contextmanager
def _restored_configs(model: Any) -> Iterator[None]:
    """Restore the model's config and generation config on exit: trainers set their end-of-text and padding tokens."""
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    try:
        yield
    finally:
        model.config, model.generation_config = config, generation
