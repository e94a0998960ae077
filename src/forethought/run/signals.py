"""SIGTERM and Ctrl-C: let through where work may be abandoned, held back where it may not."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stopped(Exception):
    """Work was stopped by a signal. `what` says what is saved and how to go on."""

    def __init__(self, number: int, what: str):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}; {what}")


class SignalArrived(BaseException):
    """Raised inside `SignalGuard.passing`; a BaseException so that nothing on the way takes it for an error."""

    def __init__(self, number: int):
        self.number = number


class SignalGuard:
    """A signal handler that interrupts only code inside `passing`; elsewhere the signal waits for the next one.

    With `held` it interrupts nothing: where several processes work together, none may leave by itself, and `pending`
    says what they have to agree on.
    """

    def __init__(self, held: bool = False) -> None:
        self._open, self._pending, self._held = False, 0, held

    @property
    def pending(self) -> int:
        """The number of a signal that has come; 0 where none has."""
        return self._pending

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self._pending = number
        if self._open:
            self._open = False
            raise SignalArrived(number)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Catch SIGINT and SIGTERM, in the main thread; in another thread whoever runs it handles signals."""
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
    def passing(self) -> Iterator[None]:
        """Code that may be abandoned at any point."""
        self._open = not self._held
        try:
            if self._pending and not self._held:
                raise SignalArrived(self._pending)
            yield
        finally:
            self._open = False
