"""Several ranks do what one process does: the same thoughts, weights and run folder, and one line for an error."""

import random
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forethought.cli import main
from forethought.config import from_dict, merge
from forethought.run import checkpoint
from forethought.run.distributed import balance_load, launcher_rank_and_size
from forethought.run.folder import checkpoints
from forethought.trainer import resume, train
from helpers.moments import Moment
from helpers.runs import (
    MAXIMUM,
    MEAN,
    assert_same_run,
    assert_same_trajectory,
    begin,
    cut,
    drift,
    end,
    lines,
    mean_drift,
    settings,
    together,
    words,
)


@pytest.mark.distributed
@pytest.mark.parametrize("model", ["attention", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_processes_shards_and_resuming_on_another_count_do_not_change_the_trajectory(
    model: str, tmp_path: Path, processes: ForkServerContext
):
    one = tmp_path / "one"
    train(from_dict(settings(tmp_path, "one", model)))
    two = together(processes, settings(tmp_path, "two", model))
    sharded = together(processes, settings(tmp_path, "sharded", model, parallel={"shard": "zero1"}))
    alone = cut(sharded, "two-shards-then-one", 2)
    resume(alone)
    more = cut(two, "two-then-three-shards", 2)
    command = ["train", "--resume", str(more), "--parallel.shard", "zero1"]
    assert end(begin(processes, command, tmp_path, 3)) == [0, 0, 0], lines(tmp_path, 3)
    for other in (two, sharded, alone, more):
        print(other.name, f"drift {drift(one, other):.1e} at most, {mean_drift(one, other):.1e} on average")
        assert_same_trajectory(one, other)
    another = tmp_path / "another"
    train(from_dict(settings(tmp_path, "another", model, method={"reward": "random"})))
    assert drift(one, another) > 10 * MAXIMUM
    assert mean_drift(one, another) > 10 * MEAN
    assert (one / "evaluation-before.json").read_text() == (two / "evaluation-before.json").read_text()
    parts = sorted(path.name for path in checkpoint.latest(sharded).iterdir())  # type: ignore[union-attr]
    names = [f"{part}.{rank}-of-2.safetensors" for part in ("optimizer", "policy", "teacher") for rank in (0, 1)]
    assert parts == sorted([*names, "state.json"])
    assert {path.name for path in checkpoint.latest(more).iterdir()} >= {"policy.2-of-3.safetensors"}  # type: ignore[union-attr]


VARIANTS = {
    "rlp, with a distilled prediction term, of shards, at positions of its own entropy": {
        "method": {
            **{"prediction_weight": 0.3, "horizon": 2, "length_norm": "none", "warmup_steps": 1},
            **{"distillation": 0.5, "min_thought_length": 3},
            **{"position_policy": "entropy", "proxy": "policy"},
        },
        "parallel": {"shard": "zero1"},
    },
    "cpt": {"method": {"name": "cpt"}},
    "cpt, a bf16 copy of shards": {
        "method": {"name": "cpt"},
        "model": {"precision": "bf16"},
        "parallel": {"shard": "zero1"},
    },
    "rpt, with what processes must tell each other": {
        "method": {
            **{"name": "rpt", "reward": "random", "baseline": "batch", "unclosed": "drop"},
            **{"kl_weight": 0.1, "inner_steps": 2, "position_policy": "entropy"},
        }
    },
}


@pytest.mark.distributed
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_do_what_one_does_with(variant: str, tmp_path: Path, processes: ForkServerContext):
    changes = merge(VARIANTS[variant], {"train": {"steps": 3}, "evaluate": {"path": ""}})
    train(from_dict(settings(tmp_path, "one", "attention", **changes)))
    assert_same_trajectory(tmp_path / "one", together(processes, settings(tmp_path, "two", "attention", **changes)))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"batch": 2}}, "train.batch = 2: fewer documents a step than 2 processes"),
        ({"corpus": {"path": "nowhere.jsonl"}}, "no such file or folder"),
    ],
)
def test_a_mistake_is_told_once(changes: Any, message: str, tmp_path: Path, processes: ForkServerContext):
    values = settings(tmp_path, "run", "attention", **changes)
    assert sorted(end(begin(processes, words(values), tmp_path))) == [1, 2]
    [line] = lines(tmp_path)
    assert message in line
    assert not (tmp_path / "run").exists()


INTERRUPTED = {"train": {"steps": 8}, "parallel": {"shard": "zero1"}, "evaluate": {"path": ""}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, processes: ForkServerContext) -> Path:
    """The run of two processes that nothing interrupts."""
    return together(processes, settings(tmp_path_factory.mktemp("whole"), "run", "attention", **INTERRUPTED))


@pytest.mark.distributed
def test_a_signal_to_one_process_stops_all_of_them_and_the_run_goes_on_to_the_bit(
    tmp_path: Path, whole: Path, processes: ForkServerContext
):
    changes = merge(INTERRUPTED, {"train": {"checkpoint_every": 100}})
    run = tmp_path / "run"
    command = words(settings(tmp_path, "run", "attention", **changes))
    moment = Moment(str(run), forwards=1000, number=signal.SIGTERM)  # in one of the first steps
    assert end(begin(processes, command, tmp_path, moments={1: moment})) == [128 + signal.SIGTERM] * 2
    [line] = lines(tmp_path)
    step = list(checkpoints(run))[-1]
    assert line.startswith(f"forethought: stopped by SIGTERM; saved after step {step}; go on with: ")
    assert end(begin(processes, ["train", "--resume", str(run)], tmp_path)) == [0, 0], lines(tmp_path)
    assert_same_run(run, whole)


def kills(processes: ForkServerContext, tmp_path: Path, count: int, changes: dict[str, Any]) -> Path:
    """Again and again, kill one of two ranks some time after it saved a step; then let the run end."""
    run, rng = tmp_path / "killed", random.Random(0)
    command = words(settings(tmp_path, "killed", "attention", **changes))
    for _ in range(count):
        saved, victim = max(checkpoints(run), default=0), rng.randrange(2)
        saving = f"checkpoints/.partial-step-{saved + 1:08}/*"
        moment = Moment(str(run), saving, forwards=1 + rng.randrange(400), number=signal.SIGKILL)
        codes = end(begin(processes, command, tmp_path, moments={victim: moment}))
        assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, 1)
        [line] = lines(tmp_path)
        print(f"saved up to step {max(checkpoints(run))}: {line}")
        assert max(checkpoints(run)) > saved
        assert "another process has died" in line
        assert "nothing is lost up to the last checkpoint" in line
        command = ["train", "--resume", str(run)]
    assert end(begin(processes, command, tmp_path)) == [0, 0], lines(tmp_path)
    return run


@pytest.mark.distributed
def test_when_a_process_is_killed_the_other_says_so_and_nothing_saved_is_lost(
    tmp_path: Path, whole: Path, processes: ForkServerContext
):
    assert_same_run(kills(processes, tmp_path, 1, INTERRUPTED), whole)


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace(tmp_path: Path, processes: ForkServerContext):
    changes = merge(INTERRUPTED, {"train": {"steps": 30, "keep_checkpoints": 2}})
    whole = together(processes, settings(tmp_path, "whole", "attention", **changes))
    assert_same_run(kills(processes, tmp_path, 10, changes), whole)


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=40), bins=st.integers(1, 8))
def test_balance_load_assigns_every_item_once_and_evenly(weights: list[int], bins: int):
    assigned = balance_load(weights, bins)
    assert sorted(i for items in assigned for i in items) == list(range(len(weights)))
    assert all(items == sorted(items) for items in assigned)
    loads = [sum(weights[i] for i in items) for items in assigned]
    assert max(loads) - min(loads) <= max(weights)
    assert all(assigned) or len(weights) < bins


def test_balance_load_by_hand():
    assert balance_load([5, 3, 3, 1, 1], 2) == [[0, 3, 4], [1, 2]]
    assert balance_load([2, 2, 2, 2], 2) == [[0, 2], [1, 3]]
    assert balance_load([7, 1, 9], 1) == [[0, 1, 2]]


def test_commands_of_one_process_refuse_several(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launcher_rank_and_size() == (1, 2)
    for command in ("evaluate", "questions", "compare", "report"):
        assert main([command, "embedded"]) == 2
        line = f"forethought process 1: {command} runs in one process; start it without torchrun or accelerate launch\n"
        assert capsys.readouterr().err == line
