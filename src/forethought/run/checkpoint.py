"""Checkpoints that a kill cannot break: written beside, checked by size and checksum, put in place by one rename.

    RUN/checkpoints/step-00000020/policy.safetensors, teacher.safetensors, ..., state.json

No pickle: tensors are safetensors files, one per first part of their names; everything else is JSON. Of several
processes each writes the rows that it keeps, such as policy.1-of-4.safetensors; any number of them can read that back.
"""

import json
import os
import re
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from forethought.config import UserError
from forethought.run import distributed
from forethought.run.folder import checkpoints, disk_errors, sync


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a run needs to go on as if it had never stopped.

    `tensors` has names of at least two parts, such as `policy/model.norm.weight` or `optimizer/exp_avg/lm_head.weight`;
    the first is the file they go to. Of several processes each holds its rows of tensors that are dealt over them, in
    their order, and the first one all others. `state` holds what JSON can: text keys, lists and no tuples.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(run: Path, step: int, snapshot: Snapshot, keep: int) -> Path:
    """Write the checkpoint of a step, then remove all but the `keep` newest; the one just written always stays.

    Several processes save together, into a folder that all of them see.

    A kill at any moment leaves every earlier checkpoint whole; what it left half done is removed by the next save.
    The disk needs room for keep + 1 checkpoints. Tensors may share memory: each name is written out by itself.

    Raises:
        RunError: the disk is full or failing; earlier checkpoints are intact.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{step:08}"
    partial = folder / f".partial-{final.name}"
    with disk_errors(run, final):
        distributed.run_on_rank0(lambda: _begin(run, partial))
        try:
            alone = sum(distributed.all_gather(bool(snapshot.tensors))) < 2
            files = distributed.run_on_all_ranks(lambda: _write(run, partial, snapshot.tensors, alone))
            every = {stem: print for some in distributed.all_gather(files) for stem, print in (some or {}).items()}
            distributed.run_on_rank0(lambda: _seal(run, partial, {"state": snapshot.state, "files": every}))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        distributed.run_on_rank0(lambda: _finish(run, partial, final, keep))
    return final


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None. It is there whole, but only `load` reads it through."""
    return next(reversed(checkpoints(run).values()), None)


def load(path: Path, only: str = "") -> Snapshot:
    """Read a checkpoint back, on the CPU, bit for bit and with every dtype as it was saved.

    `only` names one part, such as `teacher`: the others are neither read nor checked. One that is not there is empty.

    Raises:
        UserError: a file is missing, cut off or altered; the message names it.
    """
    saved = Saved(path, only)
    return Snapshot(tensors={name: saved.tensor(name) for name in saved.names}, state=saved.state)


class Saved:
    """A checkpoint on disk, of which tensors are read one by one, whole or some rows of them."""

    def __init__(self, path: Path, only: str = "", check: bool = True):
        """Open it; with `check` all files are read through. Raises UserError as `load` does."""
        record = _read_record(path / "state.json")
        self.state: dict[str, Any] = record["state"]
        self._pieces: dict[str, list[tuple[Any, str]]] = defaultdict(list)  # files that hold a tensor, in row order
        for stem in sorted(record["files"], key=_turn):
            group, file = stem.partition(".")[0], path / f"{stem}.safetensors"
            if only and group != only:
                continue
            if check:
                _check(file, record["files"][stem])
            opened = safe_open(file, framework="pt")
            for name in opened.keys():  # noqa: SIM118
                self._pieces[f"{group}/{name}"].append((opened, name))

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        shapes = [opened.get_slice(inner).get_shape() for opened, inner in self._pieces[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, on the CPU, or some of its rows."""
        pieces = self._pieces[name]
        if rows is None:
            parts = [opened.get_tensor(inner) for opened, inner in pieces]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        parts, start = [], 0
        for opened, inner in pieces:
            piece = opened.get_slice(inner)
            end = start + piece.get_shape()[0]
            if rows.start < end and start < rows.stop:
                parts.append(piece[max(rows.start, start) - start : min(rows.stop, end) - start])
            start = end
        return torch.cat(parts) if parts else pieces[0][0].get_tensor(pieces[0][1])[:0]


def _turn(stem: str) -> tuple[str, int]:
    """Files in the order of their rows: policy.10-of-16 comes after policy.9-of-16."""
    group, _, which = stem.partition(".")
    return group, int(which.partition("-")[0] or 0)


def _check(file: Path, expected: dict[str, int]) -> None:
    try:
        found = _fingerprint(file)
    except OSError as error:
        raise _broken(file, f"cannot be read: {error.strerror}") from None
    if found["bytes"] != expected["bytes"]:
        raise _broken(file, f"holds {found['bytes']} bytes instead of {expected['bytes']}")
    if found["crc32"] != expected["crc32"]:
        raise _broken(file, "its checksum is wrong")


def _begin(run: Path, partial: Path) -> None:
    """An empty folder beside the checkpoints."""
    with disk_errors(run, partial):
        partial.parent.mkdir(exist_ok=True)
        sync(run)
        _tidy(run)
        partial.mkdir()


def _write(run: Path, folder: Path, named: dict[str, Tensor], alone: bool) -> dict[str, dict[str, int]]:
    """This process's files, and what they must be found to hold; `alone`: no other process writes."""
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in named.items():
        group, slash, rest = name.partition("/")
        assert slash, f"the name of a tensor is GROUP/NAME, got {name!r}"
        groups[group][rest] = tensor
    files = {}
    for group, tensors in groups.items():
        stem = group if alone else f"{group}.{distributed.rank()}-of-{distributed.world_size()}"
        file = folder / f"{stem}.safetensors"
        with disk_errors(run, file):
            _save_tensors(file, tensors)
            sync(file)
            files[stem] = _fingerprint(file)
    return files


def _seal(run: Path, folder: Path, record: dict[str, Any]) -> None:
    """Write state.json, which makes the folder a checkpoint."""
    state = folder / "state.json"
    with disk_errors(run, state):
        state.write_text(json.dumps({"crc32": _checksum(record), **record}), encoding="utf-8")
        for file in folder.iterdir():
            shutil.copymode(state, file)  # safetensors lets nobody but the owner read its files
        sync(state)
        sync(folder)


def _finish(run: Path, partial: Path, final: Path, keep: int) -> None:
    """Put the folder in its place, and remove older ones."""
    with disk_errors(run, final):
        _put(partial, final)
        stale = [path for path in list(checkpoints(run).values())[:-keep] if path != final]
        for path in stale:
            path.rename(final.with_name(f".old-{path.name}"))
        _tidy(run)


def _save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file, whose errors of the disk become OSError again."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    with tensor_errors(file):
        save_file(separate, file)


@contextmanager
def tensor_errors(file: Path) -> Iterator[None]:
    """Make what safetensors and tokenizers raise when a disk refuses `file` an OSError again, for `disk_errors`."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing narrower
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from error


def _put(partial: Path, final: Path) -> None:
    """Move a finished folder to its place; see `runlog.checkpoints` for a kill between the first two renames."""
    replaced = final.with_name(f".replaced-{final.name}")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    if replaced.exists():
        replaced.rename(final.with_name(f".old-{final.name}"))
    sync(final.parent)


def _tidy(run: Path) -> None:
    """Finish what a killed save left: put a replaced checkpoint back where the new one is missing, remove the rest."""
    whole = set(checkpoints(run).values())
    for path in (run / "checkpoints").glob(".*-step-*"):
        if path in whole:
            path.rename(path.with_name(path.name.removeprefix(".replaced-")))
        else:
            shutil.rmtree(path)


def _fingerprint(file: Path) -> dict[str, int]:
    """Size and checksum of a file, read piece by piece."""
    size = checksum = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            size += len(piece)
            checksum = zlib.crc32(piece, checksum)
    return {"bytes": size, "crc32": checksum}


def _checksum(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        checksum = record.pop("crc32")
        whole = checksum == _checksum(record)
    except OSError as error:
        raise _broken(file, f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError):
        raise _broken(file, "is not the JSON that was written") from None
    if not whole:
        raise _broken(file, "its checksum is wrong")
    return record


def _broken(file: Path, what: str) -> UserError:
    return UserError(f"checkpoint file {file}: {what}; delete {file.parent} to go on from an older checkpoint")
