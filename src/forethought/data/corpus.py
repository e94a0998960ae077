"""Documents -> windows of tokens: an endless stream that can stop anywhere and resume exactly.

Documents are read in blocks of `corpus.shuffle`, from several files in turn. A block is shuffled by a generator of
(seed, epoch, block), so a position in the stream is a few integers: the cursor.
"""

import functools
import itertools
import os
import random
import re
import reprlib
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forethought.config import Corpus, Notice, UserError
from forethought.data.readers import Document, Record, Source, find_source

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece vocabularies write a space
_MAX_SHORT = 1000  # documents of an endless stream that may be too short before any is long enough
_OPEN, _OPEN_HELD_OUT = 8, 128  # files that are read in turn, in training and for held-out text
_CURSOR = ("documents", "skipped", "bad_rows", "tokens", "epoch", "block", "part", "open", "at_once",
           "done", "given", "found")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Consecutive tokens of one document.

    `document` is its file and row, which no other document has; `id` is the label that the corpus gives it, which
    others may have too (None: it gives none). Token i of the window is token `start` + i of the document, except that a
    BOS token is repeated at the beginning of every window. `marks` maps a name to sorted indices into `tokens`, without
    names that have none here. Domain and language are the document's.
    """

    document: str
    start: int
    tokens: list[int]
    marks: dict[str, tuple[int, ...]]
    domain: str | None = None
    language: str | None = None
    id: str | None = None

    @property
    def label(self) -> str:
        """What to call the document: its id, by default its file and row."""
        return self.document if self.id is None else self.id


def labels(windows: Sequence[Window]) -> list[str]:
    """Each window's label, followed by its file and row where another document has the same label."""
    owners: dict[str, set[str]] = {}
    for window in windows:
        owners.setdefault(window.label, set()).add(window.document)
    return [one.label if len(owners[one.label]) == 1 else f"{one.label} ({one.document})" for one in windows]


def check_corpus(options: Corpus, option: str = "corpus.path") -> None:
    """Fail early: every part must open, and its first record, if any, must be a document. Nothing is tokenized.

    `option` is the name of the path in error messages. Raises UserError.
    """
    source = find_source(options, seed=0, option=option)
    empty = [part for part in source.parts if next(source.read(part, 0), None) is None]
    if len(empty) == len(source.parts):
        raise UserError(f"{source.label}: {empty[0]}: empty, must hold at least one document")
    if empty:
        warnings.warn(f"{source.label}: {len(empty)} files are empty, {empty[0]} among them", Notice, stacklevel=2)


def trained_on(options: Corpus, held_out: str) -> list[str]:
    """The files (or the stream) of held-out text ("": none) that the corpus has too, by whatever names."""
    if not held_out:
        return []
    both = (options, "corpus.path"), (replace(options, path=held_out), "evaluate.path")
    ours, theirs = ({os.path.realpath(part): part for part in find_source(some, 0, name).parts} for some, name in both)
    return [part for real, part in theirs.items() if real in ours]


def spread_windows(options: Corpus, tokenizer: Any, seed: int, count: int, option: str = "corpus.path") -> list[Window]:
    """`count` windows of the first epoch from as many files and documents as possible, or all if there are fewer.

    The files give a document each in turn. One random window of each document in reading order; if there are too few
    documents, a second one of each, and so on. The same on every call. The windows of `count` documents are kept.

    Raises:
        UserError: nothing to read, a malformed record, or no document of at least corpus.min_tokens tokens.
    """
    source, short = find_source(options, seed, option), []
    files = list(source.parts)
    if len(files) > 1 and (options.shuffle or len(files) > count):
        random.Random(f"files {seed} 0").shuffle(files)
    options = replace(options, shuffle=options.shuffle and max(1, options.shuffle // len(files)))

    def documents(file: str) -> Iterator[list[Window]]:
        windows = Windows(options, tokenizer, seed, source=replace(source, parts=[file]))
        try:
            epoch = itertools.takewhile(lambda _: windows.epoch == 0, windows)
            yield from (list(some) for _, some in itertools.groupby(epoch, lambda one: one.document))
        except NoWindow as error:
            short.append(error)

    found = list(itertools.islice(_in_turn(map(documents, files), _OPEN_HELD_OUT), count))
    if short and not found:
        raise short[0]
    for its_windows, label in zip(found, labels([some[0] for some in found]), strict=True):
        random.Random(f"spread {seed} {label}").shuffle(its_windows)
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*found))
    return list(itertools.islice((window for window in rounds if window is not None), count))


def _in_turn(waiting: Iterator[Iterator[Any]], at_once: int) -> Iterator[Any]:
    """An item of each of `at_once` iterators in turn; where one ends, the next one joins them."""
    turns = deque(itertools.islice(waiting, at_once))
    while turns:
        one = turns.popleft()
        if (item := next(one, None)) is None:
            turns.extend(itertools.islice(waiting, 1))
        else:
            turns.append(one)
            yield item


class NoWindow(UserError):
    """No document is long enough for a window."""


class Windows:
    """Endless iterator over the windows of a corpus, epoch after epoch. At most one block is in memory.

    Counters, which the cursor includes: `documents` started, `skipped` windows and documents below corpus.min_tokens,
    `bad_rows` that corpus.skip_bad_rows left out, `tokens` returned, and the `epoch` (from 0) of the last window.

    Raises UserError while reading: a malformed record (with file and line), or a whole pass without a window.
    """

    def __init__(
        self, options: Corpus, tokenizer: Any, seed: int, *, option: str = "corpus.path", source: Source | None = None
    ):
        self._options, self._tokenizer, self._seed = options, tokenizer, seed
        self._source = source or find_source(options, seed, option)
        self._files = functools.cache(self._source.fingerprints)
        self._size = 1 if self._source.endless else max(1, options.shuffle)
        self.epoch = self.documents = self.skipped = self.bad_rows = self.tokens = self.found = 0
        self._first_bad: UserError | None = None
        # The block's number, how many of its documents are done, and the windows returned of the next one. Where the
        # block starts: the next file to open, and those that are open (up to `at_once`) with the records read of each.
        self.block = self.done = self.given = self.part = 0
        self.open: list[list[int]] = []
        self.at_once = _OPEN if options.shuffle else 1
        self._ahead: tuple[int, list[list[int]]] = (0, [])  # the same at the end of the block
        self._windows = self._run()

    def __iter__(self) -> "Windows":
        return self

    def __next__(self) -> Window:
        return next(self._windows)

    def cursor(self) -> dict[str, Any]:
        """The position after the last window, for JSON: the start of the block, how much of it is used, the files."""
        files = self._files()
        return {"parts": len(files), "files": files, **{name: getattr(self, name) for name in _CURSOR}}

    def changed(self, cursor: dict[str, Any]) -> list[str]:
        """The files that differ, by names, sizes and samples, from those of a cursor."""
        pairs = zip(self._source.parts, self._files(), cursor["files"], strict=True)
        return [part for part, now, old in pairs if now != old]

    def seek(self, cursor: dict[str, Any]) -> None:
        """Continue from a cursor that was taken with the same options and seed.

        The next window reads the current file again up to the start of the block, without tokenizing.
        Raises UserError if the corpus has another number of files than when the cursor was taken.
        """
        if (now := len(self._source.parts)) != cursor["parts"]:
            raise UserError(f"{self._source.label}: {now} files, but {cursor['parts']} when the run was saved")
        for name in _CURSOR:
            setattr(self, name, cursor[name])
        self._windows = self._run()

    def _run(self) -> Iterator[Window]:
        """The windows from the current position on. At every `yield` the state is the position after that window."""
        while True:
            stream = self._records()
            while block := list(itertools.islice(stream, self._size)):
                part, after = self._ahead
                if self._options.shuffle:
                    random.Random(f"block {self._seed} {self.epoch} {self.block}").shuffle(block)
                while self.done < len(block):
                    yield from self._windows_of(block[self.done])
                    self.done, self.given = self.done + 1, 0
                block.clear()  # free this block before the next one is read
                self.block, self.part, self.open, self.done = self.block + 1, part, after, 0
                if self._source.endless and self.block >= _MAX_SHORT and not self.found:
                    break
            if not self.found:
                bad = f"; bad rows: {self.bad_rows}, the first is {self._first_bad}" if self._first_bad else ""
                least = f"corpus.min_tokens = {self._options.min_tokens} tokens or more"
                raise NoWindow(f"{self._source.label}: no document has {least}{bad}")
            self.epoch += 1
            self.block = self.part = self.found = 0
            self.open = []

    def _records(self) -> Iterator[Record]:
        """The records from the start of the block to the end of the pass, from the open files in turn.

        After each one, `_ahead` is where the next block starts if that record ends this one.
        """
        order = list(self._source.parts)
        if self._options.shuffle:
            random.Random(f"files {self._seed} {self.epoch}").shuffle(order)
        part = self.part
        turns = deque((index, read, self._source.read(order[index], read)) for index, read in self.open)
        while turns or part < len(order):
            if part < len(order) and len(turns) < self.at_once:
                turns.append((part, 0, self._source.read(order[part], 0)))
                part += 1
                continue
            index, read, records = turns.popleft()
            if (record := next(records, None)) is not None:
                turns.append((index, read + 1, records))
                self._ahead = part, [[index, read] for index, read, _ in turns]
                yield record

    def _windows_of(self, document: Record) -> Iterator[Window]:
        """The windows of a document that have not been returned yet. An empty document counts as one that is short.

        Each begins with the BOS token if the document does: some models (Gemma) predict badly without it.
        """
        if isinstance(document, UserError):
            self.bad_rows += 1
            if self._first_bad is None:
                self._first_bad = document
                text = f"{self._source.label}: skips bad rows, the first is {document}"
                warnings.warn(text, Notice, stacklevel=2)
            return
        tokens, marks = _tokenize(document, self._tokenizer) if document.text.strip() else ([], {})
        bos = tokens[:1] if tokens[:1] == [self._tokenizer.bos_token_id] else []
        text, size, least = tokens[len(bos) :], self._options.window - len(bos), self._options.min_tokens - len(bos)
        starts = range(0, max(1, len(text)), size)
        long = [start for start in starts if len(text[start : start + size]) >= least]
        if not self.given:
            self.documents += 1
            self.skipped += len(starts) - len(long)
            self.found = int(self.found or bool(long))
        for start in long[self.given :]:
            inside = range(start + len(bos), start + len(bos) + size)
            shifted = {name: tuple(i - start for i in at if i in inside) for name, at in marks.items()}
            window = Window(
                document=document.row,
                id=None if document.id == document.row else document.id,
                start=start,
                tokens=[*bos, *text[start : start + size]],
                marks={name: at for name, at in shifted.items() if at},
                domain=document.domain,
                language=document.language,
            )
            self.given += 1
            self.tokens += len(window.tokens)
            yield window


def context_tokens(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Tokens of a text that may go on: without the special tokens that end a document. Raises UserError."""
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"text = {reprlib.repr(text)}: contains a lone surrogate")
    whole, plain = (tokenizer("a", add_special_tokens=also)["input_ids"] for also in (special, False))
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0) if plain else len(whole)
    tokens = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
    return list(tokens[: len(tokens) + before + len(plain) - len(whole)])


def _tokenize(document: Document, tokenizer: Any) -> tuple[list[int], dict[str, list[int]]]:
    """Tokens of the text, including the tokenizer's special tokens, and the sorted indices of the marked ones."""
    marked = bool(document.marks)
    if marked and not getattr(tokenizer, "is_fast", False):
        kind = type(tokenizer).__name__
        raise UserError(f"model.tokenizer: the marks of {document.row} need a fast tokenizer, got {kind}")
    encoded = tokenizer(document.text, truncation=False, verbose=False, return_offsets_mapping=marked)
    # Special tokens have empty spans; a space that SentencePiece puts before a text has that of its first character.
    # A mark on white space that is in no token goes to the next token.
    named = enumerate(zip(encoded["offset_mapping"], encoded.tokens(), strict=True)) if marked else []
    real = ((i, span) for i, (span, name) in named if name != SPACE or document.text[span[0] : span[1]].isspace())
    spans = [(end, index) for index, (start, end) in real if start < end]
    ends, marks = [end for end, _ in spans], {}
    for name, offsets in document.marks.items():
        found = {bisect_right(ends, offset) for offset in offsets}
        marks[name] = sorted(spans[i][1] for i in found if i < len(spans))
    return list(encoded["input_ids"]), marks
