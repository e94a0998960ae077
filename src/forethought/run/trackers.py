"""What follows a run: callbacks, and metrics logged to TensorBoard, W&B, MLflow or trackio through accelerate."""

import importlib
from pathlib import Path
from types import TracebackType
from typing import Any

from forethought.config import Config, UserError, to_dict
from forethought.run import distributed
from forethought.run.diagnostics import Diagnosis


class Callbacks:
    """Called as a run goes on; every method does nothing by default. The command line draws its progress bar here."""

    def part(self, name: str) -> None:
        """What follows belongs to this one of several runs; with "" to all of them."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress of something other than training steps, such as an evaluation."""

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """A training step is done."""

    def note(self, text: str) -> None:
        """One line on how the run is computed."""

    def warning(self, found: Diagnosis) -> None:
        """Diagnostics found a problem; the run goes on."""


def check_tracker(config: Config) -> None:
    """Raise UserError if the package of train.tracker cannot be imported: missing, or a broken installation."""
    name = config.train.tracker
    if name == "none":
        return
    try:
        importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except Exception as error:  # with mismatched dependencies a tracker raises anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"train.tracker = {name!r}: its package cannot be imported ({reason}); pip install 'forethought[trackers]'"
        ) from None


class Tracker:
    """A context manager that forwards logged steps to train.tracker."""

    def __init__(self, config: Config, folder: Path):
        self._accelerator: Any = None
        name = config.train.tracker
        if name == "none" or not distributed.is_rank0():
            return
        from accelerate import Accelerator

        self._accelerator = Accelerator(log_with=name, project_dir=folder)
        options = {
            f"{section}.{option}": value if isinstance(value, int | float | str | bool) else str(value)
            for section, values in to_dict(config).items()
            if isinstance(values, dict)
            for option, value in values.items()
        }
        self._accelerator.init_trackers("forethought", config=options)

    def __enter__(self) -> "Tracker":
        return self

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Forward the metrics of a logged step."""
        if self._accelerator is not None:
            self._accelerator.log(metrics, step=step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush and close."""
        # Not end_training: it would wait for the other ranks and destroy the process group.
        for tracker in [] if self._accelerator is None else self._accelerator.trackers:
            tracker.finish()
