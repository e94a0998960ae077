"""Cups and a ball: numbered moves swap cups, and the document ends with the cup that holds the ball.

A document and the worked thought that finds its answer one look-up at a time (the cup after each move):

    ball under red . swap 1 blue red , 2 green white , 3 black blue . now under black .
    <think> 1 blue 2 blue 3 black </think>

Half of the moves carry the ball, so neither its start nor the cup named last gives the answer away, and following it
through all moves is too long a chain for one forward pass.
"""

import random
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from forethought.data import worlds

COLORS = ("red", "blue", "green", "white", "black")
FEWEST_MOVES, MOST_MOVES = 7, 8
NUMBERS = tuple(str(number) for number in range(1, MOST_MOVES + 1))
CARRIED = 0.5
"""Share of the moves that carry the ball."""


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Where the ball starts, and the pair of cups that each move swaps."""

    start: str
    moves: tuple[tuple[str, str], ...]

    def track(self) -> list[str]:
        """The cup that holds the ball after each move."""
        cups, cup = [], self.start
        for one, other in self.moves:
            cup = {one: other, other: one}.get(cup, cup)
            cups.append(cup)
        return cups

    def words(self) -> list[str]:
        """The document's words; the answer is the last but one."""
        words = ["ball", "under", self.start, ".", "swap"]
        for number, pair in enumerate(self.moves, start=1):
            words += [str(number), *pair, ","]
        return [*words[:-1], ".", "now", "under", self.track()[-1], "."]

    def worked(self, before: list[str]) -> list[str]:
        """The track of the moves that are complete in the words before it."""
        # Each finished move is followed by "," and the last one by the second "."
        finished = before.count(",") + max(0, before.count(".") - 1)
        cups = self.track()[:finished]
        return [word for number, cup in enumerate(cups, start=1) for word in (str(number), cup)]


def truth(text: str, thought: str) -> tuple[int, int]:
    """How many statements of a thought are correct, and how many it makes: "1 blue 2 red" makes two.

    A statement is a number followed by a color; one about a move that is not in the text is wrong. Other words are
    ignored, and nothing can be checked in a text without a puzzle.
    """
    puzzle = _read(text)
    if puzzle is None:
        return 0, 0
    cups = {str(number): cup for number, cup in enumerate(puzzle.track(), start=1)}
    words = thought.split()
    stated = [(a, b) for a, b in pairwise(words) if a in NUMBERS and b in COLORS]
    return sum(cups.get(number) == cup for number, cup in stated), len(stated)


def _draw(rng: random.Random, split: str) -> Puzzle:
    start = cup = rng.choice(COLORS)
    moves = []
    for _ in range(rng.randint(FEWEST_MOVES, MOST_MOVES)):
        others = [color for color in COLORS if color != cup]
        pair = rng.sample(others, 2)
        if rng.random() < CARRIED:
            pair[rng.randrange(2)] = cup
            cup = pair[1 - pair.index(cup)]
        moves.append((pair[0], pair[1]))
    return Puzzle(start, tuple(moves))


def _read(text: str) -> Puzzle | None:
    """The puzzle of a document, ignoring thoughts in it; None where there is none."""
    words = worlds.without_thoughts(text)
    if len(words) < 3 or words[2] not in COLORS:
        return None
    triples = zip(words, words[1:], words[2:], strict=False)
    moves = [(b, c) for a, b, c in triples if a in NUMBERS and {b, c} <= set(COLORS)]
    return Puzzle(words[2], tuple(moves))


row = partial(worlds.row, "cups", _draw, COLORS)
vocabulary = partial(worlds.vocabulary, ["ball", "under", ".", "swap", ",", "now", *COLORS, *NUMBERS])
