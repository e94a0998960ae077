"""Embedded worlds: endless generated text, small enough for two CPU cores, on which thinking pays off.

A world is a module with `row(split, index, seed)`, `vocabulary()` and `truth(text, thought)`. It draws puzzles. A
puzzle is a document of words separated by single spaces, with the answer second to last, and it gives the correct
thought at any position. This module holds what the worlds share: splits, held-out puzzles, and the thoughts in
pretraining documents.
"""

import hashlib
import importlib
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

WORLDS = ("cups", "notes")
OPEN, CLOSE = "<think>", "</think>"
MUSINGS = ("hmm", "hmm let me see", "let me think", "not sure", "maybe {}", "i guess {}", "{} or {}")
"""Thoughts without information; the gaps are filled with names of the world, drawn at random."""

HELD_OUT = 8
"""One puzzle in this many is held out."""
THOUGHTFUL = 0.9
"""Share of the pretraining documents that contain a thought."""
AT_ANSWER = 0.35
"""Share of those whose thought is right before the answer; the others' position is drawn among all words."""
WORKED = 0.5
"""Share of the thoughts that are worked (always correct), where there is something to work on; the rest are musings."""
MIXED = 0.5
"""Share of the documents of `mixed` that contain a worked thought."""
SPLITS = ("pretrain", "train", "heldout", "worked", "mixed")
"""Thoughts of all kinds; none; none (held-out puzzles); a worked one before the answer; that in some documents."""


@runtime_checkable
class Puzzle(Protocol):
    """One draw of a world."""

    def words(self) -> list[str]:
        """The document's words; the answer is the last but one."""
        ...

    def worked(self, before: list[str]) -> list[str]:
        """The worked thought after the first words of the document; empty where they give nothing to work on."""
        ...


def load_world(name: str) -> Any:
    """The module of a world."""
    return importlib.import_module(f"{__name__}.{name}")


def row(
    name: str, draw: Callable[[random.Random, str], Puzzle], names: Sequence[str], split: str, index: int, seed: int = 0
) -> dict:
    """The document at `index` of an endless split (one of SPLITS) of world `name`; `draw` draws a puzzle for a split.

    Returns `{"id", "text", "marks": {"answer": [offset]}}`, the character offset of the answer.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(_hash(f"{seed} {split} {index}"))
    puzzle = draw(rng, split)
    while held_out(puzzle) != (split == "heldout"):
        puzzle = draw(rng, split)
    words = puzzle.words()
    answer = len(words) - 2
    thoughtful = {"pretrain": THOUGHTFUL, "worked": 1.0, "mixed": MIXED}.get(split, 0.0)
    if thoughtful and rng.random() < thoughtful:
        position = answer
        if split == "pretrain":
            position = answer if rng.random() < AT_ANSWER else rng.randrange(len(words))
            inside = _thought(puzzle, words[:position], names, rng)
        else:
            inside = puzzle.worked(words[:position])
        thought = [OPEN, *inside, CLOSE]
        words[position:position] = thought
        answer += len(thought) if position <= answer else 0
    offset = len(" ".join(words[:answer])) + 1
    return {"id": f"{name}/{split}/{seed}/{index}", "text": " ".join(words), "marks": {"answer": [offset]}}


def held_out(puzzle: Puzzle) -> bool:
    """Whether a puzzle is held out: a property of the puzzle alone, so no split can leak into another."""
    return _hash(" ".join(puzzle.words())) % HELD_OUT == 0


def vocabulary(words: Sequence[str]) -> list[str]:
    """The delimiters, the words of a world and those of musings, each once, in a fixed order."""
    musing = " ".join(MUSINGS).replace("{}", "").split()
    return [OPEN, CLOSE, *dict.fromkeys([*words, *musing])]


def without_thoughts(text: str) -> list[str]:
    """The words of a text without thoughts and their delimiters."""
    words, thinking = [], False
    for word in text.split():
        if word in (OPEN, CLOSE):
            thinking = word == OPEN
        elif not thinking:
            words.append(word)
    return words


def _hash(text: str) -> int:
    """A hash that is the same in every process (Python's own `hash` is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _thought(puzzle: Puzzle, before: list[str], names: Sequence[str], rng: random.Random) -> list[str]:
    worked = puzzle.worked(before)
    if worked and rng.random() < WORKED:
        return worked
    return [*rng.choice(MUSINGS).format(*rng.sample(names, 2)).split()]
