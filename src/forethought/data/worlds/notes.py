"""Notes under trees, each naming the next tree: a path has to be walked, and the last line tells where it leads.

A document (under the oak lies a note that names the elm, ...), its answer, and the worked thought that finds it, one
note at a time (a trail of trees):

    oak elm , yew oak , elm ash , ... . from oak by elm 5 steps lead to fig .
    <think> oak elm ash pine birch fig </think>

The notes lie in no order and form one ring of all trees, so every tree names and is named once; the steps are too many
to walk in one forward pass, and so are those that lead back. Words are separated by single spaces.
"""

import random
from dataclasses import dataclass
from itertools import pairwise

from forethought.data import worlds

TREES = ("oak", "elm", "ash", "fig", "yew", "pine", "birch", "cedar", "maple", "willow")
FEWEST_STEPS, MOST_STEPS = 5, 6
SMALL, FEWEST_TREES = 0.5, 3
"""Share of the pretraining documents whose ring leaves trees out (on few, looking up is learned), and their fewest."""
STEPS = tuple(str(number) for number in range(FEWEST_STEPS, MOST_STEPS + 1))


@dataclass(frozen=True, slots=True)
class Walk:
    """The notes in the order in which they are told (tree, tree that its note names), where to start and how far."""

    notes: tuple[tuple[str, str], ...]
    start: str
    steps: int

    def trail(self) -> list[str]:
        """The trees on the way, the start and the end included."""
        return _walk(dict(self.notes), self.start, self.steps)

    def words(self) -> list[str]:
        """The document's words; the answer is the last but one."""
        told = [word for note in self.notes for word in (*note, ",")]
        trail = self.trail()
        asked = ["from", trail[0], "by", trail[1], str(self.steps), "steps"]
        return [*told[:-1], ".", *asked, "lead", "to", trail[-1], "."]

    def worked(self, before: list[str]) -> list[str]:
        """The trail over the notes that are told: from the start, or until that is known from the first tree."""
        told = dict(self.notes[: (len(before) + 1) // 3])
        if not told:
            return []
        asked = before[3 * len(self.notes) :]
        start = self.start if len(asked) > 1 else before[0]
        return _walk(told, start, self.steps if len(asked) > 4 else MOST_STEPS)


def row(split: str, index: int, seed: int = 0) -> dict:
    """The document at `index` of an endless split, one of `worlds.SPLITS`: "train" and "heldout" hold no thoughts.

    Returns `{"id", "text", "marks": {"answer": [offset]}}`, the offset in characters of the answer's first letter.
    """
    return worlds.row("notes", _draw_any if split == "pretrain" else _draw, TREES, split, index, seed)


def vocabulary() -> list[str]:
    """Every word of every text and thought, the two delimiters included, in a fixed order."""
    return worlds.vocabulary([",", ".", "from", "by", "steps", "lead", "to", *TREES, *STEPS])


def truth(text: str, thought: str) -> tuple[int, int]:
    """How many statements of a thought are right, and how many it makes: the trail "oak elm ash" makes two.

    A statement is a tree followed by a tree; it is right where the first one's note names the second.
    Words that form no statement are passed over; a text that tells no notes makes nothing checkable.
    """
    notes = _read(text)
    stated = [(a, b) for a, b in pairwise(thought.split()) if a in TREES and b in TREES] if notes else []
    return sum(notes.get(tree) == named for tree, named in stated), len(stated)


def _draw_any(rng: random.Random) -> Walk:
    return _draw(rng, rng.randrange(FEWEST_TREES, len(TREES)) if rng.random() < SMALL else len(TREES))


def _draw(rng: random.Random, trees: int = len(TREES)) -> Walk:
    ring = rng.sample(TREES, trees)
    notes = list(zip(ring, [*ring[1:], ring[0]], strict=True))
    rng.shuffle(notes)
    return Walk(tuple(notes), rng.choice(ring), rng.randint(FEWEST_STEPS, MOST_STEPS))


def _walk(notes: dict[str, str], start: str, steps: int) -> list[str]:
    """From note to note, at most so many, as far as they lead."""
    trail = [start]
    while len(trail) <= steps and trail[-1] in notes:
        trail.append(notes[trail[-1]])
    return trail


def _read(text: str) -> dict[str, str]:
    """The notes that a document tells, thoughts in it left out."""
    words = worlds.without_thoughts(text)
    told = words[: words.index(".")] if "." in words else words
    notes = zip(told[::3], told[1::3], strict=False)
    return {tree: named for tree, named in notes if {tree, named} <= set(TREES)}
