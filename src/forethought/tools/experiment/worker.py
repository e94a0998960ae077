"""Jobs of an experiment in a process of its own, one after the other: `python -m forethought.tools.experiment.worker JSON`.

A line of stdin names a job and its log, a line of stdout says how it ended; the end of stdin ends the process. So torch
and transformers are imported once for several jobs.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from forethought.config import RunError, UserError
from forethought.run.signals import Stopped
from forethought.run.trackers import Callbacks
from forethought.tools.experiment import arms, design

WATCH_S = 1.0


def main(words: list[str]) -> int:
    """Take jobs until there are no more. Returns 0, or 128 + n for signal n; an error that is none of ours ends it."""
    asked = json.loads(words[0])
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    meter = arms.Meter()
    for line in sys.stdin:
        job = json.loads(line)
        with Path(job["log"]).open("ab") as log:
            _redirect(log)
        try:
            answer = _do(asked, job["job"], meter)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return 128 + stopped.number
        gc.collect()  # a model of the job before would still take its memory
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _do(asked: dict[str, Any], name: str, meter: arms.Meter) -> dict[str, str]:
    """One job. Returns how it `ended`: done, a user's mistake, or failed; and what was `said`."""
    try:
        whole = design.read(asked["path"], asked["overrides"])
        arms.run_job(whole, next(job for job in whole.jobs if job.name == name), Callbacks(), meter)
    except (UserError, RunError) as error:
        print(error, file=sys.stderr)
        return {"ended": "mistake" if isinstance(error, UserError) else "failed", "said": str(error)}
    return {"ended": "done"}


def _redirect(log: IO[bytes]) -> None:
    """Whatever is said from now on, by libraries too, goes into a job's log."""
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)


def _follow(parent: int) -> None:
    """Save and leave, as on SIGTERM, when the process that asked for the job is gone, however it ended."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
