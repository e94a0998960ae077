"""Arms from one start under matched budgets, measured at the same positions, put beside each other by one command."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forethought.config import RunError
from forethought.run.folder import RunLog
from forethought.run.signals import SignalArrived, Stopped
from forethought.run.trackers import Callbacks
from forethought.tools import report
from forethought.tools.experiment import arms, asked, table
from forethought.tools.experiment.design import BASE, Experiment, Job, read
from forethought.tools.experiment.workers import WorkerPool
from forethought.tools.report.comparison import Verdict

DESCRIBED = "experiment.json"


def compare(
    path: str | Path, overrides: dict[str, Any] | None = None, observer: Callbacks | None = None
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
    began, meter = time.perf_counter(), arms.Meter()
    experiment, observer = read(path, overrides or {}), observer or Callbacks()
    todo = [job for job in experiment.jobs if not arms.finished(experiment, job)]
    asked.check(experiment)
    arms.measure_base(experiment, observer, meter)
    failed: dict[str, str] = {}
    try:
        if experiment.processes == 1:
            failed = _one_by_one(experiment, todo, observer, meter)
        else:
            failed = WorkerPool(experiment, todo).run(observer)
    except (SignalArrived, Stopped) as stopped:
        _publish(experiment, failed, began)
        kept = f"finished arms are kept in {experiment.run}; go on with the same command"
        raise Stopped(stopped.number, kept) from None
    verdicts, page = _publish(experiment, failed, began)
    if failed:
        name, why = next(iter(failed.items()))
        raise RunError(f"{len(failed)} of {len(experiment.jobs)} arms failed, first {name}: {why}; the others: {page}")
    return verdicts, page


def _one_by_one(experiment: Experiment, todo: list[Job], observer: Callbacks, meter: arms.Meter) -> dict[str, str]:
    """All jobs in this process. Returns what failed, and why; whatever follows a failed arm's budget fails too."""
    failed: dict[str, str] = {}
    for number, job in enumerate(todo, 1):
        observer.part(f"{job.name} ({number} of {len(todo)})")
        try:
            if job.needs in failed:
                raise RunError(f"{job.needs}, whose budget it follows, failed")
            arms.run_job(experiment, job, observer, meter)
        except RunError as error:
            failed[job.name] = str(error)
    return failed


def _publish(experiment: Experiment, failed: dict[str, str], began: float) -> tuple[list[Verdict], Path]:
    done = [job for job in experiment.jobs if arms.finished(experiment, job)]
    rows = table.rows(experiment, done)
    verdicts = table.judge(experiment, rows, done)
    log = RunLog(experiment.run)
    log.write_json("compare.json", [dataclasses.asdict(row) for row in rows])
    described = _described(experiment, verdicts, done, failed)
    log.write_json(DESCRIBED, {**described, "spent": _spent(log, done, time.perf_counter() - began)})
    return verdicts, report.write_comparison(experiment.run)


def _spent(log: RunLog, done: Sequence[Job], seconds: float) -> dict[str, float]:
    """Seconds of this call and of those before it that came to their end, and CPU seconds of all finished runs."""
    before = log.read_json(DESCRIBED).get("spent", {}) if (log.path / DESCRIBED).is_file() else {}
    files = [log.path / name / arms.SPENT for name in (BASE, *(job.name for job in done))]
    spent = [RunLog(file.parent).read_json(file.name)["cpu_seconds"] for file in files if file.is_file()]
    return {"seconds": round(before.get("seconds", 0.0) + seconds, 1), "cpu_seconds": round(sum(spent), 1)}


def _described(
    experiment: Experiment, verdicts: list[Verdict], done: Sequence[Job], failed: dict[str, str]
) -> dict[str, Any]:
    """What the page says besides the rows."""
    names = {job.name for job in done}
    return {
        "name": experiment.name,
        "model": experiment.start.model.path,
        "corpus": experiment.start.corpus.path,
        "held_out": experiment.start.evaluate.path,
        "arms": {
            name: {
                "seeds": [job.seed for job in experiment.of(name) if job.name in names],
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
                "published": dataclasses.asdict(curve.published) if curve.published else None,
            }
            for curve in experiment.curves
        ],
        "claims": [dataclasses.asdict(one) for one in verdicts],
        "missing": {job.name: failed.get(job.name, "") for job in experiment.jobs if job.name not in names},
    }
