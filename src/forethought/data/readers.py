"""Sources of documents: files of several formats, a hub stream, an embedded world.

A source is a list of parts, each of which can be read from any record on. Local files are read here instead of by
`datasets`, which names neither the file nor the line of a malformed row and cannot restore its shuffle buffer after a
resume.
"""

import glob
import itertools
import os
import random
import re
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forethought.config import Corpus, UserError
from forethought.data.worlds import WORLDS, load_world
from forethought.run.folder import decode_text, read_jsonl


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of a corpus.

    `id` is the row's own or `file:line`. `marks` maps a name to the character offsets of words worth a thought.
    `domain` (by default from the file name) and `language` come from the row; None where unknown.
    """

    id: str
    text: str
    marks: dict[str, list[int]]
    domain: str | None = None
    language: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """What a path refers to: its parts in order, and a reader of a part from its n-th record (from 0) on."""

    label: str
    parts: list[str]
    reader: Callable[[str, int], Iterator[Document]]
    endless: bool = False

    def read(self, part: str, skip: int) -> Iterator[Document]:
        """The documents of a part after its first `skip`. Raises UserError, prefixed with the label."""
        empty = skip == 0
        with _prefixed_errors(self.label):
            for document in self.reader(part, skip):
                empty = False
                yield document
            if empty:
                raise UserError(f"{part}: empty, must hold at least one document")

    def fingerprints(self) -> list[list[Any]]:
        """Of each file: its name below the folder that holds all, its size and a checksum of its start, for JSON.

        A part that is no file is known by its name alone. Raises UserError.
        """
        found, root = [], os.path.commonpath(self.parts)
        with _prefixed_errors(self.label):
            for path in map(Path, self.parts):
                if not path.is_file():
                    found.append([str(path)])
                    continue
                with path.open("rb") as file:
                    found.append([str(path.relative_to(root)), path.stat().st_size, zlib.crc32(file.read(1 << 16))])
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
        files = _files(os.path.expanduser(options.path))  # noqa: PTH111
        return Source(label, files, lambda name, skip: _read_file(name, skip, options, alone=len(files) == 1))


def _world(name: str, seed: int) -> Callable[[str, int], Iterator[Document]]:
    """Reader of `WORLD/SPLIT`: from index 0 if held out, else from an index drawn by the seed."""
    name, _, split = name.partition("/")
    if name not in WORLDS:
        raise UserError(f"unknown world {name!r}, must be one of {', '.join(sorted(WORLDS))}")
    row = load_world(name).row
    row(split, 0, 0)  # raises ValueError for an unknown split
    first = 0 if split == "heldout" else random.Random(f"world {seed}").randrange(2**40)
    return lambda _, skip: (Document(**row(split, index, 0)) for index in itertools.count(first + skip))


def _files(path: str) -> list[str]:
    """The file itself, the known files of a folder (neither hidden nor behind links), or the matches of a glob."""
    folder = Path(path).is_dir()
    if folder:
        files = sorted(_walk(path))
    elif Path(path).exists():
        files = [path]
    else:
        files = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not files:
        nothing = "the glob matches no file" if glob.has_magic(path) else "no such file or folder"
        raise UserError(f"{'no file to read in the folder' if folder else nothing} ({', '.join(_READERS)})")
    for name in files:
        _reader(name)
    return files


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise error

    known = tuple(_READERS)
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (str(Path(root, name)) for name in names if name[0] != "." and name.lower().endswith(known))


def _read_file(name: str, skip: int, options: Corpus, alone: bool) -> Iterator[Document]:
    """The documents of a file. With several files each is a domain, unless rows name theirs."""
    documents = _reader(name)(name, skip, options)
    if alone or options.domain_field:
        return documents
    return (replace(document, domain=_domain(name)) for document in documents)


def _domain(name: str) -> str:
    """`books` for books.heldout.jsonl.gz and books-00000-of-00007.parquet; the folder for a file with one text."""
    path = Path(name)
    if path.name.lower().endswith(tuple(_WHOLE)):
        return path.absolute().parent.name
    return re.sub(r"-\d+-of-\d+$", "", path.name.split(".")[0]) or path.name


def _reader(name: str) -> Callable[[str, int, Corpus], Iterator[Document]]:
    """The reader for the extension of a file."""
    for extension, reader in _READERS.items():
        if name.lower().endswith(extension):
            return reader
    raise UserError(f"{name}: unknown extension, must be one of {', '.join(_READERS)}")


def _read_text(name: str, skip: int, _: Corpus) -> Iterator[Document]:
    data = b"" if skip else Path(name).read_bytes()
    if data:
        yield Document(id=name, text=decode_text(data, name, 1), marks={})


def _read_rows(name: str, skip: int, options: Corpus) -> Iterator[Document]:
    for number, row in read_jsonl(name, skip=skip):
        yield _document(row, options, f"{name}:{number}")


def _read_parquet(name: str, skip: int, options: Corpus) -> Iterator[Document]:
    from pyarrow import ArrowException, parquet

    first = 0
    try:
        with parquet.ParquetFile(name) as table:
            columns = table.schema_arrow.names
            fields = _fields(options)
            for option, field in fields.items():
                _require_field(option, field, columns, name)
            wanted = [column for column in columns if column in (*fields.values(), "id", "marks")]
            for batch in table.iter_batches(batch_size=64, columns=wanted):
                rows = enumerate(batch.to_pylist(), start=first + 1)
                yield from (_document(row, options, f"{name}:{number}") for number, row in rows if number > skip)
                first += batch.num_rows
    except (ArrowException, OSError) as error:
        raise UserError(f"{name}: cannot be read as parquet ({' '.join(str(error).split())})") from None


def _read_hub(part: str, skip: int, options: Corpus) -> Iterator[Document]:
    import datasets

    try:
        stream = datasets.load_dataset(part.removeprefix("hub:"), split=options.split, streaming=True)
        for number, row in enumerate(stream.skip(skip), start=skip + 1):
            yield _document(row, options, f"{part}:{number}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None


_WHOLE = {".txt": _read_text, ".md": _read_text}
_ROWS = {".jsonl": _read_rows, ".jsonl.gz": _read_rows, ".parquet": _read_parquet}
_READERS = _WHOLE | _ROWS


def _fields(options: Corpus) -> dict[str, str]:
    """The fields that every row must have, keyed by the option that names them."""
    named = {"field": options.field, "domain_field": options.domain_field, "language_field": options.language_field}
    return {option: field for option, field in named.items() if field}


def _require_field(option: str, field: str, names: Iterable[str], where: str) -> None:
    if field not in names:
        known = ", ".join(map(repr, itertools.islice(names, 20))) or "none"
        raise UserError(f"{where}: no field corpus.{option} = {field!r}, the fields are {known}")


def _document(row: dict[str, Any], options: Corpus, where: str) -> Document:
    """A row as a document; `where` names it in errors and is its default id."""
    field = options.field
    for option, name in _fields(options).items():
        _require_field(option, name, row, where)
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} must be text, got {reprlib.repr(text)}")
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: field {field!r} contains a lone surrogate")
    name = row.get("id")
    return Document(
        id=where if name is None else str(name),
        text=text,
        marks=_marks(row.get("marks"), text, where),
        domain=_label(row, options.domain_field),
        language=_label(row, options.language_field),
    )


def _label(row: dict[str, Any], field: str) -> str | None:
    """The domain or language of a row; None where the option is empty or the field blank."""
    value = row[field] if field else None
    return None if value is None else str(value).strip() or None


def _marks(marks: Any, text: str, where: str) -> dict[str, list[int]]:
    """The marks of a row, without names that have no offsets."""
    if not isinstance(marks, dict | None):
        raise UserError(f"{where}: marks must map names to lists of offsets, got {reprlib.repr(marks)}")
    marks = {name: offsets for name, offsets in (marks or {}).items() if offsets is not None}
    for name, at in marks.items():
        if not isinstance(at, list) or any(type(o) is not int or not 0 <= o < len(text) for o in at):
            raise UserError(f"{where}: marks {name!r} must list offsets 0 to {len(text) - 1}, got {reprlib.repr(at)}")
    return {name: offsets for name, offsets in marks.items() if offsets}
