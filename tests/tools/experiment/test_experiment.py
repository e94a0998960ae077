"""Experiments: the file, matched budgets, arms that are never redone, the table and its verdicts, the page."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from forethought.cli import main
from forethought.config import RunError, UserError
from forethought.data.worlds import cups
from forethought.run.signals import Stopped
from forethought.run.trackers import Callbacks
from forethought.tools import train
from forethought.tools.console import ProgressBar
from forethought.tools.experiment import arms, compare, table
from forethought.tools.experiment.design import Claim, Experiment, read
from forethought.tools.experiment.workers import WorkerPool
from forethought.tools.report import comparison, write_comparison
from forethought.tools.report.comparison import Row
from helpers.pages import BROWSER
from helpers.runs import figures

SMALL = """
config = "quickstart"
seeds = [0, 1]

[options]
corpus.window = 64
method = { group = 2, thought_length = 6, positions = 1 }
train = { steps = 2, batch = 4, log_every = 1, log_thoughts = 1 }
evaluate = { documents = 12, positions = 1, view = 1, view_thoughts = 2 }

[arms.rlp]

[arms.cpt-tokens]
budget = { tokens = "rlp" }
options = { method.name = "cpt" }

[arms.cpt-flops]
budget = { flops = "rlp" }
options = { method.name = "cpt" }

[arms.rlp-frozen]
options = { method = { freeze_teacher = true } }

[sweeps.group]
arm = "rlp"
option = "method.group"
values = [2, 3]
seeds = [0]

[[claims]]
arm = "rlp"
above = ["base"]
metrics = ["all/accuracy_think"]

[[claims]]
arm = "rlp-frozen"
equals = ["rlp", "cpt-tokens"]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[table.Verdict]]:
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "small.toml").write_text(SMALL)
    verdicts, page = compare(folder / "small.toml", {"run": str(folder / "run")})
    assert page == folder / "run" / "compare.html"
    return folder / "run", verdicts


def experiment(folder: Path, text: str = SMALL, **overrides: Any) -> Experiment:
    (folder / "small.toml").write_text(text)
    return read(folder / "small.toml", {"run": str(folder / "run"), **overrides})


def rows(run: Path) -> dict[tuple[str, Any, str], dict[str, Any]]:
    return {(row["arm"], row["seed"], row["metric"]): row for row in json.loads((run / "compare.json").read_text())}


def summary(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / name / "summary.json").read_text())


def test_every_arm_is_trained_with_every_seed_from_the_experiments_options(finished: Any):
    run, _ = finished
    for arm in ("rlp", "cpt-tokens", "cpt-flops", "rlp-frozen"):
        for seed in (0, 1):
            config = json.loads((run / arm / f"seed-{seed}" / "config.json").read_text())
            assert (config["seed"], config["corpus"]["window"]) == (seed, 64)
            assert config["method"]["name"] == ("cpt" if arm.startswith("cpt") else "rlp")
    assert (run / "group=3" / "seed-0").is_dir()
    assert not (run / "group=3" / "seed-1").exists()
    assert not (run / "group=2").exists(), "the arm itself has that value"


def test_budgets_are_those_of_the_arm_they_follow(finished: Any):
    run, _ = finished
    for seed in (0, 1):
        rlp, tokens, flops = (summary(run, f"{arm}/seed-{seed}") for arm in ("rlp", "cpt-tokens", "cpt-flops"))
        assert (tokens["tokens"], tokens["documents"]) == (rlp["tokens"], rlp["documents"])
        assert tokens["flops"] < rlp["flops"]
        steps = [row["cost/flops_total"] for row in figures(run / f"cpt-flops/seed-{seed}")]
        assert steps[-2] < rlp["flops"] <= steps[-1] == flops["flops"]


def test_rows_hold_every_metric_seed_and_difference(finished: Any):
    run, _ = finished
    found = rows(run)
    for arm in ("base", "rlp", "cpt-tokens", "cpt-flops", "rlp-frozen", "group=3"):
        for metric in ("all/ce_think", "answer/accuracy_think", "all/gain_shuffled", "all/drift"):
            row = found[arm, "all", metric]
            assert row["low"] <= row["value"] <= row["high"]
    both = [found["rlp", seed, "all/ce_think"]["value"] for seed in (0, 1)]
    assert found["rlp", "all", "all/ce_think"]["value"] == pytest.approx(sum(both) / 2)
    for metric in ("all/ce_think", "all/gain_over_base", "all/drift"):
        gap = found["rlp", "all", metric]["value"] - found["cpt-flops", "all", metric]["value"]
        assert found["rlp", "all", f"minus/cpt-flops/{metric}"]["value"] == pytest.approx(gap)
    assert found["rlp", 0, "cost/flops"]["value"] == summary(run, "rlp/seed-0")["flops"]
    assert ("cpt-flops", "all", "minus/cpt-tokens/all/ce_think") in found
    assert ("cpt-flops", "all", "minus/cpt-flops/all/ce_think") not in found
    assert ("base", "all", "cost/flops") not in found


def test_the_page_shows_the_generic_thought_of_every_arm(finished: Any):
    run, _ = finished
    texts = json.loads((run / "experiment.json").read_text())["generic"]
    folders = {"base": "base", "rlp": "rlp/seed-0", "cpt-flops": "cpt-flops/seed-0", "group=3": "group=3/seed-0"}
    own = {name: json.loads((run / folder / "generic.json").read_text())["text"] for name, folder in folders.items()}
    assert all(own.values())
    assert {name: texts[name] for name in folders} == own
    page = (run / "compare.html").read_text()
    for name, text in texts.items():
        assert re.search(rf'<th scope="row">{name}</th><td class="mono">{re.escape(text)}</td>', page), name


def test_equal_means_every_bit_of_the_weights(finished: Any):
    _, verdicts = finished
    said = {one.claim: one for one in verdicts}
    assert said["rlp-frozen equal to rlp, bit for bit"].holds is True
    assert said["rlp-frozen equal to cpt-tokens, bit for bit"].holds is False
    assert "0 of 2 seeds" in said["rlp-frozen equal to cpt-tokens, bit for bit"].evidence


def test_nothing_that_is_finished_is_done_again(finished: Any):
    run, verdicts = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.json") if path.parent != run}
    again, _ = compare(run.parent / "small.toml", {"run": str(run)})
    assert again == verdicts
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_seed_joins_those_that_are_finished(tmp_path: Path):
    text = SMALL[: SMALL.index("[arms.cpt-tokens]")]
    (tmp_path / "small.toml").write_text(text)
    compare(tmp_path / "small.toml", {"run": str(tmp_path / "run"), "seeds": 0})
    made = (tmp_path / "run/rlp/seed-0/summary.json").stat().st_mtime_ns
    compare(tmp_path / "small.toml", {"run": str(tmp_path / "run"), "seeds": "0,1"})
    assert (tmp_path / "run/rlp/seed-0/summary.json").stat().st_mtime_ns == made
    assert {seed for _, seed, _ in rows(tmp_path / "run")} == {0, 1, "all"}


def test_an_arm_made_with_other_options_is_not_mixed_in(finished: Any):
    run, _ = finished
    with pytest.raises(
        UserError, match=r"^rlp/seed-0 was made with method.temperature = 1.0, and the experiment says 0.5"
    ):
        compare(run.parent / "small.toml", {"run": str(run), "method": {"temperature": 0.5}})


WAITING = '''
import time
from pathlib import Path

from forethought.algo.rewards import information_gain


def gain(inputs):
    """The gain. After the first step of run/rlp/seed-0 it waits to be stopped, once."""
    if Path("run/rlp/seed-0/metrics.jsonl").is_file() and not Path("stopped").exists():
        Path("waiting").touch()
        time.sleep(3600)
    return information_gain(inputs)
'''


def waits(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """Work in a folder that has the reward above; the text of an experiment whose arm rlp uses it."""
    monkeypatch.chdir(folder)
    (folder / "waiting_reward.py").write_text(WAITING)
    return text.replace("[arms.rlp]", '[arms.rlp]\noptions = { method.reward = "waiting_reward:gain" }', 1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_experiment_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int):
    text = SMALL[: SMALL.index("[arms.cpt-tokens]")] + "[arms.twin]\noptions = { method.freeze_teacher = true }\n"
    Path(tmp_path / "small.toml").write_text(waits(tmp_path, monkeypatch, text))
    words = ["compare", "small.toml", "--run", "run", "--seeds", "0", "--processes", str(processes)]
    words += ["--train.steps", "4", "--train.checkpoint_every", "1000"]
    run = tmp_path / "run" / "rlp" / "seed-0"
    code = "import sys; from forethought.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    while not Path("waiting").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "finished arms are kept in run; resume with the same command" in said
    saved = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir()]
    assert saved, "the arm saved before it left"
    Path("stopped").touch()
    assert main(words) == 0
    steps = [row["step"] for row in figures(run)]
    assert steps == list(range(1, 5))
    whole = tmp_path / "whole"
    assert main([*["whole" if word == "run" else word for word in words], "--processes", "1"]) == 0
    assert arms.weights(run) == arms.weights(whole / "rlp" / "seed-0") == arms.weights(whole / "twin" / "seed-0")


@pytest.mark.parametrize(
    ("part", "phase", "table"), [("base", "evaluating", False), ("twin", "evaluating", True), ("rlp", "loading", True)]
)
def test_a_signal_outside_training_leaves_the_table_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, phase: str, table: bool
):
    text = SMALL[: SMALL.index("[arms.cpt-tokens]")] + "[arms.twin]\noptions = { method.freeze_teacher = true }\n"
    (tmp_path / "small.toml").write_text(text)
    current, sent, begin = [""], [], train

    def send(name: str) -> None:
        if name.startswith(phase) and current[0].startswith(part) and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    def load(*words: Any) -> Any:
        send("loading")
        return begin(*words)

    monkeypatch.setattr(arms, "train", load)
    observer = Callbacks()
    observer.part = lambda name: current.__setitem__(0, name)  # type: ignore[method-assign]
    observer.phase = lambda name, done, total: send(name)  # type: ignore[method-assign]
    run = tmp_path / "run"
    with pytest.raises(Stopped, match=r"finished arms are kept in .*run; resume with the same command"):
        compare(tmp_path / "small.toml", {"run": str(run), "seeds": 0}, observer)
    assert (run / "compare.html").is_file() == table
    if table:
        assert {arm for arm, _, _ in rows(run)} == {"base", *(["rlp"] if part == "twin" else [])}


def test_an_arm_that_fails_does_not_stop_the_others(tmp_path: Path):
    text = SMALL[: SMALL.index("[arms.rlp-frozen]")].replace(
        "[arms.rlp]", "[arms.rlp]\noptions = { method.name = 'cpt', optim.learning_rate = 1e30 }\n[arms.sound]"
    )
    (tmp_path / "small.toml").write_text(text)
    run, said = tmp_path / "run", Console(file=io.StringIO())
    with pytest.raises(RunError, match=r"^3 of 4 arms failed, first rlp/seed-0: step 2: the loss is .* nan"):
        compare(tmp_path / "small.toml", {"run": str(run), "seeds": 0, "train": {"steps": 3}}, ProgressBar(said))
    lines = said.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("base: choosing a generic thought ")
    assert any(line.startswith("sound/seed-0 (2 of 4): training 3/3, gain ") for line in lines)
    assert ("sound", 0, "all/ce_think") in rows(run)
    html = (run / "compare.html").read_text()
    assert "Not finished: <strong>rlp/seed-0</strong> (step 2: the loss is " in html
    assert "whose budget it follows, failed" in html


def test_a_mistake_in_an_arm_leaves_the_table_of_the_others(tmp_path: Path):
    text = SMALL[: SMALL.index("[arms.cpt-tokens]")].replace("[arms.rlp]", "[arms.cpt]\noptions.method.name = 'cpt'")
    (tmp_path / "small.toml").write_text(f"{text}\n[arms.late]\noptions.method.name = 'cpt'\n")
    (tmp_path / "run" / "late" / "seed-0").mkdir(parents=True)
    (tmp_path / "run" / "late" / "seed-0" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"^late/seed-0: run = .*: exists and is not empty"):
        compare(tmp_path / "small.toml", {"run": str(tmp_path / "run"), "seeds": 0})
    assert {arm for arm, _, _ in rows(tmp_path / "run")} == {"base", "cpt"}


def test_a_resumed_experiment_measures_the_text_of_its_base_or_none(tmp_path: Path):
    """Also one of the same lengths, whose figures could be paired."""
    held_out = tmp_path / "heldout.jsonl"
    text = SMALL[: SMALL.index("[arms.cpt-tokens]")].replace("[arms.rlp]", "[arms.cpt]\noptions.method.name = 'cpt'")
    (tmp_path / "small.toml").write_text(text)

    def resumed(seeds: str, number: int) -> None:
        held_out.write_text("".join(json.dumps(cups.row("heldout", i + number)) + "\n" for i in range(3)))
        compare(tmp_path / "small.toml", {"run": str(tmp_path / "run"), "seeds": seeds, "evaluate": evaluate})

    evaluate = {"path": str(held_out), "documents": 3}
    resumed("0", 0)
    with pytest.raises(UserError, match=r"^evaluate.path = '.*': is not the held-out text of .*base/records.json; put"):
        resumed("0,1", 1)
    assert not (tmp_path / "run" / "cpt" / "seed-1").exists()
    resumed("0,1", 0)
    assert {seed for _, seed, _ in rows(tmp_path / "run")} == {0, 1, "all"}


@pytest.mark.slow
def test_a_process_that_fails_names_its_arm(tmp_path: Path):
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "run" / "rlp" / "seed-0").mkdir(parents=True)
    (tmp_path / "run" / "rlp" / "seed-0" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"^rlp/seed-0: run = .*: exists and is not empty"):
        compare(tmp_path / "small.toml", {"run": str(tmp_path / "run"), "processes": 2, "seeds": 0})


@pytest.mark.slow
def test_a_process_takes_several_jobs_and_one_that_is_killed_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = waits(tmp_path, monkeypatch, SMALL)
    whole = dataclasses.replace(experiment(tmp_path, text, seeds="0"), processes=1)
    whole.run.mkdir()
    pool, killed = WorkerPool(whole, list(whole.jobs)), []

    def kill() -> None:
        """The first process, while it trains."""
        if not killed and Path("waiting").exists():
            Path("stopped").touch()
            killed.append(pool.workers[0].process)
            killed[0].kill()

    observer = Callbacks()
    observer.phase = lambda name, done, total: kill()  # type: ignore[method-assign]
    failed = pool.run(observer)
    assert failed.keys() == {"rlp/seed-0", "cpt-tokens/seed-0", "cpt-flops/seed-0"}
    assert failed["rlp/seed-0"].startswith(f"ended with status {-signal.SIGKILL} (see ")
    assert failed["cpt-flops/seed-0"] == "rlp/seed-0, whose budget it follows, failed"
    assert pool.done == {"rlp-frozen/seed-0", "group=3/seed-0"}
    assert len(pool.workers) == 1, "one process made both"
    assert all(json.loads((whole.run / name / "spent.json").read_text())["cpu_seconds"] > 0 for name in pool.done)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[arms.rlp]", "[arms.rlp", "is not valid TOML"),
        ("seeds = [0, 1]", "seeds = []", "seeds = .*at least 1 item"),
        ("seeds = [0, 1]", "sseds = [0]", "unknown option sseds"),
        ("[arms.rlp-frozen]", "[arms.base]", r"arms.base: the base is always included"),
        ('flops = "rlp"', 'flops = "rpl"', r"arms.cpt-flops.budget.flops = 'rpl': must be another arm"),
        ('flops = "rlp"', 'seconds = "rlp"', r"budget"),
        ("freeze_teacher = true", "freeze = true", r"arms.rlp-frozen: unknown option method.freeze"),
        ("window = 64", 'window = "x"', r"corpus.window = 'x'"),
        ('arm = "rlp"\noption', 'arm = "x"\noption', r"sweeps.group.arm = 'x': there is no such arm"),
        ("values = [2, 3]", "values = [1, 2]", r"arms.group=1: method.group = 1"),
        (
            'options = { method.name = "cpt" }',
            "options = { train = 3 }",
            r"arms.cpt-tokens.options.train = 3: input should be an object",
        ),
        ('option = "method.group"', 'option = "seed.group"', r"seed = 0: is no table of options"),
        ("values = [2, 3]", "values = [3, 3]", r"sweeps.group: two arms would have the name 'group=3'"),
        (
            "[arms.rlp-frozen]",
            '[arms."group=3"]\n[arms.rlp-frozen]',
            r"sweeps.group: two arms .*'group=3'",
        ),
        (
            "[arms.rlp-frozen]",
            '[arms."group=2"]\n[arms.rlp-frozen]',
            r"sweeps.group: two arms .*'group=2'",
        ),
        ('above = ["base"]', 'above = ["x"]', r"claims.0: there is no arm 'x'"),
        ('above = ["base"]', "at_most = nan", r"claims.0.at_most = nan: .*finite number"),
        ('above = ["base"]', 'not_above = ["base"]\nmargin = inf', r"claims.0.margin = inf: .*finite number"),
        ('metrics = ["all/', 'metrics = ["all/x", "all/', r"claims.0: 'all/x' is no GROUP/METRIC"),
        ('above = ["base"]', "", r"claims.0: takes one of above, not_above, equals, at_most"),
        ('above = ["base"]', 'not_above = ["base"]\nagainst = "all/x"', r"claims.0: against belongs to above"),
        ('above = ["base"]', "at_most = 1\nmargin = 0.1", r"claims.0: .*margin to above and not_above"),
        ('equals = ["rlp", "cpt-tokens"]', 'equals = ["base"]', r"claims.1: the base was not trained"),
        ("seeds = [0, 1]", "seeds = [0, 0]", r"seeds = \[0, 0\]: names a seed twice"),
        ("seeds = [0, 1]", "seeds = [1]", r"sweeps.group: its seeds, \[0\], are none of"),
        ("[sweeps.group]", '[sweeps."../x"]', r"sweeps"),
        (
            "freeze_teacher = true",
            'ema = 0.5, freeze_teacher = true }, model = { path = "x"',
            r"rlp-frozen: cannot set model",
        ),
        ("freeze_teacher = true", "freeze_teacher = true }, corpus = { window = 32", r"cannot set corpus.window"),
        ('{ tokens = "rlp" }', '{ tokens = "rlp", flops = "rlp" }', r"takes tokens or flops, not both"),
        ('metrics = ["all/accuracy_think"]', "", r"claims.0: takes one of"),
        ("corpus.window = 64", 'corpus.window = 64\nmodel.init = "random"', r"model.init must be pretrained"),
        ("evaluate = {", 'seed = 3\nevaluate = { path = "",', r"options cannot set seed"),
        ("evaluate = {", 'evaluate = { path = "",', r"evaluate.path = ''"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, capsys: Any, old: str, new: str, message: str):
    assert SMALL.count(old) >= 1
    with pytest.raises(UserError, match=message) as caught:
        experiment(tmp_path, SMALL.replace(old, new, 1))
    assert "\n" not in str(caught.value)
    assert main(["compare", str(tmp_path / "small.toml"), "--run", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there_is_named(capsys: Any):
    assert main(["compare", "nothing.toml"]) == 2
    assert main(["compare"]) == 2
    assert main(["compare", "compare-quickstart", "--seeds", "a"]) == 2
    assert main(["compare", "quickstart"]) == 2
    assert main(["train", "compare-quickstart"]) == 2
    said = capsys.readouterr().err
    assert "config 'nothing.toml' is no file" in said
    assert "compare takes an experiment file" in said
    assert "seeds = 'a'" in said
    assert "experiment 'quickstart': names no arms" in said
    assert "config 'compare-quickstart' is an experiment: forethought compare compare-quickstart" in said


def test_another_config_makes_it_another_experiment(tmp_path: Path):
    whole = read("compare-quickstart", {"config": "quickstart-notes"})
    assert (whole.start.corpus.path, whole.run) == (
        "world:notes/train",
        Path("runs/compare-quickstart-quickstart-notes"),
    )
    assert read("compare-quickstart", {}).run == Path("runs/compare-quickstart")


@pytest.mark.parametrize(
    ("claim", "arm", "holds"),
    [
        ({"above": ["base"]}, {"low": 0.6, "high": 0.9}, True),
        ({"above": ["base"]}, {"low": 0.5, "high": 0.9}, False),
        ({"above": ["none"]}, {"low": 0.6, "high": 0.9}, None),
        ({"above": ["base"], "against": "all/y"}, {"low": 0.6, "high": 0.9}, False),
        ({"above": ["base"], "margin": 0.09}, {"low": 0.6, "high": 0.9}, True),
        ({"above": ["base"], "margin": 0.1}, {"low": 0.6, "high": 0.9}, False),
        ({"at_most": 0.7}, {"low": 0.1, "high": 0.7}, True),
        ({"at_most": 0.7}, {"low": 0.1, "high": 0.71}, False),
        ({"above": ["base"]}, {"value": 0.9}, None),  # fewer than ten documents: no interval, no verdict
        ({"at_most": 0.7}, {"value": 0.1}, None),
    ],
)
def test_verdicts_by_hand(tmp_path: Path, claim: dict[str, Any], arm: dict[str, float], holds: bool | None):
    made = [
        Row(arm="base", seed="all", metric="all/x", value=0.4, low=0.3, high=0.5),
        Row(arm="base", seed="all", metric="all/y", value=0.7, low=0.6, high=0.8),
        Row(arm="a", seed="all", metric="all/x", **{"value": 0.6, **arm}),
        Row(arm="a", seed=0, metric="all/x", value=9.0, low=9.0, high=9.0),
    ]
    whole = dataclasses.replace(experiment(tmp_path), claims=(Claim(arm="a", metrics=["all/x"], **claim),))
    assert [one.holds for one in table.judge(whole, made, [])] == [holds]


@pytest.mark.parametrize(
    ("low", "margin", "holds"), [(0.01, 0.0, True), (0.0, 0.0, False), (0.03, 0.02, True), (0.02, 0.02, False)]
)
def test_above_is_judged_by_the_paired_difference_where_there_is_one(
    tmp_path: Path, low: float, margin: float, holds: bool
):
    """Side by side the intervals overlap, or are apart: neither counts."""
    claim = Claim(arm="a", metrics=["all/x"], above=["base"], margin=margin)
    made = [
        Row(arm="base", seed="all", metric="all/x", value=0.2, low=0.1, high=0.3),
        Row(arm="a", seed="all", metric="all/x", value=0.3, low=0.2 if holds else 0.6, high=0.9),
        Row(arm="a", seed="all", metric="minus/base/all/x", value=0.1, low=low, high=0.2),
    ]
    (verdict,) = table.judge(dataclasses.replace(experiment(tmp_path), claims=(claim,)), made, [])
    assert (verdict.holds, verdict.claim) == (holds, "a above base in all/x")
    assert verdict.evidence.startswith("difference 0.1 [")
    claim = dataclasses.replace(claim, against="all/y")  # a difference in x says nothing of another metric
    made.append(Row(arm="base", seed="all", metric="all/y", value=1.0, low=0.9, high=1.1))
    (verdict,) = table.judge(dataclasses.replace(experiment(tmp_path), claims=(claim,)), made, [])
    assert (verdict.holds, verdict.claim) == (False, "a above base (its all/y) in all/x, intervals apart")


@pytest.mark.parametrize(("low", "high", "holds"), [(-0.1, 0.02, True), (-0.1, 0.03, False), (-0.2, -0.01, True)])
def test_not_above_bounds_the_paired_difference(tmp_path: Path, low: float, high: float, holds: bool):
    claim = Claim(arm="a", metrics=["all/x"], not_above=["base"], margin=0.02)
    made = [Row(arm="a", seed="all", metric="minus/base/all/x", value=0.0, low=low, high=high)]
    whole = dataclasses.replace(experiment(tmp_path), claims=(claim,))
    assert [one.holds for one in table.judge(whole, made, [])] == [holds]


def test_the_page_shows_failures_names_as_text_and_every_table(finished: Any):
    run, verdicts = finished
    html = (run / "compare.html").read_text()
    failed = [one for one in verdicts if one.holds is False]
    assert len(failed) == 2
    assert f"{len(failed)} of {len(verdicts)} claims fail" in html
    for one in failed:
        assert one.claim in html
    for arm in ("base", "rlp", "cpt-tokens", "cpt-flops", "rlp-frozen"):
        assert f'<th scope="row" class="arm">{arm}</th>' in html
    assert "method.group, seed 0: all positions" in html
    assert html.count("<svg") == html.count("</svg>") == 2 * 2 + 2 * 2 + 2 * 2 + 2  # two themes
    assert "://" not in html.replace("http://www.w3.org", "")
    assert (run / "curves.html").is_file()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_fits_a_phone_and_scripts_in_it_do_not_run(finished: Any, tmp_path: Path):
    """A browser lays the page out in a frame as wide as a phone; a probe outside of it reads what came out."""
    run, _ = finished
    html = (run / "compare.html").read_text()
    (tmp_path / "page.html").write_text(html.replace("</main>", "<script>document.title = 'ran'</script></main>"))
    (tmp_path / "probe.html").write_text("""<iframe src="page.html" style="width:390px;height:800px;border:0"></iframe>
<script>onload = () => { const page = frames[0].document; const table = page.querySelector("#arms table");
document.body.innerHTML = `<p>${page.documentElement.scrollWidth} ${page.title} ${table.scrollWidth > 390}
${page.querySelectorAll("svg").length}</p>` }</script>""")
    words = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
    words += [(tmp_path / "probe.html").as_uri()]
    made = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.search(r"<p>(.*?)</p>", made, re.DOTALL)
    assert found is not None, made
    width, *rest = found[1].split()
    assert int(width) <= 390
    assert " ".join(rest) == "small – Forethought comparison true 14"


def test_names_from_the_experiment_are_text_on_the_page(finished: Any, tmp_path: Path):
    run, _ = finished
    described = json.loads((run / "experiment.json").read_text()) | {"name": "<script>alert(1)</script>"}
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "experiment.json").write_text(json.dumps(described))
    (copy / "compare.json").write_bytes((run / "compare.json").read_bytes())
    for arm in described["arms"]:
        (copy / arm).symlink_to(run / arm)
    assert "<script>" not in write_comparison(copy).read_text()
    (copy / "compare.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"compare.json: unexpected content: 0.arm: Field required"):
        write_comparison(copy)


def test_records_come_back_as_they_were(finished: Any):
    run, _ = finished
    found = arms.records(run / "rlp" / "seed-0")
    assert {"all", "answer"} <= found.keys()
    assert len(found["all"].at) == len(found["all"].think) == 12


def test_a_difference_of_shares_is_in_points():
    row = comparison.Row(arm="rlp", seed="all", metric="all/accuracy_think", value=0.05, low=0.01, high=0.09)
    told = {name: "" for name in ("name", "model", "corpus", "held_out")}
    described = comparison.Described(**told, arms={}, sweeps=[], claims=[], missing={})
    found = comparison.Figures([row], described)
    assert found.cell("rlp", row.metric, "share") == ("5.0\u00a0%", "1.0\u00a0% to 9.0\u00a0%")
    assert found.cell("rlp", row.metric, "share", plus=True) == ("+5.0 points", "1.0 points to 9.0 points")
