"""Where documents come from: files of several formats, a hub stream, an embedded world.

A source is a list of parts, each read record by record from any record on. Local files are read here and not by
`datasets`, which names neither the file nor the line of a malformed row and whose shuffle buffer cannot be restored
after a resume.
"""

import glob
import gzip
import itertools
import json
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text as the corpus holds it.

    `id` is the row's own or `file:line`; `marks` maps a name to the offsets, in characters, of words worth a thought.
    `domain` and `language` are what the row says of itself, or for the domain the name of its file; None: not known.
    """

    id: str
    text: str
    marks: dict[str, list[int]]
    domain: str | None = None
    language: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """What a path names: parts in order, and how to read a part from its n-th record (from 0) on."""

    label: str
    parts: list[str]
    reader: Callable[[str, int], Iterator[Document]]
    endless: bool = False

    def read(self, part: str, skip: int) -> Iterator[Document]:
        """The documents of a part after its first `skip`; whatever is wrong with it is a UserError with the label."""
        empty = skip == 0
        with _named(self.label):
            for document in self.reader(part, skip):
                empty = False
                yield document
            if empty:
                raise UserError(f"{part}: empty, must hold at least one document")


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Put the option before what is wrong with its value, and turn the system's refusals into UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{label}: {error}") from None
    except OSError as error:
        raise UserError(f"{label}: {error.filename or 'input'}: {error.strerror or error}") from None


def find_source(options: Corpus, seed: int, option: str) -> Source:
    """The source that a path names. Raises UserError where there is none."""
    label = f"{option} = {options.path!r}"
    kind, _, rest = options.path.partition(":")
    with _named(label):
        if kind == "world" and rest:
            return Source(label, [options.path], _world(rest, seed), endless=True)
        if kind == "hub" and rest:
            return Source(label, [options.path], lambda part, skip: _read_hub(part, skip, options))
        files = _files(os.path.expanduser(options.path))  # noqa: PTH111
        return Source(label, files, lambda name, skip: _read_file(name, skip, options, alone=len(files) == 1))


def _world(name: str, seed: int) -> Callable[[str, int], Iterator[Document]]:
    """Reader of `WORLD/SPLIT`, by index: from 0 where held out, else from a place of the seed; refuses other splits."""
    name, _, split = name.partition("/")
    if name not in WORLDS:
        raise UserError(f"unknown world {name!r}, must be one of {', '.join(sorted(WORLDS))}")
    row = load_world(name).row
    row(split, 0, 0)
    first = 0 if split == "heldout" else random.Random(f"world {seed}").randrange(2**40)
    return lambda _, skip: (Document(**row(split, index, 0)) for index in itertools.count(first + skip))


def _files(path: str) -> list[str]:
    """The file itself, or the folder's known files in order (without hidden ones and linked folders), or the glob's."""
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
    """The documents of a file. Of several files each is a domain, unless rows name theirs."""
    documents = _reader(name)(name, skip, options)
    if alone or options.domain_field:
        return documents
    return (replace(document, domain=_domain(name)) for document in documents)


def _domain(name: str) -> str:
    """`books` for books.heldout.jsonl.gz and books-00000-of-00007.parquet; of a text of its own, its folder."""
    path = Path(name)
    if path.name.lower().endswith(tuple(_WHOLE)):
        return path.absolute().parent.name
    return re.sub(r"-\d+-of-\d+$", "", path.name.split(".")[0]) or path.name


def _reader(name: str) -> Callable[[str, int, Corpus], Iterator[Document]]:
    """What reads a file with this extension."""
    for extension, reader in _READERS.items():
        if name.lower().endswith(extension):
            return reader
    raise UserError(f"{name}: unknown extension, must be one of {', '.join(_READERS)}")


def _read_text(name: str, skip: int, _: Corpus) -> Iterator[Document]:
    data = b"" if skip else Path(name).read_bytes()
    if data:
        yield Document(id=name, text=decode_text(data, name, 1), marks={})


def _read_lines(name: str, skip: int, options: Corpus) -> Iterator[Document]:
    return (_document(row, options, f"{name}:{number}") for number, row in json_lines(name, skip))


def json_lines(name: str, skip: int = 0) -> Iterator[tuple[int, Any]]:
    """The rows of a .jsonl or .jsonl.gz file after the first `skip`, with their line numbers. Raises UserError."""
    for number, line in itertools.islice(numbered_lines(name), skip, None):
        text = decode_text(line, name, number)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}:{number}: malformed JSON ({error})") from None
        yield number, row


def numbered_lines(name: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    number = 0
    try:
        with (gzip.open if name.lower().endswith(".gz") else open)(name, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{name}:{number + 1}: broken or truncated gzip ({error})") from None


def _read_parquet(name: str, skip: int, options: Corpus) -> Iterator[Document]:
    from pyarrow import ArrowException, parquet

    first = 0
    try:
        with parquet.ParquetFile(name) as table:
            columns = table.schema_arrow.names
            fields = _fields(options)
            for option, field in fields.items():
                _has(option, field, columns, name)
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
_ROWS = {".jsonl": _read_lines, ".jsonl.gz": _read_lines, ".parquet": _read_parquet}
_READERS = _WHOLE | _ROWS


def decode_text(data: bytes, name: str, line: int) -> str:
    """UTF-8 text that begins at a line of a file; a byte order mark is dropped."""
    if b"\0" in data:
        line += data.count(b"\n", 0, data.index(b"\0"))
        raise UserError(f"{name}:{line}: holds a NUL byte, so it is binary, not UTF-8 text")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(f"{name}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None


def _fields(options: Corpus) -> dict[str, str]:
    """The fields that every row must have, by the option that names them."""
    named = {"field": options.field, "domain_field": options.domain_field, "language_field": options.language_field}
    return {option: field for option, field in named.items() if field}


def _has(option: str, field: str, names: Iterable[str], where: str) -> None:
    if field not in names:
        there = ", ".join(map(repr, itertools.islice(names, 20))) or "none"
        raise UserError(f"{where}: no field corpus.{option} = {field!r}, the fields are {there}")


def _document(row: Any, options: Corpus, where: str) -> Document:
    """A row as a document; `where` names it in errors, and is its id where it has none."""
    field = options.field
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with a field {field!r}, got {reprlib.repr(row)}")
    for option, name in _fields(options).items():
        _has(option, name, row, where)
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} must be text, got {reprlib.repr(text)}")
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: field {field!r} holds half a character (a lone surrogate)")
    name, (domain, language) = row.get("id"), (_label(row, f) for f in (options.domain_field, options.language_field))
    return Document(
        id=where if name is None else str(name),
        text=text,
        marks=_marks(row.get("marks"), text, where),
        domain=domain,
        language=language,
    )


def _label(row: dict[str, Any], field: str) -> str | None:
    """What a row says of itself in a field; None where the option names none, or the row says nothing."""
    value = row[field] if field else None
    return None if value is None else str(value).strip() or None


def _marks(marks: Any, text: str, where: str) -> dict[str, list[int]]:
    """Marks as a row gives them, names without offsets left out."""
    if not isinstance(marks, dict | None):
        raise UserError(f"{where}: marks must map names to lists of offsets, got {reprlib.repr(marks)}")
    marks = {name: offsets for name, offsets in (marks or {}).items() if offsets is not None}
    for name, at in marks.items():
        if not isinstance(at, list) or any(type(o) is not int or not 0 <= o < len(text) for o in at):
            raise UserError(f"{where}: marks {name!r} must list offsets 0 to {len(text) - 1}, got {reprlib.repr(at)}")
    return {name: offsets for name, offsets in marks.items() if offsets}
