"""SIGTERM and Ctrl-C: delivered where work may be interrupted, deferred elsewhere."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stopped(Exception):
    """Work was stopped by a signal. `what` says what is saved and how to continue."""

    def __init__(self, number: int, what: str):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}; {what}")


class SignalArrived(BaseException):
    """Raised inside `SignalGuard.interruptible`; a BaseException so that no `except Exception` catches it."""

    def __init__(self, number: int):
        self.number = number


class SignalGuard:
    """A signal handler that interrupts only `interruptible` code; a signal elsewhere waits until the next such block.

    With `deferred` it never interrupts: of several ranks none may leave alone, so they agree on `pending` first.
    """

    def __init__(self, deferred: bool = False) -> None:
        self._interruptible, self._pending, self._deferred = False, 0, deferred

    @property
    def pending(self) -> int:
        """The number of the signal received; 0 if none."""
        return self._pending

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self._pending = number
        if self._interruptible:
            self._interruptible = False
            raise SignalArrived(number)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM; outside the main thread, where Python does not allow that, do nothing."""
        try:
            before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Code that may be interrupted at any point."""
        self._interruptible = not self._deferred
        try:
            if self._pending and not self._deferred:
                raise SignalArrived(self._pending)
            yield
        finally:
            self._interruptible = False
