"""Who watches a run."""

from typing import Protocol, runtime_checkable

from forethought.run.diagnostics import Diagnosis


@runtime_checkable
class Callbacks(Protocol):
    """Who watches a run: the command line draws a bar, a library user may pass nothing."""

    def part(self, name: str) -> None:
        """What follows belongs to this one of several runs; with "" to all of them."""
        ...

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress of what is not training itself."""
        ...

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """A training step is over."""
        ...

    def warning(self, found: Diagnosis) -> None:
        """Something goes wrong; the run goes on."""
        ...


class NoCallbacks:
    """An observer that does not look."""

    def part(self, name: str) -> None:
        """Nothing."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Nothing."""

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Nothing."""

    def warning(self, found: Diagnosis) -> None:
        """Nothing."""
