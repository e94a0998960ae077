"""Records of all arms -> rows of compare.json, and the verdict on each claim."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from forethought.evaluation.text import pooled, pooled_paired
from forethought.experiment.arms import Recorded, records, weights
from forethought.experiment.design import BASE, Claim, Experiment
from forethought.runlog import RunLog

Row = dict[str, Any]
"""arm, seed (a number, or `all`), metric, value, low, high."""

COSTS = ("flops", "flops_rollout", "flops_update", "tokens", "t_flop_tokens", "steps", "seconds")
ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a claim holds, and the figures that say so."""

    claim: str
    holds: bool | None
    """None where a figure that it needs was not measured."""
    evidence: str


def rows(experiment: Experiment) -> list[Row]:
    """Every metric of every arm: each seed, and `all` with intervals over seeds and documents.

    `minus/ARM/METRIC` is the paired difference to the base and to each arm that follows a budget: what one would have
    done instead. `cost/...` comes from the runs; its low and high are the least and the most of the seeds.
    """
    measured = {name: [records(experiment.run / job.name) for job in experiment.of(name)] for name in experiment.arms}
    base = records(experiment.run / BASE)
    table = _rows(BASE, ALL, pooled([base], [base]))
    rivals = [name for name, arm in experiment.arms.items() if arm.budget]
    for name, seeds in measured.items():
        jobs = experiment.of(name)
        for job, one in zip(jobs, seeds, strict=True):
            table += _rows(name, job.seed, pooled([one], [base]))
        table += _rows(name, ALL, pooled(seeds, [base] * len(seeds)))
        table += _differences(name, seeds, BASE, [base] * len(seeds))
        for rival in rivals:
            theirs = {job.seed: one for job, one in zip(experiment.of(rival), measured[rival], strict=True)}
            if rival != name and all(job.seed in theirs for job in jobs):
                table += _differences(name, seeds, rival, [theirs[job.seed] for job in jobs])
        table += _costs(experiment, name)
    return table


def judge(experiment: Experiment, table: Sequence[Row]) -> list[Verdict]:
    """One verdict for each claim, metric and arm that it is compared with."""
    found = {(row["arm"], row["metric"]): row for row in table if row["seed"] == ALL}
    verdicts = []
    for claim in experiment.claims:
        verdicts += [_equal(experiment, claim.arm, other) for other in claim.equals]
        for metric in claim.metrics:
            mine = found.get((claim.arm, metric))
            verdicts += [_above(claim, mine, other, found.get((other, metric)), metric) for other in claim.above]
            verdicts += [
                _like(claim, other, found.get((claim.arm, f"minus/{other}/{metric}")), metric) for other in claim.like
            ]
            if claim.at_most is not None:
                verdicts.append(_at_most(claim, mine, metric))
    return verdicts


def plain(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """As JSON."""
    return [asdict(one) for one in verdicts]


def _rows(arm: str, seed: int | str, figures: Mapping[str, float | int]) -> list[Row]:
    names = [name for name in figures if not name.endswith(("/low", "/high"))]
    return [
        {
            "arm": arm,
            "seed": seed,
            "metric": name,
            "value": figures[name],
            "low": figures.get(f"{name}/low", figures[name]),
            "high": figures.get(f"{name}/high", figures[name]),
        }
        for name in names
    ]


def _differences(arm: str, seeds: list[Recorded], other: str, theirs: list[Recorded]) -> list[Row]:
    figures = pooled_paired(seeds, theirs)
    return _rows(arm, ALL, {f"minus/{other}/{name}": value for name, value in figures.items()})


def _costs(experiment: Experiment, arm: str) -> list[Row]:
    summaries = {
        job.seed: RunLog.open(experiment.run / job.name).read_json("summary.json") for job in experiment.of(arm)
    }
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


def _shown(row: Row) -> str:
    return f"{row['value']:.4g} [{row['low']:.4g}, {row['high']:.4g}]"


def _missing(claim: str) -> Verdict:
    return Verdict(claim=claim, holds=None, evidence="not measured")


def _above(claim: Claim, mine: Row | None, other: str, theirs: Row | None, metric: str) -> Verdict:
    said = f"{claim.arm} above {other} in {metric}, intervals apart"
    if mine is None or theirs is None:
        return _missing(said)
    evidence = f"{_shown(mine)} against {_shown(theirs)}"
    return Verdict(claim=said, holds=mine["low"] > theirs["high"], evidence=evidence)


def _like(claim: Claim, other: str, difference: Row | None, metric: str) -> Verdict:
    said = f"{claim.arm} no different from {other} in {metric}"
    if difference is None:
        return _missing(said)
    holds = difference["low"] <= 0 <= difference["high"]
    return Verdict(claim=said, holds=holds, evidence=f"difference {_shown(difference)}")


def _at_most(claim: Claim, mine: Row | None, metric: str) -> Verdict:
    said = f"{claim.arm} at most {claim.at_most:g} in {metric}"
    if mine is None or claim.at_most is None:
        return _missing(said)
    return Verdict(claim=said, holds=mine["high"] <= claim.at_most, evidence=_shown(mine))


def _equal(experiment: Experiment, arm: str, other: str) -> Verdict:
    theirs = {job.seed: weights(experiment.run / job.name) for job in experiment.of(other)}
    same = [weights(experiment.run / job.name) == theirs.get(job.seed) for job in experiment.of(arm)]
    evidence = f"the same weights with {sum(same)} of {len(same)} seeds"
    return Verdict(claim=f"{arm} equal to {other}, bit for bit", holds=all(same), evidence=evidence)
