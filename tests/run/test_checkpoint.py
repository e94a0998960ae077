"""Checkpoints, and what a kill or a full disk leaves of them."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from forethought.config import RunError, UserError
from forethought.models.sharding import load_state, local_state
from forethought.run import checkpoint
from forethought.run.checkpoint import Saved, latest
from forethought.run.folder import checkpoints
from helpers.moments import Moment
from helpers.runs import Snapshot, read_checkpoint

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def save(run: Path, step: int, snapshot: Snapshot, keep: int) -> Path:
    return checkpoint.save(run, step, snapshot.tensors, snapshot.state, keep)


def snapshot(count: int = 0, numel: int = 8) -> Snapshot:
    """A snapshot whose every part says `count`."""
    tensors = {f"{group}/weight": torch.full((numel,), float(count)) for group in ("policy", "teacher")}
    return Snapshot(tensors=tensors, state={"count": count})


def count_of(path: Path) -> int:
    """The count of a checkpoint, checking that all its parts agree."""
    loaded = read_checkpoint(path)
    assert set(loaded.tensors) == {"policy/weight", "teacher/weight"}
    for tensor in loaded.tensors.values():
        assert bool((tensor == loaded.state["count"]).all())
    return loaded.state["count"]


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bytes(one.contiguous().flatten().view(torch.uint8)) == bytes(other.contiguous().flatten().view(torch.uint8))


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    tensor = tensor.reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(tensors(), max_size=4), state=st.dictionaries(st.text(), st.integers() | st.floats() | st.text())
)
def test_bits_dtypes_and_shapes_come_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[Tensor], state: dict[str, Any]
):
    run = tmp_path_factory.mktemp("run")
    named = {f"group{i % 2}/part/{i}": tensor for i, tensor in enumerate(values)}
    loaded = read_checkpoint(save(run, 1, Snapshot(tensors=named, state=state), 1))
    assert loaded.tensors.keys() == named.keys()
    assert all(same_bits(loaded.tensors[name], tensor) for name, tensor in named.items())
    assert repr(loaded.state) == repr(state)
    shutil.rmtree(run)


def test_tensors_may_share_memory_and_carry_gradients(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    shared = {"policy/embed": base, "policy/head": base, "policy/rows": base[1:], "policy/turned": base.T}
    loaded = read_checkpoint(save(tmp_path, 1, Snapshot(tensors=shared, state={}), 1))
    assert all(same_bits(loaded.tensors[name], tensor.detach()) for name, tensor in shared.items())
    loaded.tensors["policy/embed"].zero_()
    assert loaded.tensors["policy/head"].sum() == 66


def test_files_are_split_by_the_first_part_of_the_name(tmp_path: Path):
    named = {name: torch.ones(2) for name in ("policy/a", "optimizer/exp_avg/a", "optimizer/exp_avg_sq/a")}
    path = save(tmp_path, 20, Snapshot(tensors=named, state={"step": 20}), 1)
    assert path == tmp_path / "checkpoints" / "step-00000020"
    assert {file.name for file in path.iterdir()} == {"policy.safetensors", "optimizer.safetensors", "state.json"}
    assert json.loads((path / "state.json").read_text())["state"] == {"step": 20}
    assert load_file(path / "optimizer.safetensors").keys() == {"exp_avg/a", "exp_avg_sq/a"}
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1
    with pytest.raises(AssertionError, match="GROUP/NAME, got 'weight'"):
        save(tmp_path, 21, Snapshot(tensors={"weight": torch.ones(2)}, state={}), 1)
    assert names(tmp_path) == {path.name}


def test_only_the_newest_are_kept(tmp_path: Path):
    assert latest(tmp_path) is None
    for step in (5, 10, 15, 100):
        save(tmp_path, step, snapshot(step), 2)
    assert names(tmp_path) == {"step-00000015", "step-00000100"}
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-00000100"
    save(tmp_path, 7, snapshot(7), 1)
    assert names(tmp_path) == {"step-00000007", "step-00000100"}, "the one just written stays"


def test_the_same_step_is_replaced(tmp_path: Path):
    save(tmp_path, 5, snapshot(1), 2)
    path = save(tmp_path, 5, snapshot(2), 2)
    assert count_of(path) == 2
    assert names(tmp_path) == {"step-00000005"}


def test_leftovers_are_cleaned_and_a_replaced_one_is_put_back(tmp_path: Path):
    for step in (1, 2):
        save(tmp_path, step, snapshot(step), 3)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000002").rename(folder / ".replaced-step-00000002")
    shutil.copytree(folder / "step-00000001", folder / ".replaced-step-00000001")
    shutil.copytree(folder / "step-00000001", folder / ".partial-step-00000003")
    (folder / ".old-step-00000000").mkdir()
    newest = latest(tmp_path)
    assert newest is not None and count_of(newest) == 2
    save(tmp_path, 3, snapshot(3), 3)
    assert names(tmp_path) == {"step-00000001", "step-00000002", "step-00000003"}
    assert [count_of(path) for path in checkpoints(tmp_path).values()] == [1, 2, 3]


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path):
    path = save(tmp_path, 1, Snapshot(tensors={"policy/w": torch.ones(3)}, state={"rate": 0.5, "words": ["a"]}), 1)
    for file in path.iterdir():
        whole = file.read_bytes()
        for i in range(len(whole)):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
            with pytest.raises(UserError, match=file.name):
                read_checkpoint(path)
            file.write_bytes(whole[:i])
            with pytest.raises(UserError, match=file.name):
                read_checkpoint(path)
        file.write_bytes(whole)
        read_checkpoint(path)


def test_missing_files_are_named(tmp_path: Path):
    path = save(tmp_path, 1, snapshot(), 1)
    (path / "teacher.safetensors").unlink()
    message = rf"teacher\.safetensors: cannot be read: No such file.*delete {path} to continue"
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)
    with pytest.raises(UserError, match=r"none/state\.json: cannot be read"):
        read_checkpoint(tmp_path / "none")


def run_script(name: str, run: Path) -> dict[str, Any]:
    """Call a function of this file in a fresh process, where it may fork and kill, and return what it returns."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, name, run]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_before_any_step_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path):
    found = run_script("kill_everywhere", tmp_path)
    assert found["points"] > 30
    assert found["old"] > 10, "kills before the new checkpoint is in place"
    assert found["new"] > 3, "kills while the old one is removed"
    assert found["replaced"] == 1, "a kill between the two renames"


def test_kills_at_random_moments_leave_a_whole_checkpoint(tmp_path: Path):
    found = run_script("kill_at_random", tmp_path)
    assert found["saved"] > 5
    assert found["leftovers"] > 5, "kills in the middle of a save"


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path):
    assert run_script("fill_the_disk", tmp_path)["errors"] == 3
    assert names(tmp_path) == {"step-00000001"}
    assert count_of(tmp_path / "checkpoints" / "step-00000001") == 1


def kill_everywhere(run: Path) -> dict[str, int]:
    """Kill a save of step 2 over a step 2 and a step 1, before each of its file operations in turn."""
    found = {"points": 0, "old": 0, "new": 0, "replaced": 0}
    start = run / "start"
    start.mkdir()
    for step in (1, 2):
        save(start, step, snapshot(step), 2)
    while True:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        shutil.copytree(start / "checkpoints", run / "checkpoints")
        child = os.fork()
        if child == 0:
            _save_and_die(run, found["points"])
        if os.waitpid(child, 0)[1] == 0:
            return found
        found["points"] += 1
        newest = latest(run)
        assert newest is not None
        found["replaced"] += newest.name.startswith(".replaced")
        found["new" if count_of(newest) == 3 else "old"] += 1
        assert all(count_of(path) in (step, 3) for step, path in checkpoints(run).items())
        save(run, 3, snapshot(4), 1)
        assert names(run) == {"step-00000003"}


def _save_and_die(run: Path, calls: int) -> None:
    """Save over step 2, but die at a file operation."""
    Moment(str(run), "*", files=calls, number=signal.SIGKILL).install()
    save(run, 2, snapshot(3), 1)
    os._exit(0)


def kill_at_random(run: Path) -> dict[str, int]:
    """Kill processes that save again and again; what they finished must be there, complete and in order."""
    draw = random.Random(0)
    found = {"saved": 0, "leftovers": 0}
    confirmed = 1
    save(run, 0, snapshot(1, numel=50_000), 2)
    for _ in range(25):
        calls, (read, write) = draw.randrange(150), os.pipe()
        child = os.fork()
        if child == 0:
            Moment(str(run), "*", files=calls, number=signal.SIGKILL).install()
            for count in range(confirmed + 1, confirmed + 1000):
                save(run, count // 3, snapshot(count, numel=50_000), 2)
                os.write(write, f"{count} ".encode())
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            counts = [confirmed, *map(int, pipe.read().split())]
        newest = latest(run)
        assert newest is not None
        now = count_of(newest)
        assert now in (counts[-1], counts[-1] + 1)
        found["saved"] += now - confirmed
        confirmed = now
        found["leftovers"] += any(name.startswith(".") for name in names(run))
    return found


def fill_the_disk(run: Path) -> dict[str, int]:
    """Save more than a file may hold."""
    save(run, 1, snapshot(1), 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    big_state = Snapshot(tensors={}, state={"text": "x" * 200_000})
    errors = 0
    for step, large in [(2, snapshot(2, numel=50_000)), (1, snapshot(2, numel=50_000)), (2, big_state)]:
        try:
            save(run, step, large, 1)
        except RunError as error:
            assert str(error).endswith("cannot be written: File too large; the checkpoint of step 1 is intact")
            errors += 1
    return {"errors": errors}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))


@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}, {}], ids=["device", "fused", "plain"])
def test_optimizer_state_is_restored_where_the_optimizer_needs_it(options: dict[str, bool], tmp_path: Path):
    """AdamW counts its steps on the parameter's device where it is fused or capturable, elsewhere on the CPU."""
    trained = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = Saved(save(tmp_path, 1, Snapshot(tensors=local_state({"policy": trained}, optimizer), state={}), 1))
    target = torch.device("meta" if "capturable" in options else "cpu")
    twin = torch.nn.Linear(3, 2, device=target)
    other = torch.optim.AdamW(twin.parameters(), **options)
    load_state(saved, {"policy": twin}, other)
    for parameter, before in zip(twin.parameters(), trained.parameters(), strict=True):
        state, wanted = other.state[parameter], optimizer.state[before]
        assert {name: tensor.device for name, tensor in state.items()} == dict.fromkeys(wanted, target)
        if target.type == "cpu":
            assert all(torch.equal(state[name], wanted[name]) for name in wanted)
            assert torch.equal(parameter, before)
    if target.type == "cpu":
        twin(torch.ones(3)).sum().backward()
        other.step()
