"""Texts of the embedded worlds and windows of corpora."""

import itertools
from typing import Any

from forethought.config import Corpus
from forethought.data import worlds
from forethought.data.corpus import Window, Windows

SPLITS = ("pretrain", "train", "heldout")


def split_thought(text: str) -> tuple[list[str], list[str], int]:
    """A text's words without its thought, the thought's words, and where the thought stood (-1: nowhere)."""
    words = text.split(" ")
    if worlds.OPEN not in words:
        return words, [], -1
    first, last = words.index(worlds.OPEN), words.index(worlds.CLOSE)
    return words[:first] + words[last + 1 :], words[first + 1 : last], first


def first_windows(options: Corpus, tokenizer: Any, seed: int, count: int, option: str = "corpus.path") -> list[Window]:
    """The first `count` windows of the first epoch, or all of them if there are fewer."""
    windows = Windows(options, tokenizer, seed, option=option)
    return list(itertools.islice(itertools.takewhile(lambda _: windows.epoch == 0, windows), count))
