"""Documents to windows of tokens: an endless stream that stops anywhere and continues bit for bit.

Documents are read in blocks of `corpus.shuffle`; a block is permuted by a generator of (seed, epoch, block), so a place
in the stream is a few numbers: the cursor.
"""

import itertools
import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from forethought.config import Corpus, UserError
from forethought.data.readers import Document, find_source

_PATIENCE = 1000  # documents of an endless stream, none of them long enough, after which it is given up


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Consecutive tokens of one document.

    `document` is its id, `start` the index of the first token in the document, and `marks` maps a name to sorted
    indices into `tokens`; a name without a mark in this window is absent. Domain and language are the document's.
    """

    document: str
    start: int
    tokens: list[int]
    marks: dict[str, tuple[int, ...]]
    domain: str | None = None
    language: str | None = None


def check_corpus(options: Corpus, option: str = "corpus.path") -> None:
    """Fail now on what would fail later: every part must exist and open, and its first record must be a document.

    Nothing is tokenized. `option` is the name that messages give to the path. Raises UserError.
    """
    source = find_source(options, seed=0, option=option)
    for part in source.parts:
        next(source.read(part, 0))


def first_windows(options: Corpus, tokenizer: Any, seed: int, count: int, option: str = "corpus.path") -> list[Window]:
    """The first `count` windows of the first epoch, or all of them where there are fewer: the same on every call.

    Raises:
        UserError: nothing to read, a malformed record, or no document of at least corpus.min_tokens tokens.
    """
    windows = Windows(options, tokenizer, seed, option=option)
    return list(itertools.islice(itertools.takewhile(lambda _: windows.epoch == 0, windows), count))


def spread_windows(options: Corpus, tokenizer: Any, seed: int, count: int, option: str = "corpus.path") -> list[Window]:
    """`count` windows of the first epoch, of as many documents as can be, or all of them where there are fewer.

    In the order of reading, a random window of each document; where the documents are too few another one of each, and
    so on. The same on every call. Holds the windows of `count` documents in memory. Raises UserError as above.
    """
    windows, found = Windows(options, tokenizer, seed, option=option), {}
    for window in itertools.takewhile(lambda _: windows.epoch == 0, windows):
        if len(found) == count and window.document not in found:
            break
        found.setdefault(window.document, []).append(window)
    for document, pieces in found.items():
        random.Random(f"spread {seed} {document}").shuffle(pieces)
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*found.values()))
    return list(itertools.islice((window for window in rounds if window is not None), count))


class Windows:
    """Endless iterator over the windows of one process (`rank` of `world`), epoch after epoch.

    The n-th document of an epoch, in the order of reading, goes to rank n modulo `world`. Counters, which a cursor
    carries along: `documents` begun by this process, `skipped` windows and documents below corpus.min_tokens,
    `tokens` given out, and the `epoch` (from 0) of the window given last. At most one block is in memory.

    Raises UserError as it reads: a malformed record (with file and line), or a whole pass without a window.
    """

    def __init__(
        self, options: Corpus, tokenizer: Any, seed: int, rank: int = 0, world: int = 1, *, option: str = "corpus.path"
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to world - 1 = {world - 1}, got {rank}")
        self._options, self._tokenizer, self._seed = options, tokenizer, seed
        self._rank, self._world = rank, world
        self._source = find_source(options, seed, option)
        self._size = 1 if self._source.endless else max(1, options.shuffle)
        self.epoch = self.documents = self.skipped = self.tokens = 0
        # The block's number and where it starts, its documents that are done, and windows given of the next one.
        self._block, self._start, self._done, self._given, self._found = 0, (0, 0), 0, 0, False
        self._windows = self._run()

    def __iter__(self) -> "Windows":
        return self

    def __next__(self) -> Window:
        return next(self._windows)

    def cursor(self) -> dict[str, int]:
        """The place after the window given last, for JSON: the start of the block and how much of it is used."""
        counters = {"documents": self.documents, "skipped": self.skipped, "tokens": self.tokens, "epoch": self.epoch}
        start = {
            "parts": len(self._source.parts),
            "block": self._block,
            "part": self._start[0],
            "record": self._start[1],
        }
        return counters | start | {"done": self._done, "given": self._given, "found": int(self._found)}

    def seek(self, cursor: dict[str, int]) -> None:
        """Continue where a cursor of the same options, seed, rank and world was taken.

        The next window reads the current file again up to the block's start, without tokenizing.
        Raises UserError if the corpus has another number of files than when the cursor was taken.
        """
        if (now := len(self._source.parts)) != cursor["parts"]:
            raise UserError(f"{self._source.label}: {now} files, but {cursor['parts']} when the run was saved")
        self.documents, self.skipped, self.tokens = cursor["documents"], cursor["skipped"], cursor["tokens"]
        self.epoch, self._block, self._start = cursor["epoch"], cursor["block"], (cursor["part"], cursor["record"])
        self._done, self._given, self._found = cursor["done"], cursor["given"], bool(cursor["found"])
        self._windows = self._run()

    def _run(self) -> Iterator[Window]:
        """The windows from the present place on; every `yield` leaves the place that its window ends at."""
        while True:
            stream = self._documents()
            while block := list(itertools.islice(stream, self._size)):
                after = block[-1][0]
                if self._options.shuffle:
                    random.Random(f"block {self._seed} {self.epoch} {self._block}").shuffle(block)
                while self._done < len(block):
                    if (self._block * self._size + self._done) % self._world == self._rank:
                        yield from self._give(block[self._done][1])
                    self._done, self._given = self._done + 1, 0
                # Let go of this block before the next one is read.
                block.clear()
                self._block, self._start, self._done = self._block + 1, after, 0
                if self._source.endless and self._block >= _PATIENCE * self._world and not self._found:
                    break
            if not self._found:
                who = f" for process {self._rank} of {self._world}" if self._world > 1 else ""
                least = f"no document{who} has corpus.min_tokens = {self._options.min_tokens} tokens or more"
                raise UserError(f"{self._source.label}: {least}")
            self.epoch, self._block, self._start, self._found = self.epoch + 1, 0, (0, 0), False

    def _documents(self) -> Iterator[tuple[tuple[int, int], Document]]:
        """The documents from the block's start to the end of the pass, each with the place (part, record) after it."""
        order = list(self._source.parts)
        if self._options.shuffle:
            random.Random(f"files {self._seed} {self.epoch}").shuffle(order)
        first, skip = self._start
        for index, part in enumerate(order[first:], first):
            for record, document in enumerate(self._source.read(part, skip), skip + 1):
                yield (index, record), document
            skip = 0

    def _give(self, document: Document) -> Iterator[Window]:
        """The windows of a document that are not given yet."""
        windows, short = self._cut(document)
        if not self._given:
            self.documents += 1
            self.skipped += short
            self._found = self._found or bool(windows)
        for window in windows[self._given :]:
            self._given += 1
            self.tokens += len(window.tokens)
            yield window

    def _cut(self, document: Document) -> tuple[list[Window], int]:
        """The windows of a document that are long enough, and how many are not (a document without text counts)."""
        tokens, marks = _tokenize(document, self._tokenizer) if document.text.strip() else ([], {})
        size, windows = self._options.window, []
        starts = range(0, max(1, len(tokens)), size)
        for start in starts:
            piece = tokens[start : start + size]
            if len(piece) >= self._options.min_tokens:
                inside = {name: tuple(i - start for i in at if start <= i < start + size) for name, at in marks.items()}
                kept = {name: at for name, at in inside.items() if at}
                about = {"domain": document.domain, "language": document.language}
                windows.append(Window(document=document.id, start=start, tokens=piece, marks=kept, **about))
        return windows, len(starts) - len(windows)


def _tokenize(document: Document, tokenizer: Any) -> tuple[list[int], dict[str, list[int]]]:
    """Tokens of the text with the tokenizer's own special tokens, and the sorted indices of those that are marked."""
    placed = bool(document.marks)
    if placed and not getattr(tokenizer, "is_fast", False):
        raise UserError(f"model.tokenizer: the marks of {document.id} take a fast one, got {type(tokenizer).__name__}")
    encoded = tokenizer(document.text, truncation=False, verbose=False, return_offsets_mapping=placed)
    # Special tokens span nothing. A mark on white space that no token holds goes to the next token.
    offsets = enumerate(encoded["offset_mapping"] if placed else [])
    spans = [(end, index) for index, (start, end) in offsets if start < end]
    ends, marks = [end for end, _ in spans], {}
    for name, offsets in document.marks.items():
        places = {bisect_right(ends, offset) for offset in offsets}
        marks[name] = sorted(spans[place][1] for place in places if place < len(spans))
    return list(encoded["input_ids"]), marks
