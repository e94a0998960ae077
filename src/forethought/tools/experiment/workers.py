"""Jobs of an experiment in worker processes, several at a time. A worker runs one job after another.

Each worker is a `ProcessPoolExecutor` of one process: an executor whose process dies fails everything submitted to it.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from forethought.config import RunError, UserError
from forethought.run.signals import SignalArrived, SignalGuard, Stopped, stoppable
from forethought.run.trackers import Callbacks
from forethought.tools.experiment import arms
from forethought.tools.experiment.design import Experiment, Job

POLL_S = 0.2
_meter = arms.Meter()  # of a worker, which imports this module as it starts
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)
"""Blocked in workers: a terminal sends them to every process, and the main process stops the workers itself."""


class Worker:
    """A process and its current job, if any."""

    def __init__(self, experiment: Experiment, job: Job, log: Path):
        context = multiprocessing.get_context("spawn")
        self.executor = ProcessPoolExecutor(1, context, initializer=_watch_parent)
        children = set(multiprocessing.active_children())
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL_SIGNALS)
        try:
            self.submit(experiment, job, log)  # starts the process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        [self.process] = set(multiprocessing.active_children()) - children

    def submit(self, experiment: Experiment, job: Job, log: Path) -> None:
        """Start a job. The worker must be idle."""
        self.job: Job | None = job
        self.future: Future[None] = self.executor.submit(_run, experiment, job, log)


class WorkerPool:
    """Runs the unfinished jobs of an experiment in `experiment.processes` workers, which divide the cores evenly."""

    def __init__(self, experiment: Experiment, todo: list[Job]):
        self.experiment = experiment
        self.waiting = list(todo)
        self.workers: list[Worker] = []
        self.done = {job.name for job in experiment.jobs} - {job.name for job in todo}
        self.failed: dict[str, str] = {}

    def run(self, observer: Callbacks) -> dict[str, str]:
        """Run all jobs. Returns the failed ones with the reason. On a signal, running jobs save and stop first.

        Raises UserError for a user's mistake in an arm, SignalArrived.
        """
        guard, environment = SignalGuard(deferred=True), dict(os.environ)
        threads = max(1, torch.get_num_threads() // self.experiment.processes)
        os.environ.update(OMP_NUM_THREADS=str(threads), TQDM_DISABLE="1")  # inherited by the workers
        observer.part("")
        try:
            with guard.installed():
                while self.waiting or self._busy():
                    self._start_jobs()
                    observer.phase("comparing", len(self.done), len(self.experiment.jobs))
                    wait([worker.future for worker in self._busy()], POLL_S, FIRST_COMPLETED)
                    if guard.pending:
                        raise SignalArrived(guard.pending)
                    for worker in [worker for worker in self._busy() if worker.future.done()]:
                        self._collect(worker)
            observer.phase("comparing", len(self.done), len(self.experiment.jobs))
        finally:
            for worker in self._busy():
                worker.process.terminate()
            for worker in self.workers:
                worker.executor.shutdown(cancel_futures=True)
            os.environ.clear()
            os.environ.update(environment)
        return self.failed

    def _busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.job is not None]

    def _start_jobs(self) -> None:
        """Submit the jobs that can start to idle workers, or to new ones."""
        for job in [job for job in self.waiting if job.needs in self.failed]:
            self.waiting.remove(job)
            self.failed[job.name] = f"{job.needs}, whose budget it follows, failed"
        self.workers = [worker for worker in self.workers if worker.job or worker.process.is_alive()]
        for job in [job for job in self.waiting if job.needs is None or job.needs in self.done]:
            if idle := [worker for worker in self.workers if worker.job is None]:
                idle[0].submit(self.experiment, job, self._log(job))
            elif len(self.workers) < self.experiment.processes:
                self.workers.append(Worker(self.experiment, job, self._log(job)))
            else:
                return
            self.waiting.remove(job)

    def _collect(self, worker: Worker) -> None:
        """Record the result of a finished job. A worker that failed unexpectedly is not used again."""
        job, error = worker.job, worker.future.exception()
        assert job is not None
        worker.job = None
        if error is None:
            self.done.add(job.name)
            return
        if isinstance(error, UserError):
            raise UserError(f"{job.name}: {error}")
        reason = str(error)
        if not isinstance(error, RunError):
            self.workers.remove(worker)
            worker.executor.shutdown()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if isinstance(error, BrokenProcessPool):
                reason = f"ended with status {worker.process.exitcode}"
        self.failed[job.name] = f"{reason} (see {self._log(job)})"

    def _log(self, job: Job) -> Path:
        """The file that receives a job's output."""
        folder = self.experiment.run / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{job.arm}-seed-{job.seed}.log"


def _run(experiment: Experiment, job: Job, log: Path) -> None:
    """Run one job in a worker, with its output in `log`. Raises UserError, RunError (also when stopped)."""
    with log.open("ab") as file:
        for descriptor in (1, 2):  # also what libraries write
            os.dup2(file.fileno(), descriptor)
    try:
        with stoppable():
            arms.run_job(experiment, job, Callbacks(), _meter)
    except (UserError, RunError) as error:
        print(error, file=sys.stderr, flush=True)
        raise
    except (SignalArrived, Stopped) as stopped:
        raise RunError(str(stopped)) from None  # Stopped itself cannot be pickled
    except Exception:
        traceback.print_exc()
        raise
    finally:
        gc.collect()  # frees the job's models


def _watch_parent() -> None:
    """In a worker: when the main process is gone, however it ended, save and exit as on SIGTERM."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def stop() -> None:
        parent.join()
        while True:  # the first signal stops a run, which saves; the next one ends the idle process
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    threading.Thread(target=stop, daemon=True).start()
