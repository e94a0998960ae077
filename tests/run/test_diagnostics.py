"""Every check fires on a history that is ill in its way, stays silent on a sound one, and says a thing once."""

import dataclasses
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from forethought.config import Config, from_dict
from forethought.run.diagnostics import CHECKS, WINDOW, Diagnosis, Monitor, diagnose_evaluation
from forethought.run.folder import RunLog, read_lines
from forethought.run.trackers import Callbacks
from forethought.trainer import resume, train
from helpers.runs import options

SOUND = {
    "rollout/length": 8.0,
    "rollout/closed": 0.95,
    "rollout/leakage": 0.25,
    "reward/zero_std_fraction": 0.5,
    "reward/nothink": -1.0,
    "objective/ratio": 1.0,
    "objective/mismatch": 1e-6,
    "objective/loss": 0.0,
    "optim/gradient_norm": 0.3,
}
PLAIN = {"objective/loss": 2.0, "objective/accuracy": 0.4, "optim/gradient_norm": 1.0}
ILL = {
    "thoughts-shrinking": (SOUND, "rollout/length", 3.9),
    "thoughts-not-closing": (SOUND, "rollout/closed", 0.4),
    "leakage-rising": (SOUND, "rollout/leakage", 0.55),
    "groups-flat": (SOUND, "reward/zero_std_fraction", 0.95),
    "plain-prediction-drifting": (SOUND, "reward/nothink", -1.6),
    "ratio-off": (SOUND, "objective/ratio", 1.01),
    "sampler-mismatch": (SOUND, "objective/mismatch", 0.2),
    "loss-spike": (PLAIN, "objective/loss", 2.7),
    "gradient-spike": (SOUND, "optim/gradient_norm", 1.5),
}


def history(base: dict[str, float], metric: str = "", *values: float) -> list[dict[str, Any]]:
    """20 steps as they should be, then 20 with each of the values."""
    rows = [dict(base) for _ in range(20)] + [base | {metric: value} for value in values for _ in range(20)]
    return [{"step": step, **row} for step, row in enumerate(rows, start=1)]


def names(found: list[Diagnosis]) -> list[str]:
    return [one.name for one in found]


@pytest.mark.parametrize("name", ILL)
def test_each_check_fires_once_and_names_what_it_saw(name):
    found = Monitor().replay(history(*ILL[name], ILL[name][2]))
    assert names(found) == [name]
    assert 20 < found[0].step <= 20 + WINDOW
    assert not re.search("[{}]", found[0].evidence)
    assert dataclasses.asdict(found[0]) == {"step": found[0].step, "name": name} | {
        "evidence": found[0].evidence, "advice": found[0].advice
    }  # fmt: skip


def test_every_check_is_tested_and_explained():
    text = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL))
    others = {"content-unused", "held-out-trained-on", "options-changed", "corpus-changed", "text-unknown"}
    assert set(sections) == set(ILL) | others
    assert {check.name for check in CHECKS} | {"ratio-off"} == set(ILL)
    for check in CHECKS:
        assert f"warns at {check.warns:g}, clears below {check.clears:g}." in sections[check.name], check.name
        assert f"`{check.metric}`" in sections[check.name]


@pytest.mark.parametrize("base", [SOUND, PLAIN])
def test_a_sound_run_is_left_alone(base):
    draw = random.Random(0)
    rows = [{name: value * draw.uniform(0.95, 1.0) for name, value in base.items()} for _ in range(200)]
    for row in rows:
        row |= {name: value for name, value in base.items() if name == "objective/ratio"}
    assert Monitor().replay({"step": step, **row} for step, row in enumerate(rows)) == []


def test_one_bad_step_is_not_enough_and_ten_are_the_least():
    rows = history(SOUND)
    rows[12] |= {"rollout/closed": 0.0}
    assert Monitor().replay(rows) == []
    ill = [{"step": step, "rollout/closed": 0.1} for step in range(1, 30)]
    assert [one.step for one in Monitor().replay(ill)] == [WINDOW]


def test_a_check_warns_again_only_after_it_cleared():
    def closed(*values: float) -> list[str]:
        return names(Monitor().replay(history(SOUND, "rollout/closed", *values)))

    assert closed(0.4, 0.6, 0.4) == ["thoughts-not-closing"], "0.4 of the thoughts cut off is above what clears"
    assert closed(0.4, 0.7, 0.4) == ["thoughts-not-closing"] * 2


def test_levels_of_the_ratio_follow_the_updates():
    rows = history(SOUND, "objective/ratio", 1.1)
    assert names(Monitor(1).replay(rows)) == ["ratio-off"]
    assert Monitor(4).replay(rows) == []
    assert names(Monitor(4).replay(history(SOUND, "objective/ratio", 0.75))) == ["ratio-off"]


def test_loss_is_watched_where_it_is_a_loss():
    assert Monitor().replay(history(SOUND, "objective/loss", 5.0)) == []


def test_missing_and_odd_figures_are_no_observations():
    rows = history(SOUND, "rollout/length", 3.0)
    holes = [{"step": 0, "rollout/length": odd} for odd in (math.nan, None, "x", True, -math.inf)]
    mixed = [row for pair in zip(rows, holes * 8, strict=True) for row in pair]
    assert Monitor().replay(mixed) == Monitor().replay(rows)
    assert Monitor().observe(1, {}) == []


def test_a_watch_that_replayed_goes_on_as_the_one_that_saw():
    rows = history(SOUND, "rollout/length", 3.0, 8.0, 3.0)
    whole = Monitor().replay(rows)
    assert len(whole) == 2
    for cut in range(0, len(rows), 7):
        resumed = Monitor()
        assert resumed.replay(rows[:cut]) + resumed.replay(rows[cut:]) == whole


def test_gain_that_other_thoughts_keep_is_told():
    figures = {"after/answer/kept_shuffled": 0.6, "after/answer/gain_self/low": 0.2, "before/answer/kept_shuffled": 0.9}
    [found] = diagnose_evaluation(figures, 80)
    assert (found.step, found.name) == (80, "content-unused")
    assert "60% of the gain on answer" in found.evidence
    assert diagnose_evaluation(figures | {"after/answer/kept_shuffled": 0.4}, 80) == []
    assert diagnose_evaluation(figures | {"after/answer/gain_self/low": -0.1}, 80) == []
    assert diagnose_evaluation({"after/answer/kept_shuffled": None}, 80) == []


def test_warnings_are_rewound_with_the_run(tmp_path):
    log = RunLog.create(Config(run=str(tmp_path / "run")))
    log.append("warnings", [])
    assert not (log.path / "warnings.jsonl").exists()
    rows = [dataclasses.asdict(Diagnosis(step=step, name="x", evidence="e", advice="a")) for step in (3, 7)]
    log.append("warnings", rows)
    log.rewind(5)
    assert read_lines(log.path / "warnings.jsonl") == rows[:1]


class Listener(Callbacks):
    def __init__(self):
        self.heard: list[Diagnosis] = []

    def warning(self, found: Diagnosis) -> None:
        self.heard.append(found)


def cut_off(tmp_path: Path, name: str) -> Config:
    """A model of random weights hardly ever closes a thought."""
    steps = {"steps": 14, "checkpoint_every": 4, "keep_checkpoints": 9}
    return from_dict(options(tmp_path, name, train=steps, optim={"learning_rate": 1e-6}, method={"thought_length": 2}))


def test_a_run_on_text_of_another_language_warns(tmp_path: Path):
    for name, text, warned in (("foreign", "uno dos tres red", ["text-unknown"]), ("own", "ball under red uno", [])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{text} " * 20}))
        listener = Listener()
        corpus = {"path": str(tmp_path / f"{name}.jsonl")}
        train(from_dict(options(tmp_path, name, train={"steps": 1, "log_every": 5}, corpus=corpus)), listener)
        assert names(listener.heard) == warned


def test_a_run_warns_and_a_resumed_one_neither_repeats_nor_loses(tmp_path):
    listener = Listener()
    train(cut_off(tmp_path, "whole"), listener)
    logged = read_lines(tmp_path / "whole" / "warnings.jsonl")
    assert [dataclasses.asdict(one) for one in listener.heard] == logged
    assert ("thoughts-not-closing", WINDOW) in [(row["name"], row["step"]) for row in logged]
    (tmp_path / "whole" / "summary.json").unlink()
    for step, heard in ((12, []), (8, listener.heard)):
        for path in (tmp_path / "whole" / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        again = Listener()
        resume(tmp_path / "whole", again)
        assert again.heard == heard
        assert read_lines(tmp_path / "whole" / "warnings.jsonl") == logged
        (tmp_path / "whole" / "summary.json").unlink()
