"""Thoughts in trackers: which steps, which columns, which rows. The packages themselves: tools/try_extras.sh."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import pandas
import pytest

from forethought.config import from_dict
from forethought.run.trackers import Tracker


class Recorder:
    """What Trackers call of accelerate.Accelerator."""

    def __init__(self, log_with: str, project_dir: Path):
        self.trackers, self.logged = [], {}
        Recorder.last = self

    def init_trackers(self, project_name: str, config: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged[step] = values


class Table:
    """wandb.Table and trackio.Table, as far as both have the same arguments."""

    def __init__(self, columns: list[str] | None = None, data: list[list] | None = None, dataframe: Any = None):
        self.dataframe = dataframe


def row(position: int, *texts: str) -> dict[str, Any]:
    thoughts = [
        {"text": text, "length": 3, "closed": text != "cut", "evidence": -1.0, "reward": 0.5 * i, "advantage": 0.0}
        for i, text in enumerate(texts)
    ]
    return {"number": 0, "document": "cups", "row": "cups:1", "position": position, "context": "now under",
            "target": " red", "nothink": None, "thoughts": thoughts}  # fmt: skip


def follow(tracker: str, monkeypatch: pytest.MonkeyPatch, package: dict[str, Any], steps: range) -> dict[int, Any]:
    """Log the steps; what accelerate was given, by step."""
    monkeypatch.setattr(accelerate, "Accelerator", Recorder)
    module = ModuleType(tracker)
    vars(module).update(package)
    monkeypatch.setitem(sys.modules, tracker, module)
    train = {"tracker": tracker, "checkpoint_every": 4, "steps": steps[-1]}
    with Tracker(from_dict({"train": train}), Path("run")) as one:
        for step in steps:
            rows = [row(7, "1 red", "cut"), row(9, "2 <b> blue")] if step % 2 else []
            one.log(step, {"reward/gain": float(step)}, rows)
    return Recorder.last.logged


COLUMNS = [
    "step", "document", "position", "context", "target", "nothink", "thought", "length", "closed", "evidence", "reward",
    "advantage",
]  # fmt: skip
SHOWN = ["step", "position", "thought", "closed", "reward"]
ROWS = [[7, "1 red", True, 0.0], [7, "cut", False, 0.5], [9, "2 <b> blue", True, 0.0]]


def assert_rows(table: pandas.DataFrame, *steps: int) -> None:
    assert list(table.columns) == COLUMNS
    assert table[SHOWN].to_numpy().tolist() == [[step, *values] for step in steps for values in ROWS]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_thoughts_are_a_table_of_the_steps_metrics(tracker: str, monkeypatch: pytest.MonkeyPatch):
    """Rows exist at odd steps. A table comes with the first ones, with those of 4 or more steps later, and the last."""
    logged = follow(tracker, monkeypatch, {"Table": Table}, range(1, 12))
    assert [step for step, values in logged.items() if "thoughts" in values] == [1, 5, 9, 11]
    assert all(values["reward/gain"] == step for step, values in logged.items())
    for step in (1, 5, 9, 11):
        assert_rows(logged[step]["thoughts"].dataframe, step)


def test_mlflow_gets_the_rows_of_all_tables_in_one_artifact(monkeypatch: pytest.MonkeyPatch):
    artifacts: dict[str, list[pandas.DataFrame]] = {}

    def log_table(data: pandas.DataFrame, artifact_file: str, run_id: str | None = None) -> None:
        artifacts.setdefault(artifact_file, []).append(data)

    logged = follow("mlflow", monkeypatch, {"log_table": log_table}, range(1, 8))
    assert list(artifacts) == ["thoughts.json"]
    assert_rows(pandas.concat(artifacts["thoughts.json"]), 1, 5, 7)
    assert all(values == {"reward/gain": step} for step, values in logged.items()), "MLflow takes no tables as metrics"


def test_tensorboard_gets_text_of_which_nothing_is_markup(monkeypatch: pytest.MonkeyPatch):
    logged = follow("tensorboard", monkeypatch, {}, range(1, 2))
    assert logged[1]["thoughts"] == (
        "    now under[ red]\n    +0.500 nats: cut ... (cut)\n    +0.000 nats: 1 red\n\n"
        "    now under[ red]\n    +0.000 nats: 2 <b> blue"
    )
