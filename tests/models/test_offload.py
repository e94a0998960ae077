"""What leaves the device while thoughts are sampled comes back bit for bit, whatever happens on the way.

On a CPU nothing is moved in a run; these tests let it, between two buffers of host memory.
"""

import contextlib
import itertools
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from forethought.config import UserError, from_dict, merge
from forethought.models import offload
from forethought.models.offload import Offload
from forethought.models.sharding import local_shard
from forethought.rollout.native import NativeEngine
from forethought.run.folder import RunLog
from forethought.run.signals import Stopped
from forethought.run.trackers import Callbacks
from forethought.trainer import Trainer, resume, train
from helpers.moments import OffloadOnCPU, after_forwards
from helpers.runs import SLOW, assert_same_run, assert_same_tensors, begin, cut, drift, end, lines, options, words

ALL = {
    "model": {"precision": "bf16"},
    "method": {"kl_weight": 0.1, "inner_steps": 2, "teacher_every": 2},
    "train": {"steps": 4},
    "evaluate": {"path": "world:cups/heldout", "documents": 2},
}
"""Weights leave beside their bf16 copy, a reference too; the teacher is not always needed."""


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is on a CPU be moved."""
    monkeypatch.setattr(offload, "DEVICES", ("cpu", "cuda"))


def on(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The same run with update.offload, in another folder."""
    return merge(values, {"update": {"offload": True}, "run": str(Path(values["run"]).with_name(name))})


class Setting:
    """Two networks, of which one is tied, and an optimizer that has taken a step."""

    def __init__(self) -> None:
        self.networks = [torch.nn.Linear(3, 4), torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(2)])]
        self.networks[1][1].weight = self.networks[1][0].weight
        trained = self.networks[0].parameters()
        self.optimizer = torch.optim.AdamW(trained, lr=0.1)
        self.offload = Offload(torch.device("cpu"), self.networks, self.optimizer)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {f"{i}/{name}": one for i, each in enumerate(self.networks) for name, one in each.named_parameters()}
        moments = [one for values in self.optimizer.state.values() for one in values.values() if one.dim()]
        return found | {f"moment {i}": one for i, one in enumerate(moments)}

    def step(self) -> None:
        self.offload.settle()
        self.networks[0](torch.ones(2, 3)).sum().backward()
        self.optimizer.step()
        self.offload.start()

    def copies(self) -> dict[str, torch.Tensor]:
        return {name: one.detach().clone() for name, one in self.tensors().items()}

    def held(self) -> int:
        """Bytes of all storages."""
        found = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in self.tensors().values()}
        return sum(found.values())


def test_all_of_it_leaves_and_comes_back_as_it_is_then():
    """Before the first step there are no moments; later ones are those of the last step, copied or not."""
    one = Setting()
    for _ in range(3):
        before, objects, size = one.copies(), one.tensors(), one.held()
        for _ in range(2):  # the second time nothing is copied to the host
            with one.offload.away():
                assert one.held() == 0 < size
            assert one.held() == size
            assert_same_tensors(one.copies(), before)
        assert all(each is objects[name] for name, each in one.tensors().items())
        one.step()
    assert len(one.tensors()) == 5 + 4


def test_an_unchanged_copy_is_not_made_again_and_a_changed_one_is(monkeypatch: pytest.MonkeyPatch):
    one, made = Setting(), list[int]()
    start = one.offload.start
    monkeypatch.setattr(one.offload, "start", lambda: made.append(1) or start())
    for _ in range(3):
        with one.offload.away():
            pass
    assert len(made) == 1
    one.offload.ready()  # as for a checkpoint
    with one.offload.away():
        pass
    assert len(made) == 1
    one.offload.settle()
    with torch.no_grad():
        one.networks[0].weight.add_(1)
    before = one.copies()
    with one.offload.away():
        pass
    assert len(made) == 2
    assert_same_tensors(one.copies(), before)


class Stream:
    """A stream that notes what it waits for, and what is allocated then."""

    device = torch.device("cpu")

    def __init__(self, name: str, one: Setting, said: list[str]):
        self.name, self.one, self.said = name, one, said

    def wait_stream(self, other: "Stream") -> None:
        self.said.append(f"{self.name} waits, {'all' if self.one.held() else 'nothing'} is allocated")

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self.said.append("copy")
        yield
        self.said.append("copied")


@pytest.mark.parametrize("steps", [0, 1])
def test_nothing_is_freed_before_it_is_copied_or_copied_before_it_is_allocated(
    monkeypatch: pytest.MonkeyPatch, steps: int
):
    """And only moments, where there are any, come back later. `main` is the stream of all else, `side` of copies."""
    one, said = Setting(), list[str]()
    for _ in range(steps):
        one.step()
    main, side = (Stream(name, one, said) for name in ("main", "side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", Stream.current)
    monkeypatch.setattr(one.offload, "_stream", side)
    one.offload.settle()
    said.clear()
    copy, wait = ["side waits, all is allocated", "copy", "copied"], "main waits, all is allocated"
    with one.offload.away():
        assert said == [*copy, wait]
        said.clear()
    assert said == [*copy, wait, *copy, *[wait] * (steps == 0)]  # weights, then moments
    said.clear()
    one.offload.settle()
    assert said[-1] == wait


def interrupted(lines: int, act: Any) -> bool:
    """Whether `act` was interrupted at the `lines`-th line of the module that it runs."""
    left = lines

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != offload.__file__:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)


def test_a_signal_at_any_line_loses_nothing():
    def sample() -> None:
        with one.offload.away():
            assert one.held() == 0

    for copied in (True, False):  # to the host before
        count, stopped = 0, True
        while stopped:
            one = Setting()
            one.step()
            with one.offload.away():
                pass
            one.step()
            if not copied:
                one.offload.settle()
                for tensor in one.tensors().values():
                    tensor.data.add_(1)
            before = one.copies()
            count += 1
            stopped = interrupted(count, sample)
            one.offload.back()
            sample()
            assert_same_tensors(one.copies(), before)
        assert count > 100  # lines at which it was stopped


def test_memory_that_is_still_in_use_is_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    """What decoding held when it failed is let go, and where that is not enough, `settle` tries again."""
    one = Setting()
    before = one.copies()
    held: list[Any] = []

    def decode() -> None:
        buffers = torch.zeros(3)
        held.append(weakref.ref(buffers))
        raise torch.OutOfMemoryError("no memory")

    back, freed = one.offload.back, list[bool]()

    def first() -> None:
        freed.append(held[0]() is None)
        raise torch.OutOfMemoryError("still none")

    monkeypatch.setattr(one.offload, "back", first)
    with pytest.raises(torch.OutOfMemoryError, match="still none"), one.offload.away():
        decode()
    assert freed == [True]
    assert one.held() == 0
    monkeypatch.setattr(one.offload, "back", back)
    one.offload.settle()
    assert_same_tensors(one.copies(), before)


def test_too_little_host_memory_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory\nCompile with more")

    one = Setting()
    monkeypatch.setattr(torch, "empty_like", refuse)
    with pytest.raises(UserError) as error:
        one.offload.start()
    assert str(error.value) == (
        "update.offload = True: 0.0 GB more of host memory cannot be pinned (CUDA error: out of memory)"
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The options of a finished run that moves nothing."""
    values = options(tmp_path_factory.mktemp("plain"), "plain", **merge(ALL, {"train": {"keep_checkpoints": 9}}))
    train(from_dict(values))
    return values


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone, which is enough to shard."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def observed(values: dict[str, Any]) -> tuple[list[set[int]], dict[str, int]]:
    """Train; bytes that weights, teacher, reference and moments have while thoughts are sampled, and all they have."""
    config = from_dict(values)
    trainer, seen = Trainer(config), list[set[int]]()
    engine = trainer.engine.engine
    sample = engine.sample

    def sizes() -> dict[str, int]:
        networks = {"weights": trainer.network.weights, **trainer.method.state()}
        found = {name: [*one.parameters()] for name, one in networks.items()}
        state = trainer.optimizer.state.values()
        found["moments"] = [one for each in state for one in each.values() if one.dim()]
        return {name: sum(local_shard(one).untyped_storage().nbytes() for one in some) for name, some in found.items()}

    def watched(*arguments: Any) -> Any:
        seen.append(set(sizes().values()))
        return sample(*arguments)

    def settled() -> None:
        called.append("settle")
        settle()

    def stepped() -> None:
        called.append("step")
        step()

    engine.sample = watched
    assert trainer.offload is not None
    called, settle, step = list[str](), trainer.offload.settle, trainer.optimizer.step
    trainer.offload.settle, trainer.optimizer.step = settled, stepped
    trainer.run(RunLog.create(config), Callbacks())
    assert all(before == "settle" for before, each in itertools.pairwise(called) if each == "step")
    return seen, sizes()


@pytest.mark.usefixtures("moves")
def test_a_run_ends_with_the_same_bits(plain: dict[str, Any]):
    values = on(plain, "moved")
    seen, sizes = observed(values)
    assert sizes.keys() == {"weights", "teacher", "reference", "moments"}
    assert min(sizes.values()) > 0
    assert len(seen) > 4
    assert all(each == {0} for each in seen)
    assert_same_run(Path(values["run"]), Path(plain["run"]))


def test_on_a_cpu_nothing_is_moved(plain: dict[str, Any]):
    assert Trainer(from_dict(on(plain, "still"))).offload is None


@pytest.mark.usefixtures("moves")
@pytest.mark.parametrize("kind", ["fp32", "lora", "zero1"])
def test_weights_that_sample_stay(kind: str, tmp_path: Path):
    """In fp32 those that are trained; not the factors of adapters, which are copied into the model, nor shards."""
    changes = {"fp32": {}, "lora": {"lora": {"r": 2}}, "zero1": {"parallel": {"shard": "zero1"}}}[kind]
    one = options(tmp_path, "run", **merge({"train": {"steps": 3}}, changes))
    with one_process():
        train(from_dict(one))
        seen, sizes = observed(on(one, "moved"))
    assert all(each == ({0, sizes["weights"]} if kind == "fp32" else {0}) for each in seen)
    assert_same_run(tmp_path / "run", tmp_path / "moved")


def test_supervised_text_needs_no_room_for_thoughts(tmp_path: Path, moves: None):
    values = options(tmp_path, "text", method={"name": "cpt", "unclosed": "score"}, update={"offload": True})
    assert Trainer(from_dict(values)).offload is None


@pytest.mark.usefixtures("moves")
def test_a_run_that_is_stopped_while_it_samples_continues_with_the_same_bits(plain: dict[str, Any]):
    """Saved while all of it is away; resumed with and without."""
    values = on(plain, "stopped")
    stopped = []

    def stop() -> None:
        stopped.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

    collect = Trainer._collect

    def watched(self: Trainer, windows: Any, number: int) -> Any:
        if number == 3:
            after_forwards(1, stop)
        return collect(self, windows, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="saved after step 2"):
        patch.setattr(Trainer, "_collect", watched)
        train(from_dict(values))
    resume(values["run"])
    assert_same_run(Path(values["run"]), Path(plain["run"]))
    run = cut(Path(plain["run"]), "resumed", 2)
    resume(run, config=from_dict(on(plain, "resumed")))
    assert_same_run(run, Path(plain["run"]))


@pytest.mark.usefixtures("moves")
def test_out_of_memory_while_sampling_saves_what_was_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Even where there is no memory to bring it back to, until the error is handled."""
    values = options(tmp_path, "whole", train={"steps": 3, "checkpoint_every": 9})
    train(from_dict(values))
    other, failed, back = on(values, "halved"), list[str](), Offload.back

    def fail() -> None:
        failed.append("sampling")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def second(self: Offload) -> None:
        if failed == ["sampling"]:
            failed.append("back")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        back(self)

    monkeypatch.setattr(Offload, "back", second)
    sample = NativeEngine.sample

    def third(self: NativeEngine, *arguments: Any) -> Any:
        if len(calls) == 2:
            after_forwards(1, fail)
        calls.append(1)
        return sample(self, *arguments)

    calls: list[int] = []
    monkeypatch.setattr(NativeEngine, "sample", third)
    assert train(from_dict(other))["steps"] == 3
    assert failed == ["sampling", "back"]
    assert RunLog.open(Path(other["run"])).config().train.rollout_batch == 63
    assert drift(Path(other["run"]), Path(values["run"])) < 1e-5


@pytest.mark.slow
@pytest.mark.distributed
def test_shards_of_two_processes_end_with_the_same_bits(tmp_path: Path, processes: ForkServerContext):
    changes = merge(SLOW, {"parallel": {"shard": "zero1"}, "train": {"steps": 3, "batch": 8}})
    values = options(tmp_path, "plain", **merge(changes, {"model": {"precision": "bf16"}}))
    for one in (values, on(values, "moved")):
        moments = {rank: OffloadOnCPU(run=one["run"]) for rank in range(2)}
        assert end(begin(processes, words(one), tmp_path, 2, moments)) == [0, 0], lines(tmp_path)
    assert_same_run(tmp_path / "plain", tmp_path / "moved")
