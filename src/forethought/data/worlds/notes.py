"""Notes under trees, each naming the next tree; the document ends with the tree that a walk leads to.

A document (the note under the oak names the elm, ...) and the worked thought that finds its answer one note at a time:

    oak elm , yew oak , elm ash , ... . from oak by elm 5 steps lead to fig .
    <think> oak elm ash pine birch fig </think>

The notes are in random order and form one ring of all trees, so every tree names and is named once. The steps are too
many to walk in one forward pass, and so are those that lead back.
"""

import random
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from forethought.data import worlds

TREES = ("oak", "elm", "ash", "fig", "yew", "pine", "birch", "cedar", "maple", "willow")
FEWEST_STEPS, MOST_STEPS = 5, 6
SMALL, FEWEST_TREES = 0.5, 3
"""Share of pretraining documents with a smaller ring (from which look-ups are learned), and its fewest trees."""
STEPS = tuple(str(number) for number in range(FEWEST_STEPS, MOST_STEPS + 1))


@dataclass(frozen=True, slots=True)
class Walk:
    """The notes in the order of the document (tree, tree that its note names), where to start and how far to walk."""

    notes: tuple[tuple[str, str], ...]
    start: str
    steps: int

    def trail(self) -> list[str]:
        """The trees on the way, start and end included."""
        return _walk(dict(self.notes), self.start, self.steps)

    def words(self) -> list[str]:
        """The document's words; the answer is the last but one."""
        listed = [word for note in self.notes for word in (*note, ",")]
        trail = self.trail()
        question = ["from", trail[0], "by", trail[1], str(self.steps), "steps"]
        return [*listed[:-1], ".", *question, "lead", "to", trail[-1], "."]

    def worked(self, before: list[str]) -> list[str]:
        """The trail over the notes before it, from the start or, until that is named, from the first tree."""
        known = dict(self.notes[: (len(before) + 1) // 3])
        if not known:
            return []
        question = before[3 * len(self.notes) :]
        start = self.start if len(question) > 1 else before[0]
        return _walk(known, start, self.steps if len(question) > 4 else MOST_STEPS)


def truth(text: str, thought: str) -> tuple[int, int]:
    """How many statements of a thought are correct, and how many it makes: the trail "oak elm ash" makes two.

    A statement is a tree followed by a tree; it is correct where the note of the first names the second. Other words
    are ignored, and nothing can be checked in a text without notes.
    """
    notes = _read(text)
    stated = [(a, b) for a, b in pairwise(thought.split()) if a in TREES and b in TREES] if notes else []
    return sum(notes.get(tree) == named for tree, named in stated), len(stated)


def _draw(rng: random.Random, split: str) -> Walk:
    small = split == "pretrain" and rng.random() < SMALL
    ring = rng.sample(TREES, rng.randrange(FEWEST_TREES, len(TREES)) if small else len(TREES))
    notes = list(zip(ring, [*ring[1:], ring[0]], strict=True))
    rng.shuffle(notes)
    return Walk(tuple(notes), rng.choice(ring), rng.randint(FEWEST_STEPS, MOST_STEPS))


def _walk(notes: dict[str, str], start: str, steps: int) -> list[str]:
    """Follow the notes for at most `steps`, or as far as they lead."""
    trail = [start]
    while len(trail) <= steps and trail[-1] in notes:
        trail.append(notes[trail[-1]])
    return trail


def _read(text: str) -> dict[str, str]:
    """The notes of a document, ignoring thoughts in it."""
    words = worlds.without_thoughts(text)
    listed = words[: words.index(".")] if "." in words else words
    notes = zip(listed[::3], listed[1::3], strict=False)
    return {tree: named for tree, named in notes if {tree, named} <= set(TREES)}


row = partial(worlds.row, "notes", _draw, TREES)
vocabulary = partial(worlds.vocabulary, [",", ".", "from", "by", "steps", "lead", "to", *TREES, *STEPS])
