"""Arms from one start under matched budgets, measured at the same positions, put beside each other by one command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from forethought import report
from forethought.config import RunError, UserError
from forethought.experiment import arms, table
from forethought.experiment.design import Experiment, Job, read
from forethought.interrupts import Gate, SignalArrived, Stopped
from forethought.loop import Observer, Silent
from forethought.runlog import RunLog

POLL_S = 0.2


def compare(
    path: str | Path, overrides: dict[str, Any] | None = None, observer: Observer | None = None
) -> tuple[list[table.Verdict], Path]:
    """Train every arm of an experiment with every seed, measure them, and write the table and the page.

    What is finished is not done again, and what was stopped goes on. `overrides`: see `design.read`. Writes
    RUN/compare.json (a list of rows: arm, seed or `all`, metric, value, low, high), RUN/experiment.json (what the page
    needs besides) and RUN/compare.html. Returns the verdicts on the experiment's claims, and the page.

    Raises:
        UserError: a mistake in the experiment, or an arm that was made with other options.
        RunError: an arm cannot go on.
        Stopped: SIGINT or SIGTERM; the same call goes on.
    """
    experiment, observer = read(path, overrides or {}), observer or Silent()
    again = f"finished arms are kept in {experiment.run}; go on with the same command"
    gate = Gate()
    try:
        arms.measure_base(experiment, observer)
        if experiment.processes == 1:
            for job in experiment.jobs:
                arms.run_job(experiment, job, observer)
        else:
            with gate.installed(), gate.passing():
                _Pool(experiment, {"path": str(path), "overrides": overrides or {}}).run(observer)
    except (SignalArrived, Stopped) as stopped:
        raise Stopped(stopped.number, again) from None
    rows = table.rows(experiment)
    verdicts = table.judge(experiment, rows)
    log = RunLog(experiment.run)
    log.write_json("compare.json", rows)
    log.write_json("experiment.json", _described(experiment, verdicts))
    return verdicts, report.write_comparison(experiment.run)


def _described(experiment: Experiment, verdicts: list[table.Verdict]) -> dict[str, Any]:
    """What the page says besides the rows."""
    return {
        "name": experiment.name,
        "model": experiment.start.model.path,
        "corpus": experiment.start.corpus.path,
        "held_out": experiment.start.evaluate.path,
        "arms": {
            name: {
                "seeds": [job.seed for job in experiment.of(name)],
                "options": experiment.arms[name].options,
                "budget": experiment.arms[name].budget,
            }
            for name in experiment.named
        },
        "sweeps": [
            {"name": curve.name, "option": curve.option, "points": [list(point) for point in curve.points]}
            for curve in experiment.curves
        ],
        "claims": table.plain(verdicts),
    }


class _Pool:
    """Jobs in processes of their own, a few at a time. Each has its share of the cores."""

    def __init__(self, experiment: Experiment, asked: dict[str, Any]):
        self.experiment, self.asked = experiment, asked
        self.waiting = list(experiment.jobs)
        self.running: list[tuple[Job, subprocess.Popen[bytes]]] = []
        self.done: set[str] = set()

    def run(self, observer: Observer) -> None:
        """All jobs. When one fails, or a signal comes, the others are told to save and leave, and are waited for."""
        try:
            while self.waiting or self.running:
                self._start()
                observer.phase("comparing", len(self.done), len(self.experiment.jobs))
                time.sleep(POLL_S)
                for entry in [one for one in self.running if one[1].poll() is not None]:
                    self._finish(*entry)
            observer.phase("comparing", len(self.done), len(self.experiment.jobs))
        finally:
            for _, process in self.running:
                process.send_signal(signal.SIGTERM)
            for _, process in self.running:
                process.wait()

    def _start(self) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // self.experiment.processes))
        for job in [one for one in self.waiting if one.needs is None or one.needs in self.done]:
            if len(self.running) == self.experiment.processes:
                return
            self.waiting.remove(job)
            asked = json.dumps({**self.asked, "job": job.name})
            with self._log(job).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "forethought.experiment.worker", asked],
                    env={**os.environ, "OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1"},
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,  # Ctrl-C reaches this process, which tells the others
                )  # fmt: skip
            self.running.append((job, process))

    def _finish(self, job: Job, process: subprocess.Popen[bytes]) -> None:
        self.running.remove((job, process))
        if process.returncode == 0:
            self.done.add(job.name)
            return
        lines = self._log(job).read_text(errors="replace").strip().splitlines() or [f"status {process.returncode}"]
        raise (UserError if process.returncode == 2 else RunError)(f"{job.name}: {lines[-1]}")

    def _log(self, job: Job) -> Path:
        """Where a job's process writes its messages."""
        folder = self.experiment.run / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{job.arm}-seed-{job.seed}.log"
