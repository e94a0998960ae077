"""TRL's trainers for post-training (docs/post-training.md): SFT, and GRPO with a reward function of the caller."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from forethought.config import Config
from forethought.tools.posttrain.stage import Example, Stage, end_token
from forethought.tools.trl import common_arguments, stopping_at

QUIET: dict[str, Any] = {"save_strategy": "no", "disable_tqdm": True}
Progress = Callable[[int, int], None]
"""Called after each step with the number of finished steps and of all steps."""


def sft(start: tuple[Any, Any], rows: Sequence[Example], config: Config, progress: Progress) -> list[dict[str, Any]]:
    """Train with `SFTTrainer` on train.batch examples per step, in order; the loss covers completions only.

    `start`: model and tokenizer. Updates the weights in place, returns TRL's log.
    """
    model, tokenizer = start
    labeled = [
        {"input_ids": one.prompt + one.completion, "labels": [-100] * len(one.prompt) + one.completion} for one in rows
    ]
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
    rows: Sequence[Example],
    reward: Any,
    stage: Stage,
    config: Config,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train with `GRPOTrainer` and its defaults on train.batch prompts per step, in order; `reward` gets the answers.

    `start`: model and tokenizer. Updates the weights in place, returns TRL's log.
    """
    model, tokenizer = start
    with TemporaryDirectory() as folder, _restored_configs(model):
        end = end_token(stage, tokenizer)
        stopping = copy.deepcopy(tokenizer) if end is None else stopping_at([end], tokenizer, model)
        texts = [tokenizer.decode(one.prompt) for one in rows]
        _fix_tokens(stopping, {text: one.prompt for text, one in zip(texts, rows, strict=True)})
        columns = {"prompt": texts, "answer": [one.answer for one in rows], "repeated": [one.repeated for one in rows]}
        arguments = GRPOConfig(
            **common_arguments(config, folder),
            **QUIET,
            per_device_train_batch_size=config.train.batch * stage.group,
            num_generations=stage.group,
            max_completion_length=stage.max_tokens,
            temperature=stage.temperature,
            disable_dropout=True,
            shuffle_dataset=False,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
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
