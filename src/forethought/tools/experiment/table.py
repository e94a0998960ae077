"""Records of all arms -> rows of compare.json, and the verdict on each claim."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import permutations
from typing import Any

from forethought.eval.heldout import Drawn, differences, drawn_together, figures
from forethought.eval.intervals import MIN_CLUSTERS
from forethought.run.folder import RunLog
from forethought.tools.experiment import questions
from forethought.tools.experiment.arms import SPENT, Recorded, post_records, records, weights
from forethought.tools.experiment.design import BASE, Claim, Experiment, Job, label
from forethought.tools.report.comparison import ALL, COSTS, QUESTIONS, Row, Verdict


def rows(experiment: Experiment, done: Sequence[Job]) -> list[Row]:
    """Every metric of every arm: by seed, and `all` with intervals over seeds and documents. `done`: finished jobs.

    `minus/ARM/METRIC` is the paired difference to the base and to each other arm of the file. `cost/...` comes from
    the runs; its low and high are the minimum and maximum over seeds. `questions/...` are results of benchmark
    questions. Arms without finished jobs have no rows.
    """
    measured = _measured(experiment, done)

    @cache
    def drawn(arm: str, seeds: tuple[int, ...]) -> dict[str, Drawn]:
        return drawn_together(*([measured[one][seed] for seed in seeds] for one in (arm, BASE)))

    table = _rows(BASE, ALL, figures(drawn(BASE, tuple(measured[BASE]))))
    for name in [name for name in experiment.arms if measured[name]]:
        table += _rows(name, ALL, figures(drawn(name, tuple(measured[name]))))
        for seed in measured[name]:
            table += _rows(name, seed, figures(drawn(name, (seed,))))
        table += _costs(experiment, name, list(measured[name]))
    for name, other in permutations((BASE, *experiment.named), 2):
        seeds = tuple(measured[name])
        if name != BASE and seeds and measured[name].keys() <= measured[other].keys():
            table += _rows(name, ALL, differences(drawn(name, seeds), drawn(other, seeds)), f"minus/{other}/")
    swept = [(curve, value, name) for curve in experiment.curves for value, name in curve.points]
    for curve, value, name in swept:
        seeds = tuple(seed for seed in measured[name] if seed in curve.seeds)
        if seeds and name in experiment.named:
            table += _rows(label(curve, value, name), ALL, figures(drawn(name, seeds)))
    return table + _answers(experiment, done)


def _measured(experiment: Experiment, done: Sequence[Job]) -> dict[str, dict[int, Recorded]]:
    """The records of each arm and seed; the base's are the same for every seed, but for the phase after it."""
    start = records(experiment.run / BASE)
    after = {job.seed: post_records(experiment, experiment.run / BASE / f"seed-{job.seed}") for job in experiment.jobs}
    measured = {BASE: {seed: start | some for seed, some in after.items()}} | {name: {} for name in experiment.arms}
    for job in done:
        folder = experiment.run / job.name
        measured[job.arm][job.seed] = records(folder) | post_records(experiment, folder)
    return measured


def judge(experiment: Experiment, table: Sequence[Row], done: Sequence[Job]) -> list[Verdict]:
    """One verdict for each claim, metric and arm that it is compared with."""
    found = {(row.arm, row.metric): row for row in table if row.seed == ALL}
    verdicts = []
    for claim in experiment.claims:
        arm, margin, limit = claim.arm, claim.margin, claim.at_most
        verdicts += [_equal(experiment, done, arm, other) for other in claim.equals]
        for metric in claim.metrics:
            mine = found.get((arm, metric))
            verdicts += [_above(claim, metric, other, found) for other in claim.above]
            for other in claim.not_above:
                said = f"{arm} gains at most {margin:g} over {other} in {metric}"
                difference = found.get((arm, f"minus/{other}/{metric}"))
                verdicts.append(_verdict(said, [difference], lambda one, m=margin: one.high <= m, "difference {}"))
            if limit is not None:
                said = f"{arm} at most {limit:g} in {metric}"
                verdicts.append(_verdict(said, [mine], lambda one, limit=limit: one.high <= limit, "{}"))
    return verdicts


def _above(claim: Claim, metric: str, other: str, found: Mapping[tuple[str, str], Row]) -> Verdict:
    """By the paired difference; without one, and with another metric for the other arm, by two intervals."""
    against = f" (its {claim.against})" if claim.against else ""
    said = f"{claim.arm} above {other}{against} in {metric}"
    difference = None if against else found.get((claim.arm, f"minus/{other}/{metric}"))
    if difference is not None:
        return _verdict(said, [difference], lambda one: one.low > claim.margin, "difference {}")
    pair = [found.get((claim.arm, metric)), found.get((other, claim.against or metric))]
    apart = f"{said}, intervals apart"
    return _verdict(apart, pair, lambda one, two: one.low > two.high + claim.margin, "{} against {}")


def _verdict(said: str, found: Sequence[Row | None], holds: Callable[..., bool], evidence: str) -> Verdict:
    known = [row for row in found if row is not None]
    if len(known) < len(found):
        return _unknown(said)
    if any(row.low is None or row.high is None for row in known):
        few = f"undecided: a figure has no interval, as of fewer than {MIN_CLUSTERS} documents or questions"
        return Verdict(claim=said, holds=None, evidence=few)
    shown = [f"{row.value:.4g} [{row.low:.4g}, {row.high:.4g}]" for row in known]
    return Verdict(claim=said, holds=holds(*known), evidence=evidence.format(*shown))


def _unknown(claim: str) -> Verdict:
    said = "a figure is missing: not measured (yet), or a share of a gain that is not positive (docs/metrics.md)"
    return Verdict(claim=claim, holds=None, evidence=said)


def _equal(experiment: Experiment, done: Sequence[Job], arm: str, other: str) -> Verdict:
    """Over the seeds that both have finished."""
    said = f"{arm} equal to {other}, bit for bit"
    mine, theirs = (
        {job.seed: weights(experiment.run / job.name) for job in done if job.arm == name} for name in (arm, other)
    )
    same = [mine[seed] == theirs[seed] for seed in mine if seed in theirs]
    if not same:
        return _unknown(said)
    return Verdict(claim=said, holds=all(same), evidence=f"the same weights with {sum(same)} of {len(same)} seeds")


def _rows(arm: str, seed: int | str, found: Mapping[str, float | int], prefix: str = "") -> list[Row]:
    """One row for each figure; its interval is NAME/low and NAME/high, where there is one."""
    return [
        Row(
            arm=arm,
            seed=seed,
            metric=f"{prefix}{name}",
            value=value,
            low=found.get(f"{name}/low"),
            high=found.get(f"{name}/high"),
        )
        for name, value in found.items()
        if not name.endswith(("/low", "/high"))
    ]


def _costs(experiment: Experiment, arm: str, seeds: Sequence[int]) -> list[Row]:
    summaries = {job.seed: _spent(experiment, job) for job in experiment.of(arm) if job.seed in seeds}
    table = []
    for cost in COSTS:
        values = {seed: summary[cost] for seed, summary in summaries.items() if cost in summary}
        for seed, value in values.items():
            table += _rows(arm, seed, {f"cost/{cost}": value})
        if values:
            mean, name = math.fsum(values.values()) / len(values), f"cost/{cost}"
            ends = {f"{name}/low": min(values.values()), f"{name}/high": max(values.values())}
            table += _rows(arm, ALL, {name: mean, **ends})
    return table


def _spent(experiment: Experiment, job: Job) -> dict[str, Any]:
    """The costs in a run's summary, and the job's CPU seconds, with measuring."""
    log = RunLog(experiment.run / job.name)
    more = log.read_json(SPENT, {})
    return {**log.read_json("summary.json"), **{name: more[name] for name in ("cpu_seconds",) if name in more}}


def _answers(experiment: Experiment, done: Sequence[Job]) -> list[Row]:
    """Benchmark results of each arm, and their differences to the base's on the same questions."""
    if not experiment.ask:
        return []
    base = questions.answered(experiment.run / BASE)
    table = _answered(BASE, ALL, questions.pooled([base]))
    for name in experiment.arms:
        found = {job.seed: questions.answered(experiment.run / job.name) for job in done if job.arm == name}
        for seed, one in found.items():
            table += _answered(name, seed, questions.pooled([one]))
        if found:
            table += _answered(name, ALL, questions.pooled(list(found.values())))
            table += _answered(name, ALL, questions.over(list(found.values()), base), f"minus/{BASE}/")
    return table


def _answered(arm: str, seed: int | str, found: Mapping[str, float | int], prefix: str = "") -> list[Row]:
    return _rows(arm, seed, questions.with_intervals(dict(found), -1.0 if prefix else 0.0), f"{prefix}{QUESTIONS}/")
