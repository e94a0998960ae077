"""`forethought runs`: how far runs are, from folders in every state."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from forethought.cli import main
from forethought.run.folder import RunLog
from forethought.tools.report.runs import State, find, state
from helpers.cli import complaint
from helpers.pages import make_run


def a_run(path: Path, steps: int, saved: int | None = None, finished: bool = False) -> Path:
    """A run of 80 steps of 3 s each with a gain of 0.5 after each, with metrics up to a step and a checkpoint."""
    make_run(path, steps=steps, evaluated=finished)
    rows = [{"step": step, "reward/gain": 0.5, "time/step_s": 3.0} for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if saved is not None:
        (path / "checkpoints" / f"step-{saved:06d}").mkdir(parents=True)
    return path


def test_a_run_is_finished_stopped_failed_or_running(tmp_path: Path):
    finished = state(a_run(tmp_path / "a", 80, 80, finished=True))
    assert finished == State(path=tmp_path / "a", state="finished", step=80, steps=80, gain=0.5)
    assert state(a_run(tmp_path / "b", 20, 20)) == State(
        path=tmp_path / "b", state="stopped", step=20, steps=80, gain=0.5
    )
    assert state(a_run(tmp_path / "c", 25, 20)).state == "failed"
    failed = state(a_run(tmp_path / "d", 0))
    assert failed == State(path=tmp_path / "d", state="failed", step=0, steps=80)
    run = a_run(tmp_path / "e", 20, 10)
    with RunLog(run).lock():
        running = state(run)
    assert running == State(path=run, state="running", step=20, steps=80, gain=0.5, left_s=60 * 3.0)
    assert state(run).state == "failed"
    with RunLog(run).lock():  # looking left no lock behind
        pass


def test_a_budget_of_tokens_says_where_a_run_ends(tmp_path: Path):
    run = a_run(tmp_path / "run", 20, 20)
    config = json.loads((run / "config.json").read_text())
    config["train"]["tokens"] = 4000
    (run / "config.json").write_text(json.dumps(config))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "corpus/tokens": 2000, "time/step_s": 3.0}\n')
    with RunLog(run).lock():
        found = state(run)
    assert (found.steps, found.left_s, found.gain) == (40, 60.0, 0.5)


@pytest.mark.parametrize("file", ["evaluate.json", "questions.json", "records.json"])  # the last: an experiment's base
def test_an_evaluation_alone_is_measured_and_a_broken_run_says_what_is_broken(file: str, tmp_path: Path):
    run = a_run(tmp_path / "a", 0)
    (run / file).write_text("{}")
    assert state(run) == State(path=run, state="measured")
    (run / "metrics.jsonl").write_text("{\n{}\n")
    assert re.search(r"metrics\.jsonl:1: malformed JSON", state(run).state)


def test_a_folder_of_another_program_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    message = f"{tmp_path}/config.json: is not the config of a Forethought run"
    assert complaint(capsys, ["report", str(tmp_path)]) == message
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}')
    assert state(tmp_path) == State(path=tmp_path, state=message)


def test_values_of_another_kind_are_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = a_run(tmp_path / "run", 3)
    config = json.loads((run / "config.json").read_text())
    for train in (3, {"steps": "x", "tokens": "y"}):
        (run / "config.json").write_text(json.dumps({**config, "train": train}))
        assert main(["runs", str(run)]) == 0
        assert "3/3" in capsys.readouterr().out


def test_runs_are_found_at_any_depth_but_not_inside_each_other(tmp_path: Path):
    a_run(tmp_path / "compare" / "rlp" / "seed-0", 5)
    a_run(tmp_path / "one", 5)
    a_run(tmp_path / "one" / "copies" / "inner", 5)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert find(tmp_path) == [tmp_path / "compare" / "rlp" / "seed-0", tmp_path / "one"]
    assert find(tmp_path / "one") == [tmp_path / "one"]


@pytest.mark.parametrize("width", ["40", "120"])
def test_the_command_lists_them(width: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path / "runs" / "q", 20, 10)
    with RunLog(run).lock():
        assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(width)
    for cell in ("runs/q", "running", "20/80", "+0.500", "3 min 0 s"):
        assert set(cell.split()) <= set(out.split()), cell
    (tmp_path / "none").mkdir()
    assert main(["runs", "none"]) == 0
    assert capsys.readouterr().out == "none holds no run\n"
    assert complaint(capsys, ["runs", "nothing"]) == "runs: 'nothing': no such folder"
    assert complaint(capsys, ["runs", "a", "b"]) == "runs takes one folder, or none for runs/"


def test_it_needs_no_torch(tmp_path: Path):
    a_run(tmp_path / "q", 20, 10)
    command = f"from forethought.cli import main; main(['runs', {str(tmp_path)!r}])"
    script = f"import sys; {command}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
