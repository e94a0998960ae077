"""Sources of documents: files of several formats, a hub stream, an embedded world.

A source is a list of parts, each of which can be read from any record on. Local files are read here instead of by
`datasets`, which names neither the file nor the line of a malformed row and cannot restore its shuffle buffer after a
resume.
"""

import glob
import io
import itertools
import math
import os
import random
import re
import reprlib
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forethought.config import Corpus, Notice, UserError
from forethought.data.worlds import WORLDS, load_world
from forethought.run.folder import decode_text, numbered_lines, parse_json, read_bytes, refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of a corpus.

    `row` is `file:row` (in JSON Lines, the line) and no other document's. `id` is the row's own label, by default
    `row`; several documents may have the same. `marks` maps a name to the character offsets of words worth a thought.
    `domain` (by default from the file name) and `language` come from the row; None where unknown.
    """

    row: str
    id: str
    text: str
    marks: dict[str, list[int]]
    domain: str | None = None
    language: str | None = None


_SAMPLE = 1 << 14  # bytes
Record = Document | UserError
"""A row as a document or, with corpus.skip_bad_rows, what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a path refers to: its parts in order, and a reader of a part from its n-th record (from 0) on."""

    label: str
    parts: list[str]
    reader: Callable[[str, int], Iterator[Record]]
    endless: bool = False

    def read(self, part: str, skip: int) -> Iterator[Record]:
        """The records of a part after its first `skip`. Raises UserError, prefixed with the label."""
        with _prefixed_errors(self.label):
            yield from self.reader(part, skip)

    def fingerprints(self) -> list[list[Any]]:
        """Of each file: its name below the folder that holds all, its size and checksums of its start and of samples.

        Samples are spread evenly over the files: they cover all of a corpus of less than 64 MiB, and never much more.

        A part that is no file is known by its name alone. Raises UserError.
        """
        found, root, samples = [], os.path.commonpath(self.parts), max(2, 4096 // len(self.parts))
        with _prefixed_errors(self.label):
            for path in map(Path, self.parts):
                if not path.is_file():
                    found.append([str(path)])
                    continue
                size, sampled = path.stat().st_size, 0
                with path.open("rb") as file:
                    start = zlib.crc32(file.read(1 << 16))
                    for at in (*range(0, size, max(_SAMPLE, size // samples)), max(0, size - _SAMPLE)):
                        file.seek(at)
                        sampled = zlib.crc32(file.read(_SAMPLE), sampled)
                found.append([str(path.relative_to(root)), size, start, sampled])
        return found


@contextmanager
def _prefixed_errors(label: str) -> Iterator[None]:
    """Prefix errors with the option, and turn OSError into UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{label}: {error}") from None
    except OSError as error:
        raise UserError(f"{label}: {error.filename or 'input'}: {error.strerror or error}") from None


def find_source(options: Corpus, seed: int, option: str) -> Source:
    """The source that a path refers to. Raises UserError where there is none."""
    label = f"{option} = {options.path!r}"
    kind, _, rest = options.path.partition(":")
    with _prefixed_errors(label):
        if kind == "world" and rest:
            return Source(label, [options.path], _world(rest, seed), endless=True)
        if kind == "hub" and rest:
            return Source(label, [options.path], lambda part, skip: _read_hub(part, skip, options))
        files, left_out = _files(os.path.expanduser(options.path))  # noqa: PTH111
        if left_out:
            named = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
            text = f"{label}: left out, as no kind of file that is read: {len(left_out)} ({named})"
            warnings.warn(text, Notice, stacklevel=2)
        return Source(label, files, lambda name, skip: _read_file(name, skip, options, alone=len(files) == 1))


def _world(name: str, seed: int) -> Callable[[str, int], Iterator[Document]]:
    """Reader of `WORLD/SPLIT`: from index 0 if held out, else from an index drawn by the seed."""
    name, _, split = name.partition("/")
    if name not in WORLDS:
        raise UserError(f"unknown world {name!r}, must be one of {', '.join(sorted(WORLDS))}")
    row = load_world(name).row
    row(split, 0, 0)  # raises ValueError for an unknown split
    first = 0 if split == "heldout" else random.Random(f"world {seed}").randrange(2**40)
    part = f"world:{name}/{split}"
    return lambda _, skip: (Document(row=f"{part}:{n}", **row(split, n, 0)) for n in itertools.count(first + skip))


def _files(path: str) -> tuple[list[str], list[str]]:
    """The files to read, each once, and what is left out of a folder.

    A path is a file, a folder (of which hidden names are ignored, and linked folders left out), or a glob.
    """
    folder, left_out = Path(path).is_dir(), []
    if folder:
        names = sorted(_walk(path))
        files = [name for name in names if name.lower().endswith(_EXTENSIONS) and not Path(name).is_dir()]
        left_out = [os.path.relpath(name, path) for name in names if name not in set(files)]
    elif Path(path).exists():
        files = [path]
    else:
        files = [name for name in glob.glob(path, recursive=True) if Path(name).is_file()]  # noqa: PTH207
    files = sorted({os.path.realpath(name): name for name in sorted(files, key=lambda one: (-len(one), one))}.values())
    if not files:
        nothing = "the glob matches no file" if glob.has_magic(path) else "no such file or folder"
        raise UserError(f"{'no file to read in the folder' if folder else nothing} ({_KNOWN})")
    for name in files:
        _reader(name)
    return files, left_out


def _walk(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "."]
        linked = [name for name in folders if Path(root, name).is_symlink()]
        yield from (str(Path(root, name)) for name in (*names, *linked) if name[0] != ".")


def _read_file(name: str, skip: int, options: Corpus, alone: bool) -> Iterator[Record]:
    """The records of a file. With several files each is a domain, unless rows name theirs."""
    records = _reader(name)(name, skip, options)
    if alone or options.domain_field:
        return records
    return (replace(one, domain=_domain(name)) if isinstance(one, Document) else one for one in records)


def _domain(name: str) -> str:
    """`books` for books.heldout.jsonl.gz and books-00000-of-00007.parquet; the folder for a file with one text."""
    path = Path(name)
    if _reader(name) is _read_text:
        return path.absolute().parent.name
    return re.sub(r"-\d+-of-\d+$", "", path.name.split(".")[0]) or path.name


def _reader(name: str) -> Callable[[str, int, Corpus], Iterator[Record]]:
    """The reader for the extension of a file."""
    for extension, reader in _READERS.items():
        if name.lower().endswith(tuple(extension + packed for packed in _PACKED)):
            return reader
    raise UserError(f"{name}: unknown extension, must be one of {_KNOWN}")


def _read_text(name: str, skip: int, _: Corpus) -> Iterator[Record]:
    data = b"" if skip else read_bytes(name)
    if data:
        yield Document(row=name, id=name, text=decode_text(data, name, 1), marks={})


def _read_lines(name: str, skip: int, options: Corpus) -> Iterator[Record]:
    for number, line in itertools.islice(numbered_lines(name), skip, None):
        yield _record(line, options, name, number)


def _read_json(name: str, skip: int, options: Corpus) -> Iterator[Record]:
    """JSON Lines (as C4 names them), one array of rows, or one row over several lines."""
    first = next(numbered_lines(name), (1, b""))[1].strip().removeprefix(b"\xef\xbb\xbf")
    try:
        whole = isinstance(parse_json(first or b"{}", name, 1), list)
    except UserError:
        whole = True
    try:
        rows = parse_json(read_bytes(name), name, 1) if whole else None
    except UserError:
        if first.startswith(b"[") or first == b"{":
            raise
        rows = None  # lines, of which the first one is malformed
    if rows is None:
        yield from _read_lines(name, skip, options)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        if number > skip:
            yield _record(row, options, name, number)


def _read_parquet(name: str, skip: int, options: Corpus) -> Iterator[Record]:
    from pyarrow import ArrowException, parquet

    first = 0
    try:
        with parquet.ParquetFile(io.BytesIO(read_bytes(name)) if name.lower().endswith(_PACKED[1:]) else name) as table:
            columns = table.schema_arrow.names
            fields = _fields(options)
            for option, field in fields.items():
                _require_field(option, field, columns, name)
            wanted = [column for column in columns if column in (*fields.values(), "id", "marks")]
            for batch in table.iter_batches(batch_size=64, columns=wanted):
                rows = enumerate(batch.to_pylist(), start=first + 1)
                yield from (_record(row, options, name, number) for number, row in rows if number > skip)
                first += batch.num_rows
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as parquet ({' '.join(str(error).split())})") from None


def _read_hub(part: str, skip: int, options: Corpus) -> Iterator[Record]:
    import datasets

    try:
        stream = datasets.load_dataset(part.removeprefix("hub:"), split=options.split, streaming=True)
        for number, row in enumerate(stream.skip(skip), start=skip + 1):
            yield _record(row, options, part, number)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None


_READERS = {
    **dict.fromkeys((".txt", ".md"), _read_text),
    **dict.fromkeys((".jsonl", ".ndjson"), _read_lines),
    ".json": _read_json,
    ".parquet": _read_parquet,
}
_PACKED = ("", ".gz", ".zst")
_EXTENSIONS = tuple(extension + packed for extension in _READERS for packed in _PACKED)
_KNOWN = f"{', '.join(_READERS)}, each also .gz or .zst"


def _fields(options: Corpus) -> dict[str, str]:
    """The fields that every row must have, keyed by the option that names them."""
    named = {"field": options.field, "domain_field": options.domain_field, "language_field": options.language_field}
    return {option: field for option, field in named.items() if field}


def _require_field(option: str, field: str, names: Iterable[str], where: str) -> None:
    if field not in names:
        known = ", ".join(map(repr, itertools.islice(names, 20))) or "none"
        raise UserError(f"{where}: no field corpus.{option} = {field!r}, the fields are {known}")


def _record(row: Any, options: Corpus, name: str, number: int) -> Record:
    """A row (a line of bytes: its JSON) as a document. A bad one is a UserError, raised or, if skipped, returned."""
    try:
        row = parse_json(row, name, number) if isinstance(row, bytes) else row
        return _document(row, options, f"{name}:{number}")
    except UserError as error:
        if not options.skip_bad_rows:
            raise
        return error


def _document(row: Any, options: Corpus, where: str) -> Document:
    """A row as a document; `where` names it in errors and is its default id."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object, got {reprlib.repr(row)}")
    field = options.field
    for option, name in _fields(options).items():
        _require_field(option, name, row, where)
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} must be text, got {reprlib.repr(text)}")
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: field {field!r} contains a lone surrogate")
    return Document(
        row=where,
        id=_label(row, "id", where) or where,
        text=text,
        marks=_marks(row.get("marks"), text, where),
        domain=_label(row, options.domain_field, where),
        language=_label(row, options.language_field, where),
    )


def _label(row: dict[str, Any], field: str, where: str) -> str | None:
    """The id, domain or language of a row in one line; None where the option is empty or the field blank or NaN."""
    value = row.get(field) if field else None
    if isinstance(value, dict | list | bytes):
        raise UserError(f"{where}: field {field!r} must be text or a number, got {reprlib.repr(value)}")
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes NaN where there is none
        return None
    if re.search("[\ud800-\udfff]", text := str(value)):
        raise UserError(f"{where}: field {field!r} contains a lone surrogate")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()) or None


_MARK = r"\w[\w .+-]*"
_FIGURES = ("all", "questions", "cost", "minus")
"""A mark's name is part of GROUP/METRIC, beside these and groups such as `domain:books` and `post:sft`."""


def _marks(marks: Any, text: str, where: str) -> dict[str, list[int]]:
    """The marks of a row, without names that have no offsets."""
    if not isinstance(marks, dict | None):
        raise UserError(f"{where}: marks must map names to lists of offsets, got {reprlib.repr(marks)}")
    marks = {name: offsets for name, offsets in (marks or {}).items() if offsets is not None}
    for name, at in marks.items():
        if not re.fullmatch(_MARK, name) or name in _FIGURES:
            raise UserError(
                f"{where}: marks {reprlib.repr(name)}: a name must begin with a letter or digit, hold only letters, "
                f"digits, spaces and . _ + -, and be none of {', '.join(_FIGURES)}; rename it"
            )
        if not isinstance(at, list) or any(type(o) is not int or not 0 <= o < len(text) for o in at):
            raise UserError(f"{where}: marks {name!r} must list offsets 0 to {len(text) - 1}, got {reprlib.repr(at)}")
    return {name: offsets for name, offsets in marks.items() if offsets}
