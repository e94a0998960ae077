"""How many statements of thoughts are right, where an embedded world can tell."""

from collections.abc import Callable
from typing import Any

from forethought.data.corpus import Window
from forethought.data.positions import Positions
from forethought.data.worlds import load_world


def checker(path: str) -> Callable[[str, str], tuple[int, int]] | None:
    """What tells right statements from wrong ones: the `truth` of the embedded world that a corpus path names."""
    kind, _, rest = path.partition(":")
    return load_world(rest.partition("/")[0]).truth if kind == "world" else None


def statements(
    truth: Callable[[str, str], tuple[int, int]], tokenizer: Any, positions: Positions, said: list[list[str]]
) -> tuple[list[float], list[float]]:
    """Right statements and checkable statements in a thought, mean over each position's thoughts.

    They are checked against the whole window, what follows the position included. Of a document cut in pieces only the
    first one is a text that a world can read.
    """
    known = [_text(tokenizer, window) for window in positions.windows]
    right, stated = [], []
    for owner, group in zip(positions.window.tolist(), said, strict=True):
        counts = [truth(known[owner], thought) for thought in group]
        right.append(sum(count[0] for count in counts) / len(group))
        stated.append(sum(count[1] for count in counts) / len(group))
    return right, stated


def _text(tokenizer: Any, window: Window) -> str:
    return "" if window.start else tokenizer.decode(window.tokens, skip_special_tokens=True)
