"""What follows a run: callbacks, and metrics and thoughts sent to TensorBoard, W&B, MLflow or trackio."""

import importlib
from collections.abc import Sequence
from pathlib import Path
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
    """A context manager that forwards logged steps to train.tracker, through accelerate where it can."""

    def __init__(self, config: Config, folder: Path):
        self._accelerator: Any = None
        self._train, self._next = config.train, 0
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

    def log(self, step: int, metrics: dict[str, float], rows: Sequence[dict[str, Any]]) -> None:
        """Forward the metrics of a logged step; every train.checkpoint_every steps its rows of thoughts.jsonl, too."""
        if self._accelerator is None:
            return
        shown = {}
        if rows and (step >= self._next or step == self._train.steps):
            self._next = step + self._train.checkpoint_every
            shown = self._thoughts(step, rows)
        self._accelerator.log(metrics | shown, step=step)

    def _thoughts(self, step: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A value with which the tracker shows thoughts: a table, or text. MLflow's table gets its rows here."""
        if self._train.tracker == "tensorboard":
            return {"thoughts": "\n\n".join(map(_as_text, rows))}
        import pandas

        of_position = ("document", "position", "context", "target", "nothink")
        table = pandas.DataFrame(
            {"step": step, **{name: row[name] for name in of_position}, "thought": thought["text"]}
            | {name: value for name, value in thought.items() if name != "text"}
            for row in rows
            for thought in row["thoughts"]
        )
        package: Any = importlib.import_module(self._train.tracker)
        if self._train.tracker == "mlflow":
            package.log_table(table, "thoughts.json")  # one file: MLflow keeps a short list of their names in a tag
            return {}
        return {"thoughts": package.Table(dataframe=table)}

    def __exit__(self, *error: object) -> None:
        """Flush and close."""
        # Not end_training: it would wait for the other ranks and destroy the process group.
        for tracker in [] if self._accelerator is None else self._accelerator.trackers:
            tracker.finish()


def _as_text(row: dict[str, Any]) -> str:
    """The thoughts of a position as Markdown. Lines of code, so that nothing in the text acts as markup."""
    lines = [f"{row['context']}[{row['target']}]"]
    for one in sorted(row["thoughts"], key=lambda thought: -thought["reward"]):
        lines.append(f"{one['reward']:+.3f} nats: {one['text']}" + ("" if one["closed"] else " ... (cut)"))
    return "\n".join("    " + line.replace("\n", "↵") for line in lines)
