"""Runs that are stopped, killed or out of disk, and go on as if nothing had been."""

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from forethought.cli import main
from forethought.config import RunError, from_dict, merge
from forethought.run import checkpoint
from forethought.run.folder import RunLog, checkpoints
from forethought.run.signals import SignalArrived, SignalGuard, Stopped
from forethought.run.trackers import Callbacks
from forethought.trainer import Trainer, resume, train
from helpers.runs import assert_same_run, figures, options, words

PATIENCE_S = 60.0


def work(command: list[str], errors: Path) -> None:
    """The body of a child process: the command line, with stderr in a file."""
    torch.set_num_threads(1)
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(main(command))


@contextmanager
def child(processes: ForkServerContext, command: list[str], errors: Path) -> Iterator[Any]:
    process = processes.Process(target=work, args=(command, errors))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(what: str, process: Any, run: Path) -> None:
    """Until a file of the run matches the pattern, or the process is over."""
    end = time.monotonic() + PATIENCE_S
    while process.is_alive() and not any(run.glob(what)):
        assert time.monotonic() < end, f"no {what} in {run}"
        time.sleep(2e-4)


def finish(process: Any) -> int:
    process.join(PATIENCE_S)
    assert process.exitcode is not None
    return process.exitcode


VARIANTS = {
    "rlp": {},
    "rlp that drops": {"method": {"unclosed": "drop", "kl_weight": 0.1, "inner_steps": 2}},
    "cpt": {"method": {"name": "cpt"}},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(from_dict(options(folder, "run")))
    return folder / "run"


def stop(processes: ForkServerContext, run: Path, number: signal.Signals, moment: str, changes: dict[str, Any]) -> None:
    """Train in a process, send it a signal at a moment, and check how it leaves."""
    errors = run.with_name("errors")
    with child(processes, words(options(run.parent, run.name, **changes)), errors) as process:
        wait_for(moment, process, run)
        os.kill(process.pid, number)
        assert finish(process) == 128 + number, errors.read_text()
    logged = [row["step"] for row in figures(run)]
    assert list(checkpoints(run))[-1] == logged[-1]
    assert not (run / "summary.json").exists()
    [line] = [line for line in errors.read_text().splitlines() if line.startswith("forethought: ")]
    assert line == (
        f"forethought: stopped by {number.name}; saved after step {logged[-1]}; "
        f"go on with: forethought train --resume {run}"
    )


@pytest.mark.parametrize(
    ("variant", "number"),
    [("rlp", signal.SIGINT), ("rlp that drops", signal.SIGTERM), ("cpt", signal.SIGTERM)],
)
def test_a_stopped_run_goes_on_to_the_bit(
    variant: str, number: signal.Signals, tmp_path: Path, processes: ForkServerContext
):
    changes = merge(VARIANTS[variant], {"train": {"checkpoint_every": 100}})
    train(from_dict(options(tmp_path, "whole", **changes)))
    run = tmp_path / "stopped"
    stop(processes, run, number, "metrics.jsonl", changes)
    resume(run)
    assert_same_run(run, tmp_path / "whole")


def test_a_signal_during_a_save_waits_for_it(tmp_path: Path, whole: Path, processes: ForkServerContext):
    run = tmp_path / "stopped"
    stop(processes, run, signal.SIGTERM, "checkpoints/.partial-step-00000002", {})
    checkpoint.load(list(checkpoints(run).values())[-1])
    resume(run)
    assert_same_run(run, whole)


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_a_signal_during_an_optimizer_step_waits_for_the_whole_step(tmp_path: Path, inner_steps: int):
    changes = {"method": {"inner_steps": inner_steps}, "train": {"steps": 3, "checkpoint_every": 100}}
    train(from_dict(options(tmp_path, "whole", **changes)))
    run = tmp_path / "stopped"

    config = from_dict(options(tmp_path, "stopped", **changes))
    trainer = Trainer(config)

    def send(*_: Any) -> None:
        handle.remove()
        os.kill(os.getpid(), signal.SIGTERM)

    handle = trainer.optimizer.register_step_pre_hook(send)
    with pytest.raises(Stopped, match="saved after step 1;"):
        trainer.run(RunLog.create(config), Callbacks())
    assert list(checkpoints(run)) == [1]
    resume(run)
    assert_same_run(run, tmp_path / "whole")


def test_the_gate_holds_a_signal_back_and_puts_the_old_handlers_back():
    before = signal.getsignal(signal.SIGINT)
    gate, reached = SignalGuard(), []
    with gate.installed():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after the signal")
        with pytest.raises(SignalArrived) as caught, gate.interruptible():
            reached.append("not here")
        assert caught.value.number == signal.SIGINT
    assert reached == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) is before


def test_twenty_kills_leave_no_trace(tmp_path: Path, processes: ForkServerContext):
    changes = {"train": {"steps": 100}}
    started = time.monotonic()
    train(from_dict(options(tmp_path, "whole", **changes)))
    step_s = (time.monotonic() - started) / 100
    run, errors, rng = tmp_path / "killed", tmp_path / "errors", random.Random(0)
    command, during_save, progress, start_s = words(options(tmp_path, "killed", **changes)), 0, [], 0.0
    for life in range(20):
        with child(processes, command, errors) as process:
            started = time.monotonic()
            if life % 4:
                # A kill may have left the next step's folder behind, so the one after it shows that this life works.
                wait_for(f"checkpoints/.partial-step-{progress[-1] + 2:08}", process, run)
                time.sleep(rng.random() * step_s * (0.2 if life % 2 else 2))
            elif life:
                time.sleep(rng.random() * start_s)
            else:
                wait_for("checkpoints/step-*", process, run)
                start_s = time.monotonic() - started
            os.kill(process.pid, signal.SIGKILL)
            assert finish(process) == -signal.SIGKILL, errors.read_text()
        during_save += any((run / "checkpoints").glob(".*"))
        progress.append(list(checkpoints(run))[-1])
        command = ["train", "--resume", str(run)]
    assert during_save >= 1
    assert progress == sorted(progress)
    assert progress[0] < progress[-1] < 100
    resume(run)
    assert_same_run(run, tmp_path / "whole")


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(tmp_path: Path, whole: Path, processes: ForkServerContext):
    run, errors = tmp_path / "full", tmp_path / "errors"
    with child(processes, words(options(tmp_path, "full")), errors) as process:
        wait_for("checkpoints/step-00000002", process, run)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
        assert finish(process) == 1, errors.read_text()
    [line] = [line for line in errors.read_text().splitlines() if not line.startswith("training")]
    step = list(checkpoints(run))[-1]
    assert line.startswith(f"forethought: {run}")
    assert line.endswith(f"cannot be written: File too large; the checkpoint of step {step} is intact")
    assert not (run / "summary.json").exists()
    resume(run)
    assert_same_run(run, whole)


class Filler(Callbacks):
    """Lets the disk be full for thoughts.jsonl after the third step."""

    def __init__(self, run: Path):
        self.file, self.kept = run / "thoughts.jsonl", run / "kept"

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 3:
            self.file.rename(self.kept)
            self.file.symlink_to("/dev/full")


def test_a_step_that_cannot_be_logged_is_done_again(tmp_path: Path, whole: Path):
    run = tmp_path / "full"
    config = from_dict(options(tmp_path, "full", train={"checkpoint_every": 2}))
    filler = Filler(run)
    with pytest.raises(
        RunError, match=r"thoughts.jsonl: cannot be written: No space .* checkpoint of step 2 is intact"
    ):
        train(config, filler)
    assert list(checkpoints(run)) == [2]
    filler.kept.rename(filler.file)
    resume(run)
    assert_same_run(run, whole)
