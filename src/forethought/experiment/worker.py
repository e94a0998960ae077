"""One job of an experiment in a process of its own: `python -m forethought.experiment.worker JSON`."""

import json
import os
import signal
import sys
import threading
import time

from forethought.config import RunError, UserError
from forethought.experiment import arms, design
from forethought.interrupts import Stopped
from forethought.loop import Silent

USER_ERROR, RUN_ERROR = 2, 3
WATCH_S = 1.0


def main(words: list[str]) -> int:
    """Run it. Returns 0, USER_ERROR, RUN_ERROR, or 128 + n for signal n; what went wrong is the last line of stderr."""
    asked = json.loads(words[0])
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    try:
        whole = design.read(asked["path"], asked["overrides"])
        arms.run_job(whole, next(job for job in whole.jobs if job.name == asked["job"]), Silent())
    except (UserError, RunError, Stopped) as error:
        print(error, file=sys.stderr)
        if isinstance(error, Stopped):
            return 128 + error.number
        return USER_ERROR if isinstance(error, UserError) else RUN_ERROR
    return 0


def _follow(parent: int) -> None:
    """Save and leave, as on SIGTERM, when the process that asked for the job is gone, however it ended."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
