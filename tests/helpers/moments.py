"""Points in a run at which something happens to its process, whatever the speed of the machine.

Python's audit events report the files that a process touches, so a process can send itself a signal at a certain one;
a test that watched the run folder instead would have to be fast enough.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "os.listdir"}


@dataclass(frozen=True)
class Moment:
    """Just before a file operation in the folder `run`, or inside a forward pass.

    It is at the first operation on a path that matches `pattern` (relative to `run`; "": at the start of the process),
    `files` further operations and `forwards` calls of a module later. The process then gets the signal `number`, or its
    files may from then on not grow beyond `file_bytes`.
    """

    run: str
    pattern: str = ""
    files: int = 0
    forwards: int = 0
    number: int = signal.SIGTERM
    file_bytes: int = 0

    def install(self) -> None:
        """Wait for the moment in this process."""
        left = self.files
        matched = not self.pattern
        if matched and not left:
            after_forwards(self.forwards, self._happen)
            return

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left, matched
            paths = [path for path in map(self._relative, arguments) if path] if event in _EVENTS else []
            if left < 0 or not paths:
                return
            if matched:
                left -= 1
            else:
                matched = any(fnmatch(path, self.pattern) for path in paths)
            if matched and left == 0:
                left = -1
                after_forwards(self.forwards, self._happen)

        sys.addaudithook(hook)

    def _relative(self, argument: Any) -> str:
        """A path in the run folder, relative to it; "" for any other argument of an event."""
        path = os.fspath(argument) if isinstance(argument, str | os.PathLike) else "/"
        inside = isinstance(path, str) and (path.startswith(f"{self.run}/") or not path.startswith("/"))
        return path.removeprefix(f"{self.run}/") if inside else ""  # shutil.rmtree gives names alone

    def _happen(self) -> None:
        if self.file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, self.file_bytes))
        else:
            os.kill(os.getpid(), self.number)


class OffloadOnCPU(Moment):
    """From its start, a process moves to the host what update.offload names, although that is there already."""

    def install(self) -> None:
        """Do so in this process."""
        from forethought.models import offload

        offload.DEVICES = ("cpu", "cuda")


def after_forwards(count: int, act: Callable[[], None]) -> None:
    """Call `act` inside the forward pass of a module, the `count`-th from now; at once if `count` is 0."""
    if not count:
        act()
        return
    from torch.nn.modules.module import register_module_forward_pre_hook

    left = count

    def hook(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            handle.remove()
            act()

    handle = register_module_forward_pre_hook(hook)
