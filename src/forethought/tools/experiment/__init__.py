"""Trains arms from one start with matched budgets, measures them at the same positions, and compares them."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from forethought.config import RunError, UserError
from forethought.run.folder import RunLog
from forethought.run.signals import SignalArrived, Stopped, stoppable
from forethought.run.trackers import Callbacks
from forethought.tools import report
from forethought.tools.experiment import arms, questions, table
from forethought.tools.experiment.design import BASE, Experiment, Job, label, read
from forethought.tools.experiment.workers import WorkerPool
from forethought.tools.report.comparison import Arm, Described, Verdict

DESCRIBED = "experiment.json"


def compare(
    path: str | Path, overrides: dict[str, Any] | None = None, observer: Callbacks | None = None
) -> tuple[list[Verdict], Path]:
    """Train every arm of an experiment with every seed, measure them, and write the table and the page.

    Finished arms are kept, stopped ones are resumed. `overrides`: see `design.read`. Writes RUN/compare.json (rows of
    arm, seed or `all`, metric, value, low, high), RUN/experiment.json (what else the page shows) and RUN/compare.html
    of the finished arms, also when an arm ends in an error or a signal arrives. Returns the verdicts on the claims, and
    the page. With `processes` above 1, a script calls this under `if __name__ == "__main__":`, since workers import it.

    Raises:
        UserError: a mistake in the experiment, or an arm that was trained with other options.
        RunError: some arms failed; the others were finished first.
        Stopped: SIGINT, SIGTERM or another of `signals.ENDING`; the same call resumes.
    """
    began, meter = time.perf_counter(), arms.Meter()
    experiment, observer = read(path, overrides or {}), observer or Callbacks()
    todo = [job for job in experiment.jobs if not arms.finished(experiment, job)]
    questions.check(experiment)
    if todo:
        arms.check_text(experiment)
    failed: dict[str, str] = {}
    measured = False
    try:
        with stoppable():
            arms.measure_base(experiment, observer, meter)
            measured = True
            if experiment.processes == 1:
                failed = _one_by_one(experiment, todo, observer, meter)
            else:
                failed = WorkerPool(experiment, todo).run(observer)
    except (SignalArrived, Stopped, UserError) as stopped:
        if measured:
            _publish(experiment, failed, began)
        if isinstance(stopped, UserError):
            raise
        kept = f"finished arms are kept in {experiment.run}; resume with the same command"
        raise Stopped(stopped.number, kept) from None
    verdicts, page = _publish(experiment, failed, began)
    if failed:
        name, why = next(iter(failed.items()))
        raise RunError(f"{len(failed)} of {len(experiment.jobs)} arms failed, first {name}: {why}; the others: {page}")
    return verdicts, page


def _one_by_one(experiment: Experiment, todo: list[Job], observer: Callbacks, meter: arms.Meter) -> dict[str, str]:
    """Run all jobs in this process. Returns the failed ones with the reason."""
    failed: dict[str, str] = {}
    for number, job in enumerate(todo, 1):
        observer.part(f"{job.name} ({number} of {len(todo)})")
        try:
            if job.needs in failed:
                raise RunError(f"{job.needs}, whose budget it follows, failed")
            arms.run_job(experiment, job, observer, meter)
        except RunError as error:
            failed[job.name] = str(error)
        except UserError as error:
            raise UserError(f"{job.name}: {error}") from None
    return failed


def _publish(experiment: Experiment, failed: dict[str, str], began: float) -> tuple[list[Verdict], Path]:
    """Write the table and the page of the finished jobs."""
    done = [job for job in experiment.jobs if arms.finished(experiment, job)]
    rows = table.rows(experiment, done)
    verdicts = table.judge(experiment, rows, done)
    log, start, names = RunLog(experiment.run), experiment.start, {job.name for job in done}
    log.write_json("compare.json", [asdict(row) for row in rows])
    described = Described(
        name=experiment.name,
        model=start.model.path,
        corpus=start.corpus.path,
        held_out=start.evaluate.path,
        arms={
            name: Arm(options=arm.options, budget={**arm.budget}, seeds=[job.seed for job in done if job.arm == name])
            for name, arm in experiment.arms.items()
            if name in experiment.named
        },
        sweeps=[
            replace(curve, points=[(value, label(curve, value, arm)) for value, arm in curve.points])
            for curve in experiment.curves
        ],
        claims=verdicts,
        missing={job.name: failed.get(job.name, "") for job in experiment.jobs if job.name not in names},
        generic=_generic(log, done),
        spent=_spent(log, done, time.perf_counter() - began),
    )
    log.write_json(DESCRIBED, asdict(described))
    return verdicts, report.write_comparison(experiment.run)


def _generic(log: RunLog, done: Sequence[Job]) -> dict[str, str]:
    """The generic thought of the base and of each arm's first seed."""
    first = {BASE: BASE}
    for job in done:
        first.setdefault(job.arm, job.name)
    files = {name: log.path / folder / arms.GENERIC for name, folder in first.items()}
    return {name: RunLog(file.parent).read_json(file.name)["text"] for name, file in files.items() if file.is_file()}


def _spent(log: RunLog, done: Sequence[Job], seconds: float) -> dict[str, float]:
    """Seconds of this call and of completed calls before it, and CPU seconds of all finished runs."""
    before = log.read_json(DESCRIBED, {}).get("spent", {})
    files = [log.path / name / arms.SPENT for name in (BASE, *(job.name for job in done))]
    spent = [RunLog(file.parent).read_json(file.name)["cpu_seconds"] for file in files if file.is_file()]
    return {"seconds": round(before.get("seconds", 0.0) + seconds, 1), "cpu_seconds": round(sum(spent), 1)}
