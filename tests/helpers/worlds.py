"""Shared by tests: worlds."""

from forethought.data import worlds

SPLITS = ("pretrain", "train", "heldout")


def split_thought(text: str) -> tuple[list[str], list[str], int]:
    """A text's words without its thought, the thought's words, and where the thought stood (-1: nowhere)."""
    words = text.split(" ")
    if worlds.OPEN not in words:
        return words, [], -1
    first, last = words.index(worlds.OPEN), words.index(worlds.CLOSE)
    return words[:first] + words[last + 1 :], words[first + 1 : last], first
