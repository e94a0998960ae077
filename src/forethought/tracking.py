"""Metrics to TensorBoard, W&B, MLflow or trackio, through accelerate; nothing at all by default."""

from pathlib import Path
from types import TracebackType
from typing import Any

from forethought import dist
from forethought.config import Config, UserError
from forethought.settings import to_dict


def check_tracker(config: Config) -> None:
    """Raise UserError where train.tracker is not installed."""
    if config.train.tracker == "none":
        return
    from accelerate.tracking import get_available_trackers

    if config.train.tracker not in [str(tracker) for tracker in get_available_trackers()]:
        raise UserError(f"train.tracker = {config.train.tracker!r}: its package is not installed")


class Tracker:
    """A context manager that forwards logged steps to train.tracker."""

    def __init__(self, config: Config, folder: Path):
        self._accelerator: Any = None
        name = config.train.tracker
        if name == "none" or not dist.first():
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
        """Forward the figures of one logged step."""
        if self._accelerator is not None:
            self._accelerator.log(metrics, step=step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush and close."""
        # Not end_training: it would wait for the other processes, and part from them.
        for tracker in [] if self._accelerator is None else self._accelerator.trackers:
            tracker.finish()
