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
from forethought.experiment import arms, table, worker
from forethought.experiment.design import Experiment, Job, read
from forethought.interrupts import Gate, SignalArrived, Stopped
from forethought.loop import Observer, Silent
from forethought.report.comparison import Verdict
from forethought.runlog import RunLog

POLL_S = 0.2


def compare(
    path: str | Path, overrides: dict[str, Any] | None = None, observer: Observer | None = None
) -> tuple[list[Verdict], Path]:
    """Train every arm of an experiment with every seed, measure them, and write the table and the page.

    What is finished is not done again, and what was stopped goes on. `overrides`: see `design.read`. Writes
    RUN/compare.json (a list of rows: arm, seed or `all`, metric, value, low, high), RUN/experiment.json (what the page
    needs besides) and RUN/compare.html, of what is finished, also when an arm fails or a signal comes. Returns the
    verdicts on the experiment's claims, and the page.

    Raises:
        UserError: a mistake in the experiment, or an arm that was made with other options.
        RunError: arms that cannot go on; the others were finished first.
        Stopped: SIGINT or SIGTERM; the same call goes on.
    """
    experiment, observer = read(path, overrides or {}), observer or Silent()
    todo = [job for job in experiment.jobs if not arms.finished(experiment, job)]
    arms.measure_base(experiment, observer)
    failed: dict[str, str] = {}
    try:
        if experiment.processes == 1:
            failed = _one_by_one(experiment, todo, observer)
        else:
            failed = _Pool(experiment, todo, {"path": str(path), "overrides": overrides or {}}).run(observer)
    except (SignalArrived, Stopped) as stopped:
        _publish(experiment, failed)
        kept = f"finished arms are kept in {experiment.run}; go on with the same command"
        raise Stopped(stopped.number, kept) from None
    verdicts, page = _publish(experiment, failed)
    if failed:
        name, why = next(iter(failed.items()))
        raise RunError(f"{len(failed)} of {len(experiment.jobs)} arms failed, first {name}: {why}; the others: {page}")
    return verdicts, page


def _one_by_one(experiment: Experiment, todo: list[Job], observer: Observer) -> dict[str, str]:
    """All jobs in this process. Returns what failed, and why; whatever follows a failed arm's budget fails too."""
    failed: dict[str, str] = {}
    for job in todo:
        try:
            if job.needs in failed:
                raise RunError(f"{job.needs}, whose budget it follows, failed")
            arms.run_job(experiment, job, observer)
        except RunError as error:
            failed[job.name] = str(error)
    return failed


def _publish(experiment: Experiment, failed: dict[str, str]) -> tuple[list[Verdict], Path]:
    rows = table.rows(experiment)
    verdicts = table.judge(experiment, rows)
    log = RunLog(experiment.run)
    log.write_json("compare.json", rows)
    log.write_json("experiment.json", _described(experiment, verdicts, failed))
    return verdicts, report.write_comparison(experiment.run)


def _described(experiment: Experiment, verdicts: list[Verdict], failed: dict[str, str]) -> dict[str, Any]:
    """What the page says besides the rows."""
    done = {job.name for job in experiment.jobs if arms.finished(experiment, job)}
    return {
        "name": experiment.name,
        "model": experiment.start.model.path,
        "corpus": experiment.start.corpus.path,
        "held_out": experiment.start.evaluate.path,
        "arms": {
            name: {
                "seeds": [job.seed for job in experiment.of(name) if job.name in done],
                "options": experiment.arms[name].options,
                "budget": experiment.arms[name].budget,
            }
            for name in experiment.named
        },
        "sweeps": [
            {
                "name": curve.name,
                "option": curve.option,
                "points": [[value, curve.label(value, arm)] for value, arm in curve.points],
                "seeds": list(curve.seeds),
            }
            for curve in experiment.curves
        ],
        "claims": table.plain(verdicts),
        "missing": {job.name: failed.get(job.name, "") for job in experiment.jobs if job.name not in done},
    }


class _Pool:
    """Jobs in processes of their own, a few at a time. Each has its share of the cores."""

    def __init__(self, experiment: Experiment, todo: list[Job], asked: dict[str, Any]):
        self.experiment, self.asked = experiment, asked
        self.waiting = list(todo)
        self.running: list[tuple[Job, subprocess.Popen[bytes]]] = []
        self.done = {job.name for job in experiment.jobs} - {job.name for job in todo}
        self.failed: dict[str, str] = {}

    def run(self, observer: Observer) -> dict[str, str]:
        """All jobs. Returns what failed. When a signal comes, the others are told to save and leave, and waited for.

        Raises UserError for a user's mistake in an arm, SignalArrived.
        """
        gate = Gate()
        try:
            with gate.installed():
                while self.waiting or self.running:
                    self._start()
                    observer.phase("comparing", len(self.done), len(self.experiment.jobs))
                    with gate.passing():
                        time.sleep(POLL_S)
                    for entry in [one for one in self.running if one[1].poll() is not None]:
                        self._finish(*entry)
            observer.phase("comparing", len(self.done), len(self.experiment.jobs))
        finally:
            for _, process in self.running:
                process.send_signal(signal.SIGTERM)
            for _, process in self.running:
                process.wait()
        return self.failed

    def _start(self) -> None:
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.experiment.processes))
        for job in [one for one in self.waiting if one.needs in self.failed]:
            self.waiting.remove(job)
            self.failed[job.name] = f"{job.needs}, whose budget it follows, failed"
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
        log = self._log(job)
        lines = log.read_text(errors="replace").strip().splitlines()
        if process.returncode == worker.USER_ERROR:
            raise UserError(f"{job.name}: {lines[-1]}")
        said = lines[-1] if process.returncode == worker.RUN_ERROR else f"ended with status {process.returncode}"
        self.failed[job.name] = f"{said} (see {log})"

    def _log(self, job: Job) -> Path:
        """Where a job's process writes its messages."""
        folder = self.experiment.run / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{job.arm}-seed-{job.seed}.log"
