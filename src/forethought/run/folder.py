"""The run folder: the interface between training and everything after it. Reading it does not import torch.

    RUN/config.json      every option of the run
    RUN/metrics.jsonl    one line per logged step: {"step": 20, "reward/mean": 0.31, ...}
    RUN/thoughts.jsonl   one line per logged thought, each with its "step"
    RUN/warnings.jsonl   one line per warning of the diagnostics; missing if there was none
    RUN/summary.json     the results
    RUN/checkpoints/     see checkpoint.py
    RUN/policy/          the trained model, as a Hugging Face folder; README.md is its card
    RUN/report.html
    RUN/.lock            locked while a process trains in the folder

JSON has no NaN and no infinity: non-finite values are left out of their line (null inside a list).
"""

import errno
import fcntl
import gzip
import io
import json
import math
import os
import re
import reprlib
import shutil
import socket
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import glob
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, Literal

from forethought.config import Config, Notice, RunError, UserError, from_dict, to_dict
from forethought.run import __version__

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP}  # network file systems that cannot sync a folder
_HELD: dict[Path, BinaryIO] = {}
"""The lock files that this process has open, by run folder."""
_STEP = re.compile(r"(?:\.replaced-)?step-(\d+)")


@dataclass(frozen=True, slots=True)
class RunLog:
    """One run folder. `path` is its current location, which differs from `config().run` if it was moved."""

    path: Path

    @classmethod
    def create(cls, config: Config) -> "RunLog":
        """Make the folder `config.run` and write config.json into it.

        Raises:
            UserError: the path is a file, not writable, in use by another process, or a folder that is not empty.
                With `config.overwrite` a folder with a Forethought run is emptied first, unless what the new run reads
                is in it.
            RunError: the disk is full.
        """
        run = cls(Path(config.run))
        try:
            check_free(run.path, config.overwrite)
            run.path.mkdir(parents=True, exist_ok=True)
            with run.lock():
                check_free(run.path, config.overwrite)  # again: another process may have got here first
                _check_outside(run.path, config)
                _empty(run.path)
                run.write_config(config)
        except OSError as error:
            kind = RunError if error.errno in _DISK else UserError
            raise kind(f"run = {config.run!r}: cannot be made or written: {error.strerror}") from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunLog":
        """Open an existing run. Raises UserError if there is none or its config.json is invalid."""
        run = cls(Path(path))
        if not run.path.is_dir():
            raise UserError(f"run {str(path)!r}: no such folder; name the run folder of an earlier training")
        if not (run.path / "config.json").is_file():
            raise UserError(f"run {str(path)!r}: holds no config.json, so it is no Forethought run")
        run.config()
        return run

    def config(self) -> Config:
        """The options of the run. Raises UserError if config.json is invalid."""
        values = self.options()
        try:
            return from_dict({name: value for name, value in values.items() if name != "version"}, saved=True)
        except UserError as error:
            raise UserError(f"{self.path / 'config.json'}: {error}") from None

    def options(self) -> dict[str, Any]:
        """What config.json holds, with the version, not checked. Raises UserError if it is no run's, or of 0.1."""
        values = self.read_json("config.json")
        if not _is_run(values):
            raise UserError(f"{self.path / 'config.json'}: is not the config of a Forethought run")
        if "version" not in values:
            raise UserError(f"{self.path / 'config.json'}: is of version 0.1, which versions after 0.2 do not read")
        return values

    def write_config(self, config: Config) -> None:
        """Write or replace RUN/config.json atomically. Raises RunError."""
        self.write_json("config.json", {"version": __version__, **to_dict(config)})

    def check_writable(self) -> None:
        """Raise UserError where the folder cannot be written: to know it before the work for what goes there."""
        if not os.access(self.path, os.W_OK):
            raise UserError(f"run = {str(self.path)!r}: the folder cannot be written")

    def append(self, name: Literal["metrics", "thoughts", "warnings"], rows: list[dict[str, Any]]) -> None:
        """Append one line per row to RUN/name.jsonl; every row has a "step". Raises RunError (disk)."""
        assert all(type(row.get("step")) is int for row in rows), "rewind needs the step of every row"
        path = self.path / f"{name}.jsonl"
        if rows or name != "warnings":  # a run without warnings has no such file
            with disk_errors(self.path, path), path.open("a", encoding="utf-8") as file:
                file.write("".join(_dump(row) for row in rows))

    def warn(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Append the rows that warnings.jsonl does not hold yet, and return them. Raises RunError (disk)."""
        known = read_lines(self.path / "warnings.jsonl") if rows else []
        new = [row for row in rows if row not in known]
        self.append("warnings", new)
        return new

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step` and a truncated last line, so that a resumed run logs no step twice.

        Raises:
            UserError: another line is malformed or has no step.
            RunError: the disk is full; the files are unchanged.
        """
        for path in (self.path / f"{name}.jsonl" for name in ("metrics", "thoughts", "warnings")):
            kept = []
            for number, row in numbered_rows(path):
                if type(row.get("step")) is not int:
                    raise UserError(f"{path}:{number}: has no step; fix or delete the line")
                if row["step"] <= step:
                    kept.append(row)
            if path.exists():
                self.write_lines(path.name, kept)

    def write_json(self, name: str, values: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Write or replace RUN/name atomically. Raises RunError."""
        self.write_text(name, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")

    def write_lines(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write or replace RUN/name atomically, one row per line. Raises RunError."""
        self.write_text(name, "".join(_dump(row) for row in rows))

    def write_text(self, name: str, text: str) -> None:
        """Write or replace RUN/name atomically. Raises RunError."""
        with disk_errors(self.path, self.path / name):
            replace_text(self.path / name, text)

    def read_json(self, name: str, missing: dict[str, Any] | None = None) -> dict[str, Any]:
        """Read RUN/name. Raises UserError if it is not a JSON object, or missing with nothing to stand for it."""
        path = self.path / name
        if missing is not None and not path.is_file():
            return missing
        values = read_json(path)
        if not isinstance(values, dict):
            raise UserError(f"{path}: holds a {type(values).__name__}, not a JSON object")
        return values

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder while training in it. The kernel releases the lock when the process ends for any reason.

        Raises UserError if another process (or another `lock` of this one) has locked it.
        """
        path = self.path / ".lock"
        try:
            file = path.open("ab+", buffering=0)
        except OSError as error:
            kind = RunError if error.errno in _DISK else UserError
            raise kind(f"run = {str(self.path)!r}: cannot be written: {error.strerror}") from None
        with file:
            self._acquire(file)
            with disk_errors(self.path, path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            _HELD[self.path] = file
            try:
                yield
            finally:
                del _HELD[self.path]

    def in_use(self) -> bool:
        """Whether a process trains in the folder, as far as locks of this file system say."""
        try:
            with (self.path / ".lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no lock file, or no locks
            pass
        return False

    def _acquire(self, file: BinaryIO) -> None:
        try:
            for _ in range(20):  # `in_use` of another process may have the lock for a moment
                with suppress(BlockingIOError):
                    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                time.sleep(0.01)
            file.seek(0)
            holder = file.read().decode().strip() or "another process"
            raise UserError(f"run = {str(self.path)!r}: in use by {holder}; wait for it or name another run")
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            text = f"{self.path}: this file system has no locks; do not train in it twice at the same time"
            warnings.warn(text, Notice, stacklevel=4)


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON: {error}") from None


def replace_text(path: Path, text: str) -> None:
    """Write or replace a file atomically: on a full disk the old one stays. Raises OSError."""
    path = path.resolve()
    if path.exists() and not path.is_file():  # a device or a pipe
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file of a run; none if it does not exist yet. A truncated last line is ignored.

    Raises UserError, with file and line, for any other malformed line.
    """
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_lines` one by one, with line numbers."""
    try:
        yield from read_jsonl(path, allow_truncated=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_jsonl(path: str | Path, *, allow_truncated: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and rows of a JSON Lines file (.gz and .zst too); blank lines are ignored.

    Args:
        allow_truncated: ignore a last line that does not parse and has no newline, as a killed process leaves it.

    Raises:
        UserError: a malformed line or compressed stream, with file and line.
        OSError: the file cannot be opened.
    """
    for number, line in numbered_lines(str(path)):
        try:
            row = parse_json(line, str(path), number)
        except UserError:
            if allow_truncated and not line.endswith(b"\n"):
                return
            raise
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: a row must be an object, got {reprlib.repr(row)}")
        yield number, row


def parse_json(data: bytes, path: str, line: int) -> Any:
    """The JSON value that begins at a line of a file. Raises UserError with file and line."""
    text = decode_text(data, path, line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{line}: malformed JSON ({error})") from None


def decode_text(data: bytes, path: str, line: int) -> str:
    """UTF-8 text that begins at a line of a file, without a byte order mark. Raises UserError with file and line."""
    if b"\0" in data:
        line += data.count(b"\n", 0, data.index(b"\0"))
        raise UserError(f"{path}:{line}: holds a NUL byte, so it is binary, not UTF-8 text")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers. Raises UserError for a broken compressed stream."""
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, OSError) as error:
        raise _broken(f"{path}:{number + 1}", error) from None


def read_bytes(path: str) -> bytes:
    """A whole file, decompressed. Raises UserError for a broken compressed stream."""
    try:
        with _open(path) as file:
            return file.read()
    except (EOFError, zlib.error, OSError) as error:
        raise _broken(path, error) from None


def _broken(where: str, error: Exception) -> Exception:
    """A broken compressed stream as UserError; an error of the system, which has a number, as it is."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return UserError(f"{where}: broken or truncated {'zstd' if '.zst' in where.lower() else 'gzip'} ({error})")


def _open(path: str) -> io.BufferedReader:
    packed = path.lower().endswith((".gz", ".zst"))
    return io.BufferedReader(_Decompressed(path)) if packed else Path(path).open("rb")


class _Decompressed(io.RawIOBase):
    """The content of a .gz or .zst file. Bytes after an intact stream, as some mirrors append, are a warning."""

    def __init__(self, path: str):
        self._path, self._given, self._ended = path, 0, False
        self._file = self._opened()

    def _opened(self) -> Any:
        if self._path.lower().endswith(".gz"):
            return gzip.GzipFile(self._path)
        import pyarrow

        return pyarrow.CompressedInputStream(Path(self._path).open("rb"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = b"" if self._ended else self._file.read1(len(buffer))
        except OSError as error:
            data = self._rest() if "Unknown frame descriptor" in str(error) else b""
            if not (self._given + len(data) and re.search("Not a gzipped file|Unknown frame descriptor", str(error))):
                raise
            warnings.warn(f"{self._path}: bytes after the end of the packed stream are ignored", Notice, stacklevel=2)
            self._ended = True
        self._given, self._ended = self._given + len(data), self._ended or not data
        buffer[: len(data)] = data
        return len(data)

    def _rest(self) -> bytes:
        """What is left of an intact zstd stream: a read that reaches beyond its end loses all that it has read."""
        self._file, skip, found = self._opened(), self._given, bytearray()
        while skip:
            skip -= len(self._file.read(min(skip, 1 << 20)))
        with suppress(OSError):
            while byte := self._file.read(1):
                found += byte
        return bytes(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def checkpoints(run: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by step, oldest first.

    A folder `.replaced-step-N` counts as step N if a kill came between moving it away and renaming the new one.
    """
    found = {}
    folder = run / "checkpoints"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (match := _STEP.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path  # sorted: `step-` comes after `.replaced-step-` and wins
    return dict(sorted(found.items()))


@contextmanager
def disk_errors(run: Path, path: Path) -> Iterator[None]:
    """Turn an OSError (a full disk, a folder that was removed) into a RunError that says which checkpoint is intact."""
    try:
        _check_held(run)
        yield
    except OSError as error:
        steps = list(checkpoints(run))
        safe = f"the checkpoint of step {steps[-1]} is intact" if steps else "no checkpoint had been written"
        raise RunError(f"{path}: cannot be written: {error.strerror or error}; {safe}") from error


def _check_held(run: Path) -> None:
    """Raise OSError if another folder has taken the place of the one that is locked, perhaps with another run."""
    file, lock = _HELD.get(run), run / ".lock"
    if file is None:
        return
    same = os.path.samestat(os.fstat(file.fileno()), lock.stat()) if lock.exists() else (run / "config.json").exists()
    if not same:
        raise OSError(errno.ESTALE, "the folder was removed or replaced")


def refuse(error: OSError) -> None:
    """Raise an error: for os.walk, which otherwise takes a folder that cannot be read for an empty one."""
    raise error


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def check_free(path: Path, overwrite: bool) -> None:
    """Raise UserError where `create` would mix with existing files or destroy them."""
    if path.exists() and not path.is_dir():
        raise UserError(f"run = {str(path)!r}: is a file; name a folder")
    if not _contents(path):
        return
    if not overwrite:
        resume = "" if (path / "stage.json").exists() else f"continue it (--resume {path}), "  # a stage starts again
        raise UserError(
            f"run = {str(path)!r}: exists and is not empty; {resume}name another one (--run PATH) "
            "or replace it (--overwrite True)"
        )
    try:
        if not _is_run(RunLog(path).read_json("config.json")):
            raise UserError("its config.json is that of another program")
    except UserError as error:
        raise UserError(f"run = {str(path)!r}: overwrite replaces only a Forethought run ({error})") from None


def _is_run(config: dict[str, Any]) -> bool:
    return {"run", "method", "train"} <= config.keys()


def _check_outside(path: Path, config: Config) -> None:
    named = ("model.path", "model.tokenizer", "method.proxy", "corpus.path", "evaluate.path", "questions.data")
    sources = [(option, attrgetter(option)(config)) for option in named]
    sources += [("questions.tasks", task.partition("=")[2]) for task in config.questions.tasks]
    for option, source in sources:
        home = os.path.expanduser(source)  # noqa: PTH111
        places = [Path(place) for place in [home, *glob(home, recursive=True)] if place]  # noqa: PTH207
        if any(place.exists() and place.resolve().is_relative_to(path.resolve()) for place in places):
            raise UserError(f"run = {str(path)!r}: {option} = {source!r} is in this folder, which would be emptied")


def _contents(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.name != ".lock"] if path.is_dir() else []


def _empty(path: Path) -> None:
    """Remove everything but config.json: after a kill half-way the folder can still be overwritten."""
    for entry in _contents(path):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != "config.json":
            entry.unlink()


def _dump(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value without non-finite numbers: dropped from an object, null in a list."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items() if not _is_infinite(inner)}
    if isinstance(value, list | tuple):
        return [None if _is_infinite(inner) else _finite(inner) for inner in value]
    return value


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
