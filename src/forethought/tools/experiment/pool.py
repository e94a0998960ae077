"""Jobs in processes of their own, a few at a time; each process takes one job after the other (worker.py)."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from forethought.config import UserError
from forethought.run.signals import SignalGuard
from forethought.run.trackers import Callbacks
from forethought.tools.experiment.design import Experiment, Job

POLL_S = 0.2


@dataclass(slots=True)
class _Worker:
    """A process and the job that it is at; None while it waits for one."""

    process: subprocess.Popen[bytes]
    job: Job | None = None

    @property
    def words(self) -> IO[bytes]:
        """Where it is told of jobs."""
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def answers(self) -> IO[bytes]:
        """Where it tells of jobs that are over."""
        assert self.process.stdout is not None
        return self.process.stdout


class Pool:
    """The jobs of an experiment that are not done yet. Each process has its share of the cores."""

    def __init__(self, experiment: Experiment, todo: list[Job], asked: dict[str, Any]):
        self.experiment, self.asked = experiment, asked
        self.waiting = list(todo)
        self.workers: list[_Worker] = []
        self.done = {job.name for job in experiment.jobs} - {job.name for job in todo}
        self.failed: dict[str, str] = {}

    def run(self, observer: Callbacks) -> dict[str, str]:
        """All jobs. Returns what failed. When a signal comes, the others are told to save and leave, and waited for.

        Raises UserError for a user's mistake in an arm, SignalArrived.
        """
        gate = SignalGuard()
        observer.part("")
        try:
            with gate.installed():
                while self.waiting or self._busy():
                    self._start()
                    observer.phase("comparing", len(self.done), len(self.experiment.jobs))
                    files = [one.answers for one in self._busy()]
                    with gate.passing():
                        ready = select.select(files, [], [], POLL_S)[0] if files else time.sleep(POLL_S) or []
                    for one in [one for one in self.workers if one.answers in ready]:
                        self._hear(one)
            observer.phase("comparing", len(self.done), len(self.experiment.jobs))
        finally:
            self._end()
        return self.failed

    def _busy(self) -> list[_Worker]:
        return [one for one in self.workers if one.job is not None]

    def _start(self) -> None:
        """Give jobs that can begin to processes that are free, or to new ones."""
        for job in [one for one in self.waiting if one.needs in self.failed]:
            self.waiting.remove(job)
            self.failed[job.name] = f"{job.needs}, whose budget it follows, failed"
        for job in [one for one in self.waiting if one.needs is None or one.needs in self.done]:
            free = next((one for one in self.workers if one.job is None), None)
            if free is None and len(self.workers) == self.experiment.processes:
                return
            self.waiting.remove(job)
            free = free or self._hire(job)
            free.job = job
            with contextlib.suppress(BrokenPipeError):  # it is gone: `_hear` finds that
                free.words.write(json.dumps({"job": job.name, "log": str(self._log(job))}).encode() + b"\n")
                free.words.flush()

    def _hire(self, job: Job) -> _Worker:
        """A new process. What it says before it takes the job goes to the job's log too."""
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.experiment.processes))
        with self._log(job).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "forethought.tools.experiment.worker", json.dumps(self.asked)],
                env={**os.environ, "OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process, which tells the others
            )  # fmt: skip
        self.workers.append(_Worker(process))
        return self.workers[-1]

    def _hear(self, one: _Worker) -> None:
        """A process has something to say, or is gone."""
        job, said = one.job, one.answers.readline()
        assert job is not None
        one.job = None
        if not said:
            self.workers.remove(one)
            self._close(one)
            self.failed[job.name] = f"ended with status {one.process.returncode} (see {self._log(job)})"
            return
        answer = json.loads(said)
        if answer["ended"] == "mistake":
            raise UserError(f"{job.name}: {answer['said']}")
        if answer["ended"] == "failed":
            self.failed[job.name] = f"{answer['said']} (see {self._log(job)})"
            return
        self.done.add(job.name)

    def _end(self) -> None:
        """Let go of those that wait, and have those that work save and leave."""
        for one in self._busy():
            one.process.send_signal(signal.SIGTERM)
        for one in self.workers:
            self._close(one)

    def _close(self, one: _Worker) -> None:
        for close in (one.words.close, one.answers.close):
            with contextlib.suppress(BrokenPipeError):
                close()
        one.process.wait()

    def _log(self, job: Job) -> Path:
        """Where a job's process writes its messages."""
        folder = self.experiment.run / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{job.arm}-seed-{job.seed}.log"
