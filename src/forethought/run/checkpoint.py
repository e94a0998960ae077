"""Checkpoints that survive a kill at any moment: written to a temporary folder, checksummed, put in place by a rename.

    RUN/checkpoints/step-00000020/policy.safetensors, teacher.safetensors, ..., state.json

No pickle: tensors are in safetensors files, one per first part of their names; everything else is JSON. Each rank
writes its shard, such as policy.1-of-4.safetensors; any number of ranks can read that back.
"""

import json
import os
import re
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from forethought.config import UserError
from forethought.run import distributed
from forethought.run.folder import checkpoints, disk_errors, sync


def save(run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step, then remove all but the `keep` newest; the one just written always stays.

    Names of `tensors` have at least two parts, such as `policy/model.norm.weight`; the first is the file. Each rank
    has its rows of sharded tensors, in the order of ranks, and rank 0 all others. `state` is JSON: string keys, lists,
    no tuples.

    All ranks call it together and see the same folder. A kill at any moment leaves earlier checkpoints intact; the next
    save removes what it left incomplete. The disk needs space for keep + 1 checkpoints. Tensors may share memory.

    Raises:
        RunError: the disk is full or failing; earlier checkpoints are intact.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{step:08}"
    partial = folder / f".partial-{final.name}"
    with disk_errors(run, final):
        distributed.run_on_rank0(lambda: _make_empty(run, partial))
        try:
            sharded = sum(distributed.all_gather(bool(tensors))) > 1
            files = distributed.run_on_all_ranks(lambda: _write_tensors(partial, tensors, sharded))
            gathered = {stem: entry for some in distributed.all_gather(files) for stem, entry in some.items()}
            distributed.run_on_rank0(lambda: _write_state(partial, {"state": state, "files": gathered}))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        distributed.run_on_rank0(lambda: _finish(run, partial, final, keep))
    return final


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None. Its files are complete, but not verified."""
    return next(reversed(checkpoints(run).values()), None)


class Saved:
    """A checkpoint on disk, whose tensors are read one by one, on the CPU, in full or some of their rows."""

    def __init__(self, path: Path, only: str = "", check: bool = True):
        """Open it, and with `check` verify all files. Raises UserError that names a missing or altered one.

        `only` names one part, such as `teacher`, to read and verify; a part that does not exist is empty.
        """
        record = _read_record(path / "state.json")
        self.path, self.state = path, record["state"]
        self._shards: dict[str, list[tuple[Any, str]]] = defaultdict(list)  # files with rows of a tensor, in row order
        for stem in sorted(record["files"], key=_shard_order):
            group, file = stem.partition(".")[0], path / f"{stem}.safetensors"
            if only and group != only:
                continue
            if check:
                _check(file, record["files"][stem])
            opened = safe_open(file, framework="pt")
            for name in opened.keys():  # noqa: SIM118
                self._shards[f"{group}/{name}"].append((opened, name))
        self.names = list(self._shards)  # of all tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a full tensor."""
        shapes = [opened.get_slice(inner).get_shape() for opened, inner in self._shards[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A full tensor on the CPU, or some of its rows."""
        shards = self._shards[name]
        if rows is None:
            parts = [opened.get_tensor(inner) for opened, inner in shards]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        parts, start = [], 0
        for opened, inner in shards:
            shard = opened.get_slice(inner)
            end = start + shard.get_shape()[0]
            if rows.start < end and start < rows.stop:
                parts.append(shard[max(rows.start, start) - start : min(rows.stop, end) - start])
            start = end
        return torch.cat(parts) if parts else shards[0][0].get_tensor(shards[0][1])[:0]


def _shard_order(stem: str) -> tuple[str, int]:
    """Sorts policy.10-of-16 after policy.9-of-16."""
    group, _, shard = stem.partition(".")
    return group, int(shard.partition("-")[0] or 0)


def _check(file: Path, expected: dict[str, int]) -> None:
    try:
        found = _fingerprint(file)
    except OSError as error:
        raise _broken(file, f"cannot be read: {error.strerror}") from None
    if found["bytes"] != expected["bytes"]:
        raise _broken(file, f"holds {found['bytes']} bytes instead of {expected['bytes']}")
    if found["crc32"] != expected["crc32"]:
        raise _broken(file, "its checksum is wrong")


def _make_empty(run: Path, partial: Path) -> None:
    """Make an empty temporary folder beside the checkpoints."""
    partial.parent.mkdir(exist_ok=True)
    sync(run)
    _tidy(run)
    partial.mkdir()


def _write_tensors(folder: Path, named: dict[str, Tensor], sharded: bool) -> dict[str, dict[str, int]]:
    """Write the files of this rank; their sizes and checksums."""
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in named.items():
        group, slash, rest = name.partition("/")
        assert slash, f"the name of a tensor is GROUP/NAME, got {name!r}"
        groups[group][rest] = tensor
    files = {}
    for group, tensors in groups.items():
        stem = f"{group}.{distributed.rank()}-of-{distributed.world_size()}" if sharded else group
        file = folder / f"{stem}.safetensors"
        with tensor_errors(file):
            save_file(_separate(tensors), file)
        sync(file)
        files[stem] = _fingerprint(file)
    return files


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none of which shares memory with another."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    return separate


def _write_state(folder: Path, record: dict[str, Any]) -> None:
    """Write state.json, which completes the checkpoint."""
    state = folder / "state.json"
    state.write_text(json.dumps({"crc32": _checksum(record), **record}), encoding="utf-8")
    for file in folder.iterdir():
        shutil.copymode(state, file)  # safetensors makes its files readable for the owner only
    sync(state)
    sync(folder)


def _finish(run: Path, partial: Path, final: Path, keep: int) -> None:
    """Put the folder in place and remove older checkpoints; `folder.checkpoints` handles a kill between the renames."""
    replaced = final.with_name(f".replaced-{final.name}")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    if replaced.exists():
        replaced.rename(final.with_name(f".old-{final.name}"))
    sync(final.parent)
    for path in list(checkpoints(run).values())[:-keep]:
        if path != final:
            path.rename(final.with_name(f".old-{path.name}"))
    _tidy(run)


@contextmanager
def exported(run: Path) -> Iterator[Path]:
    """A new folder for the trained model, which becomes RUN/policy when all is written. Raises RunError."""
    partial, final = run / ".policy-partial", run / "policy"
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors(run, partial), tensor_errors(partial):
        partial.mkdir()
        yield partial
        for file in partial.rglob("*.safetensors"):
            shutil.copymode(partial / "config.json", file)  # safetensors lets nobody but the owner read its files
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


@contextmanager
def tensor_errors(file: Path) -> Iterator[None]:
    """Turn what safetensors and tokenizers raise for a full or failing disk into OSError, for `disk_errors`."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing narrower
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from error


def _tidy(run: Path) -> None:
    """Clean up after a killed save: restore a replaced checkpoint whose successor is missing, remove the rest."""
    valid = set(checkpoints(run).values())
    for path in (run / "checkpoints").glob(".*-step-*"):
        if path in valid:
            path.rename(path.with_name(path.name.removeprefix(".replaced-")))
        else:
            shutil.rmtree(path)


def _fingerprint(file: Path) -> dict[str, int]:
    """Size and checksum of a file."""
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
        return {"bytes": stream.tell(), "crc32": checksum}


def _checksum(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        intact = record.pop("crc32") == _checksum(record)
    except OSError as error:
        raise _broken(file, f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError):
        raise _broken(file, "is not the JSON that was written") from None
    if not intact:
        raise _broken(file, "its checksum is wrong")
    return record


def _broken(file: Path, what: str) -> UserError:
    return UserError(f"checkpoint file {file}: {what}; delete {file.parent} to continue from an older checkpoint")
