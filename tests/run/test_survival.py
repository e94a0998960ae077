"""Runs that are stopped, killed or out of disk space continue as if nothing had happened."""

import os
import random
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from forethought.config import RunError, from_dict, merge
from forethought.run.folder import RunLog, checkpoints
from forethought.run.signals import ENDING, SignalArrived, SignalGuard, Stopped, stoppable
from forethought.run.trackers import Callbacks
from forethought.trainer import Trainer, resume, train
from helpers.moments import Moment
from helpers.runs import assert_same_run, begin, end, figures, lines, options, read_checkpoint, words


def life(processes: ForkServerContext, command: list[str], moment: Moment) -> int:
    """How a process leaves that runs a command until something happens to it at a moment; its stderr is `errors-0`."""
    [code] = end(begin(processes, command, Path(moment.run).parent, 1, {0: moment}))
    return code


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


def stop(processes: ForkServerContext, changes: dict[str, Any], moment: Moment) -> None:
    """Train in a process that gets a signal at a moment, and check how it leaves."""
    run = Path(moment.run)
    code = life(processes, words(options(run.parent, run.name, **changes)), moment)
    assert code == 128 + moment.number, errors(run)
    logged = [row["step"] for row in figures(run)]
    assert list(checkpoints(run))[-1] == logged[-1]
    assert not (run / "summary.json").exists()
    [line] = lines(run.parent, 1)
    assert line == (
        f"forethought: stopped by {signal.Signals(moment.number).name}; saved after step {logged[-1]}; "
        f"go on with: forethought train --resume {run}"
    )


def errors(run: Path) -> str:
    return run.with_name("errors-0").read_text()


@pytest.mark.parametrize(
    ("variant", "number", "forwards"),
    [
        ("rlp", signal.SIGINT, 1),
        ("rlp that drops", signal.SIGTERM, 200),
        ("cpt", signal.SIGTERM, 20),
        ("cpt", signal.SIGHUP, 20),
        ("cpt", signal.SIGXCPU, 20),
    ],
)
def test_a_stopped_run_goes_on_to_the_bit(
    variant: str, number: signal.Signals, forwards: int, tmp_path: Path, processes: ForkServerContext
):
    """The signal comes in the middle of a step, in a forward pass."""
    changes = merge(VARIANTS[variant], {"train": {"checkpoint_every": 100}})
    train(from_dict(options(tmp_path, "whole", **changes)))
    run = tmp_path / "stopped"
    stop(processes, changes, Moment(str(run), "metrics.jsonl", forwards=forwards, number=number))
    resume(run)
    assert_same_run(run, tmp_path / "whole")


def test_a_signal_during_a_save_waits_for_it(tmp_path: Path, whole: Path, processes: ForkServerContext):
    run = tmp_path / "stopped"
    stop(processes, {}, Moment(str(run), "checkpoints/.partial-step-00000002"))
    assert list(checkpoints(run))[-1] == 2
    read_checkpoint(list(checkpoints(run).values())[-1])
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


@pytest.mark.parametrize("number", ENDING)
def test_the_guard_defers_a_signal_and_restores_the_handlers(number: signal.Signals):
    before = signal.getsignal(number)
    guard, reached = SignalGuard(), []
    with guard.installed():
        os.kill(os.getpid(), number)
        reached.append("after the signal")
        with pytest.raises(SignalArrived) as caught, guard.interruptible():
            reached.append("not here")
        assert caught.value.number == number
    assert reached == ["after the signal"]
    assert signal.getsignal(number) is before


def test_a_signal_that_interrupts_nothing_goes_to_the_guard_around():
    """As during the export of one arm of several: the next one does not begin."""
    reached = []
    with pytest.raises(SignalArrived) as caught, stoppable():
        with SignalGuard().installed():
            os.kill(os.getpid(), signal.SIGHUP)
            reached.append("the end of this part")
        reached.append("not here")
    assert (caught.value.number, reached) == (signal.SIGHUP, ["the end of this part"])


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None], ids=["nohup", "of another library"])
def test_a_signal_that_is_ignored_or_handled_stays_so(handler: Any):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with SignalGuard().installed():
            assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path: Path, processes: ForkServerContext):
    """Of four lives one is killed at its start, one in a forward pass, and two in or after a save."""
    steps, changes = 24, {"train": {"steps": 24}}
    train(from_dict(options(tmp_path, "whole", **changes)))
    run, rng = tmp_path / "killed", random.Random(0)
    command, during_save, progress = words(options(tmp_path, "killed", **changes)), 0, [0]
    for number in range(20):
        saving = f"checkpoints/.partial-step-{progress[-1] + 1:08}*"
        if number % 4 == 3:
            moment = Moment(str(run), "*", files=rng.randrange(20), number=signal.SIGKILL)
        elif number % 4 == 2:
            moment = Moment(str(run), saving, forwards=1 + rng.randrange(500), number=signal.SIGKILL)
        else:
            moment = Moment(str(run), saving, files=rng.randrange(60), number=signal.SIGKILL)
        assert life(processes, command, moment) == -signal.SIGKILL, errors(run)
        during_save += any((run / "checkpoints").glob(".*"))
        progress.append(max(checkpoints(run), default=0))
        command = ["train", "--resume", str(run)]
    print("progress", progress, "killed during a save", during_save)
    assert during_save >= 3
    assert progress == sorted(progress)
    assert len(set(progress)) > 5
    assert progress[-1] < steps
    resume(run)
    assert_same_run(run, tmp_path / "whole")


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(tmp_path: Path, whole: Path, processes: ForkServerContext):
    run = tmp_path / "full"
    moment = Moment(str(run), "checkpoints/step-00000002", file_bytes=20_000)
    assert life(processes, words(options(tmp_path, "full")), moment) == 1, errors(run)
    [line] = lines(tmp_path, 1)
    assert line.startswith(f"forethought: {run}")
    assert line.endswith("cannot be written: File too large; the checkpoint of step 2 is intact")
    assert list(checkpoints(run))[-1] == 2
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
