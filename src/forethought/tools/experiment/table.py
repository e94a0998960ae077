"""Records of all arms -> rows of compare.json, and the verdict on each claim."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from forethought.eval.heldout import Drawn, differences, drawn_together, pooled
from forethought.run.folder import RunLog
from forethought.tools.experiment import asked
from forethought.tools.experiment.arms import SPENT, Recorded, post_records, records, weights
from forethought.tools.experiment.design import BASE, Claim, Experiment, Job
from forethought.tools.report.comparison import ALL, COSTS, QUESTIONS, Row, Verdict


def rows(experiment: Experiment, done: Sequence[Job]) -> list[Row]:
    """Every metric of every arm: each seed, and `all` with intervals over seeds and documents. `done`: finished jobs.

    `minus/ARM/METRIC` is the paired difference to the base and to each other arm that the file names. `cost/...` comes
    from the runs; its low and high are the least and the most of the seeds. `questions/...` are answers to questions.
    Arms that are not finished have no rows.
    """
    start = records(experiment.run / BASE)
    after = {job.seed: post_records(experiment, experiment.run / BASE / f"seed-{job.seed}") for job in experiment.jobs}
    base = {seed: start | some for seed, some in after.items()}
    measured: dict[str, dict[int, Recorded]] = {name: {} for name in experiment.arms}
    for job in done:
        folder = experiment.run / job.name
        measured[job.arm][job.seed] = records(folder) | post_records(experiment, folder)
    table = _rows(BASE, ALL, pooled([start], [start]) | pooled(list(after.values()), list(after.values())))
    for name, seeds in measured.items():
        if seeds:
            table += _of_arm(name, seeds, base) + _costs(experiment, name, list(seeds))
    table += _differences({BASE: base} | {name: measured[name] for name in experiment.named})
    return table + _own_points(experiment, measured, base) + _answers(experiment, done)


def judge(experiment: Experiment, table: Sequence[Row], done: Sequence[Job]) -> list[Verdict]:
    """One verdict for each claim, metric and arm that it is compared with."""
    found = {(row.arm, row.metric): row for row in table if row.seed == ALL}
    verdicts = []
    for claim in experiment.claims:
        verdicts += [_equal(experiment, done, claim.arm, other) for other in claim.equals]
        for metric in claim.metrics:
            mine, theirs = found.get((claim.arm, metric)), claim.against or metric
            verdicts += [_above(claim, mine, found.get((other, theirs)), other, metric) for other in claim.above]
            for other in claim.not_above:
                verdicts.append(_not_above(claim, found.get((claim.arm, f"minus/{other}/{metric}")), other, metric))
            if claim.at_most is not None:
                verdicts.append(_at_most(claim, mine, metric))
    return verdicts


def _rows(arm: str, seed: int | str, figures: Mapping[str, float | int]) -> list[Row]:
    names = [name for name in figures if not name.endswith(("/low", "/high"))]
    return [
        Row(
            arm=arm,
            seed=seed,
            metric=name,
            value=figures[name],
            low=figures.get(f"{name}/low", figures[name]),
            high=figures.get(f"{name}/high", figures[name]),
        )
        for name in names
    ]


def _of_arm(arm: str, seeds: dict[int, Recorded], base: dict[int, Recorded]) -> list[Row]:
    table = _rows(arm, ALL, pooled(list(seeds.values()), [base[seed] for seed in seeds]))
    for seed, one in seeds.items():
        table += _rows(arm, seed, pooled([one], [base[seed]]))
    return table


def _own_points(
    experiment: Experiment, measured: dict[str, dict[int, Recorded]], base: dict[int, Recorded]
) -> list[Row]:
    """The points of sweeps that are arms of their own, over no more than the sweep's seeds."""
    table = []
    for curve in experiment.curves:
        for value, arm in curve.points:
            seeds = {seed: one for seed, one in measured[arm].items() if seed in curve.seeds}
            if arm in experiment.named and seeds:
                mine, theirs = list(seeds.values()), [base[seed] for seed in seeds]
                table += _rows(curve.label(value, arm), ALL, pooled(mine, theirs))
    return table


def _differences(measured: dict[str, dict[int, Recorded]]) -> list[Row]:
    """Each arm with the base and with every arm that has its seeds too; what is drawn of an arm is drawn once."""
    table: list[Row] = []
    known: dict[tuple[str, tuple[int, ...]], dict[str, Drawn]] = {}

    def drawn(arm: str, seeds: tuple[int, ...]) -> dict[str, Drawn]:
        if (arm, seeds) not in known:
            known[arm, seeds] = drawn_together([measured[arm][seed] for seed in seeds])
        return known[arm, seeds]

    for arm, seeds in measured.items():
        for other, theirs in measured.items():
            if arm not in (BASE, other) and seeds and seeds.keys() <= theirs.keys():
                figures = differences(drawn(arm, tuple(seeds)), drawn(other, tuple(seeds)))
                table += _rows(arm, ALL, {f"minus/{other}/{name}": value for name, value in figures.items()})
    return table


def _costs(experiment: Experiment, arm: str, seeds: Sequence[int]) -> list[Row]:
    jobs = [job for job in experiment.of(arm) if job.seed in seeds]
    summaries = {job.seed: _spent(experiment, job) for job in jobs}
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
    """What a job cost: of its run's summary, and with measuring the CPU seconds."""
    log = RunLog(experiment.run / job.name)
    more = log.read_json(SPENT) if (log.path / SPENT).is_file() else {}
    return {**log.read_json("summary.json"), **{name: more[name] for name in ("cpu_seconds",) if name in more}}


def _answers(experiment: Experiment, done: Sequence[Job]) -> list[Row]:
    """Answers to questions: each arm's, and the differences to the base, which was asked the same."""
    if not experiment.ask:
        return []
    base = asked.answered(experiment.run / BASE)
    table = _answered(BASE, ALL, asked.pooled([base]))
    for name in experiment.arms:
        found = {job.seed: asked.answered(experiment.run / job.name) for job in done if job.arm == name}
        for seed, one in found.items():
            table += _answered(name, seed, asked.pooled([one]))
        if found:
            table += _answered(name, ALL, asked.pooled(list(found.values())))
            table += _answered(name, ALL, asked.over(list(found.values()), base), f"minus/{BASE}/")
    return table


def _answered(arm: str, seed: int | str, figures: Mapping[str, float | int], before: str = "") -> list[Row]:
    found = asked.with_intervals(dict(figures))
    return _rows(arm, seed, {f"{before}{QUESTIONS}/{name}": value for name, value in found.items()})


def _shown(row: Row) -> str:
    return f"{row.value:.4g} [{row.low:.4g}, {row.high:.4g}]"


def _unknown(claim: str) -> Verdict:
    said = "a figure of it is not there: not measured (yet), or a share of a gain that is none (docs/metrics.md)"
    return Verdict(claim=claim, holds=None, evidence=said)


def _above(claim: Claim, mine: Row | None, theirs: Row | None, other: str, metric: str) -> Verdict:
    against = f" (its {claim.against})" if claim.against else ""
    said = f"{claim.arm} above {other}{against} in {metric}, intervals apart"
    if mine is None or theirs is None:
        return _unknown(said)
    evidence = f"{_shown(mine)} against {_shown(theirs)}"
    return Verdict(claim=said, holds=mine.low > theirs.high, evidence=evidence)


def _not_above(claim: Claim, difference: Row | None, other: str, metric: str) -> Verdict:
    said = f"{claim.arm} gains at most {claim.margin:g} over {other} in {metric}"
    if difference is None:
        return _unknown(said)
    return Verdict(claim=said, holds=difference.high <= claim.margin, evidence=f"difference {_shown(difference)}")


def _at_most(claim: Claim, mine: Row | None, metric: str) -> Verdict:
    said = f"{claim.arm} at most {claim.at_most:g} in {metric}"
    if mine is None or claim.at_most is None:
        return _unknown(said)
    return Verdict(claim=said, holds=mine.high <= claim.at_most, evidence=_shown(mine))


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
