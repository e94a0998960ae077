"""What the loop needs of a method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from forethought.data.corpus import Window
from forethought.flops import Work

Sums = dict[str, tuple[float, float | int]]  # metric -> (sum, count), added up over processes once a step


def add(sums: Sums, more: Sums) -> None:
    """Add sums and counts, metric by metric."""
    for name, (value, count) in more.items():
        before = sums.get(name, (0.0, 0))
        sums[name] = (before[0] + value, before[1] + count)


def means(sums: Sums) -> dict[str, float]:
    """The mean of each metric that was counted."""
    return {name: value / count for name, (value, count) in sums.items() if count}


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One step's material: pieces that fit into memory, figures, and the rows of thoughts.jsonl."""

    pieces: Sequence[Any]
    sums: Sums
    thoughts: list[dict[str, Any]]  # each with its "step" and the "number" of its position in the step
    work: Work | tuple[int, ...]  # what was and will be read, for `forethought.flops`: thoughts, or rows of plain text


@runtime_checkable
class Method(Protocol):
    """What the loop needs of a method. A new one is a class with these, named in METHODS."""

    def collect(self, windows: list[Window], step: int) -> Collected:
        """Everything that one step learns from, without gradients."""
        ...

    def backward(self, piece: Any) -> tuple[float, Sums]:
        """Add the gradients of the piece's part of the step's loss; over all pieces the parts add up to the mean."""
        ...

    def after_step(self) -> None:
        """Called after every optimizer step."""
        ...

    def state(self) -> dict[str, torch.nn.Module]:
        """Further networks that a checkpoint must hold, by name."""
        ...
