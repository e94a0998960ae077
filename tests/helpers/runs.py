"""Small runs: their options, starting them in processes, and comparing what came out."""

import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import NemotronHConfig

from forethought.cli import main
from forethought.config import merge
from forethought.models.loading import EMBEDDED
from forethought.run.checkpoint import Saved
from forethought.run.folder import checkpoints, read_lines
from helpers.moments import Moment

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}


def options(tmp_path: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A run of a fraction of a second a step, in which every network and every moment of Adam moves."""
    architecture = tmp_path / "architecture"
    architecture.mkdir(exist_ok=True)
    small = json.loads((EMBEDDED["embedded"] / "config.json").read_text()) | SMALL
    (architecture / "config.json").write_text(json.dumps(small))
    values = {
        "run": str(tmp_path / name),
        "model": {"path": str(architecture), "tokenizer": "embedded", "init": "random"},
        "corpus": {"window": 48, "shuffle": 16},
        "method": {"group": 3, "thought_length": 4, "positions": 2, "ema": 0.9, "unclosed": "penalize"},
        "optim": {"learning_rate": 1e-2, "schedule": "cosine", "warmup": 2, "weight_decay": 0.01},
        "train": {"steps": 6, "batch": 4, "checkpoint_every": 1},
        "update": {"tokens_per_chunk": 48},
    }
    return merge(values, changes)


def words(values: dict[str, Any]) -> list[str]:
    """The command line with the same options, over an empty config file."""
    empty = Path(values["run"]).with_suffix(".toml")
    empty.write_text("")
    flat = [(name, value) for name, value in values.items() if not isinstance(value, dict)]
    flat += [
        (f"{section}.{k}", v) for section, some in values.items() if isinstance(some, dict) for k, v in some.items()
    ]
    return ["train", str(empty), *[f"--{name}={value}" for name, value in flat]]


def figures(run: Path) -> list[dict[str, Any]]:
    """The metrics that a run logged, without times."""
    rows = read_lines(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit-identical: metrics, thoughts, the last checkpoint, and the trained model."""
    assert figures(one) == figures(other)
    assert (one / "thoughts.jsonl").read_text() == (other / "thoughts.jsonl").read_text()
    assert_same_tensors(load_file(one / "policy/model.safetensors"), load_file(other / "policy/model.safetensors"))
    ends = [read_checkpoint(list(checkpoints(run).values())[-1]) for run in (one, other)]
    assert_same_tensors(ends[0].tensors, ends[1].tensors)
    assert ends[0].state["cursor"] == ends[1].state["cursor"]
    assert not [path.name for path in (one / "checkpoints").iterdir() if not path.name.startswith("step-")]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def read_checkpoint(path: Path, only: str = "") -> Snapshot:
    """All of a checkpoint, or one part of it."""
    saved = Saved(path, only)
    return Snapshot(tensors={name: saved.tensor(name) for name in saved.names}, state=saved.state)


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() != set()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start with everything imported, in a fraction of a second."""
    context = multiprocessing.get_context("forkserver")
    os.environ["OMP_NUM_THREADS"] = "1"
    loaded = [
        "__main__",
        "pytest",
        "forethought.cli",
        "forethought.trainer",
        "transformers.models.qwen3.modeling_qwen3",
    ]
    context.set_forkserver_preload(loaded)
    return context


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "policy" / "model.safetensors")


def drift(one: Path, other: Path) -> float:
    """Largest difference between the final weights of two runs."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())


def mean_drift(one: Path, other: Path) -> float:
    """Mean difference between the final weights of two runs."""
    ours, theirs = weights(one), weights(other)
    gaps = torch.cat([(tensor - theirs[name]).abs().flatten() for name, tensor in ours.items()])
    return float(gaps.mean())


MAXIMUM, MEAN = 1e-4, 1e-7  # drift of weights over a run: rounding, which Adam's first steps turn into parts of a step
HANG_S = 900.0  # a process that takes longer hangs

SLOW = {"optim": {"learning_rate": 1e-3, "schedule": "constant"}}


def work(command: list[str], environment: dict[str, str], errors: Path, moment: Moment | None) -> None:
    """The body of a process, as torchrun would start it: the command line, with stderr in a file."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    if moment is not None:
        moment.install()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(main(command))


def environments(count: int) -> list[dict[str, str]]:
    """What a launcher sets for each of several ranks; nothing for one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)]
    return ranks if count > 1 else [{}]


def begin(
    processes: ForkServerContext,
    command: list[str],
    folder: Path,
    count: int = 2,
    moments: Mapping[int, Moment] = MappingProxyType({}),
) -> list[Any]:
    """Start a command on several ranks, some of which wait for a moment. The stderr of a rank goes to `errors-RANK`."""
    ranks = enumerate(environments(count))
    return [start(processes, command, one, folder / f"errors-{rank}", moments.get(rank)) for rank, one in ranks]


def start(
    processes: ForkServerContext, command: list[str], environment: dict[str, str], errors: Path, moment: Moment | None
) -> Any:
    """Start a command in one process."""
    process = processes.Process(target=work, args=(command, environment, errors, moment))
    process.start()
    return process


def end(started: Sequence[Any]) -> list[int]:
    """The exit codes of all of them; none is left behind."""
    limit = time.monotonic() + HANG_S
    try:
        for process in started:
            process.join(max(0.0, limit - time.monotonic()))
        return [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()


def lines(folder: Path, count: int = 2) -> list[str]:
    """The errors that the ranks printed, without progress bars and warnings."""
    printed = [line for rank in range(count) for line in (folder / f"errors-{rank}").read_text().splitlines()]
    return [line for line in printed if line.startswith("forethought")]


def together(processes: ForkServerContext, values: dict[str, Any], count: int = 2) -> Path:
    """Train on several ranks."""
    run = Path(values["run"])
    assert end(begin(processes, words(values), run.parent, count)) == [0] * count, lines(run.parent, count)
    return run


def cut(run: Path, name: str, step: int) -> Path:
    """A copy of a finished run, as a kill after the checkpoint of a step would have left it."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    for path in (copy / "summary.json", copy / "evaluation-after.json"):
        path.unlink(missing_ok=True)
    shutil.rmtree(copy / "policy")
    for number, path in checkpoints(copy).items():
        if number > step:
            shutil.rmtree(path)
    return copy


def hybrid(folder: Path) -> Path:
    """Mamba, MLP and attention layers, as in Nemotron-H, for the embedded tokenizer."""
    vocabulary = json.loads((EMBEDDED["embedded"] / "config.json").read_text())["vocab_size"]
    NemotronHConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        ssm_state_size=8,
        mamba_num_heads=3,  # so that rows do not divide evenly by two processes
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=4,
        mamba_proj_bias=False,
        max_position_embeddings=256,
    ).save_pretrained(folder)
    return folder


def settings(tmp_path: Path, name: str, kind: str, **changes: Any) -> dict[str, Any]:
    common = merge(SLOW, {"train": {"steps": 4, "batch": 8, "keep_checkpoints": 9, "log_thoughts": 3}})
    common = merge(common, {"evaluate": {"path": "world:cups/heldout", "documents": 6}})
    if kind == "hybrid":
        common["model"] = {"path": str(hybrid(tmp_path / "hybrid"))}
    return merge(options(tmp_path, name), merge(common, changes))


def assert_same_trajectory(one: Path, other: Path) -> None:
    """Equal up to rounding: weights, metrics, thoughts, evaluation."""
    assert drift(one, other) < MAXIMUM
    assert mean_drift(one, other) < MEAN
    for row, same in zip(figures(one), figures(other), strict=True):
        assert row == pytest.approx(same, abs=1e-4)
    for row, same in zip(read_lines(one / "thoughts.jsonl"), read_lines(other / "thoughts.jsonl"), strict=True):
        assert (row["step"], row["number"], row["position"]) == (same["step"], same["number"], same["position"])
        assert [member["text"] for member in row["thoughts"]] == [member["text"] for member in same["thoughts"]]
    before = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    kept = [{name: value for name, value in some.items() if name != "seconds"} for some in before]
    assert kept[0] == pytest.approx(kept[1], abs=1e-4)
