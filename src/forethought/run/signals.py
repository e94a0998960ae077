"""Signals that ask a process to end: delivered where work may be interrupted, deferred elsewhere."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Ctrl-C, and what shells and schedulers send before the end: Slurm, LSF, SGE (SIGUSR1, SIGUSR2), limits (SIGXCPU)."""


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
        self._interruptible, self._deferred = False, deferred
        self.pending = 0  # the number of the signal received; 0 if none

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.pending = number
        if self._interruptible:
            self._interruptible = False
            raise SignalArrived(number)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals of `ENDING`; outside the main thread, where Python does not allow that, do nothing.

        A signal that still waits at the end goes to the guard around this one, if there is one.

        What ignores SIGHUP (nohup) or handles one of the others than SIGINT and SIGTERM keeps doing so.
        """
        always, before = (signal.SIGINT, signal.SIGTERM), dict[int, Any]()
        with contextlib.suppress(ValueError):
            for number in ENDING:
                found = signal.getsignal(number)
                if number in always or found is signal.SIG_DFL or isinstance(found, SignalGuard):
                    before[number] = signal.signal(number, self)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if isinstance(outer := before.get(self.pending), SignalGuard):  # nothing was left to interrupt here
            outer(self.pending, None)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Code that may be interrupted at any point."""
        self._interruptible = not self._deferred
        try:
            if self.pending and not self._deferred:
                raise SignalArrived(self.pending)
            yield
        finally:
            self._interruptible = False


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Code that a signal ends at any point, with SignalArrived."""
    guard = SignalGuard()
    with guard.installed(), guard.interruptible():
        yield
