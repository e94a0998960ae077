"""One job of an experiment in a process of its own: `python -m forethought.experiment.worker JSON`."""

import json
import sys

from forethought.config import RunError, UserError
from forethought.experiment import arms, design
from forethought.interrupts import Stopped
from forethought.loop import Silent


def main(words: list[str]) -> int:
    """Run it. Returns 0, 2 for a user's error, 1 for a run that cannot go on, 128 + n for signal n."""
    asked = json.loads(words[0])
    try:
        whole = design.read(asked["path"], asked["overrides"])
        arms.run_job(whole, next(job for job in whole.jobs if job.name == asked["job"]), Silent())
    except (UserError, RunError, Stopped) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1 if isinstance(error, RunError) else 128 + error.number
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
