"""Points in a run at which something happens to its process, whatever the speed of the machine.

Python's audit events report the files that a process touches, so it can send a signal to itself at a certain one,
instead of a test that watches the folder and must be fast enough.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

VARIABLE, MAIN = "FORETHOUGHT_TEST_MOMENT", "FORETHOUGHT_TEST_MAIN"
STARTUP = Path(__file__).parent / "startup"
_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "os.listdir"}


@dataclass(frozen=True)
class Moment:
    """Just before a file operation in the run folder `run`, or inside a forward pass.

    The first operation on a path that matches `pattern` (relative to the run folder), then `files` further operations,
    then `forwards` calls of a module. What happens: this process, or with `main` the main one, gets signal `number`;
    with `file_bytes` files of this process may not grow beyond that size.
    """

    run: str
    pattern: str = "*"
    files: int = 0
    forwards: int = 0
    number: int = signal.SIGTERM
    main: bool = False
    file_bytes: int = 0

    def install(self) -> None:
        """Wait for the moment in this process."""
        left = self.files
        matched = done = False

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left, matched, done
            if done or event not in _EVENTS:
                return
            paths = [path for path in map(_relative(self.run), arguments) if path is not None]
            if not paths:
                return
            if not matched:
                matched = any(fnmatch(path, self.pattern) for path in paths)
            else:
                left -= 1
            if matched and left <= 0:
                done = True
                _after_forwards(self.forwards, self._happen) if self.forwards else self._happen()

        sys.addaudithook(hook)

    def _happen(self) -> None:
        if self.file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, self.file_bytes))
            return
        main = int(os.environ.get(MAIN, os.getpid()))
        if self.main and main != os.getpid():  # the main process stops this one, which does nothing more until then
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            os.kill(main, self.number)
            signal.sigwait({signal.SIGTERM})
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            os.kill(os.getpid(), self.number)

    def environment(self) -> dict[str, str]:
        """Variables under which every Python process that is started waits for the moment."""
        return {VARIABLE: json.dumps(asdict(self)), "PYTHONPATH": os.pathsep.join([str(STARTUP), *sys.path])}


def install_from_environment() -> None:
    """Wait for the moment that the environment describes."""
    if VARIABLE in os.environ:
        os.environ.setdefault(MAIN, str(os.getpid()))
        Moment(**json.loads(os.environ[VARIABLE])).install()


def _relative(run: str) -> Callable[[Any], str | None]:
    def relative(argument: Any) -> str | None:
        """The path relative to the run folder, of an argument that is one inside it."""
        path = os.fspath(argument) if isinstance(argument, str | os.PathLike) else ""
        return path.removeprefix(f"{run}/") if isinstance(path, str) and path.startswith(f"{run}/") else None

    return relative


def _after_forwards(count: int, act: Callable[[], None]) -> None:
    """Call `act` inside the forward pass of a module, the `count`-th from now."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    left = count

    def hook(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            handle.remove()
            act()

    handle = register_module_forward_pre_hook(hook)
