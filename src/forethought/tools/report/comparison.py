"""The page of an experiment: what was claimed and holds or not, all arms with intervals, costs, sweeps, every seed.

RUN/compare.json       rows: arm, seed or `all`, metric, value, low, high
RUN/experiment.json    names, arms, sweeps, verdicts
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from pydantic import TypeAdapter, ValidationError

from forethought.config import UserError, flatten
from forethought.tools.report import charts, evaluation, svg
from forethought.tools.report.charts import Point
from forethought.tools.report.text import figure, signed

BASE, ALL, QUESTIONS = "base", "all", "questions"
MAIN = (
    "accuracy_think",
    "accuracy_nothink",
    "ce_think",
    "ce_nothink",
    "gain_over_base",
    "drift",
    "thought_length",
    "closed",
)
DRAWN = (("accuracy_think", "accuracy, thinking"), ("gain_over_base", "gain over the base, nats"))
PAIRED = ("accuracy_think", "ce_think", "ce_nothink")
SWEPT = ("accuracy_think", "gain_over_base")
COSTS = (
    ("flops", "FLOPs"), ("flops_rollout", "of them sampling and scoring"), ("flops_update", "of them the update"),
    ("tokens", "tokens of text"), ("t_flop_tokens", "T_flop, tokens"), ("steps", "steps"), ("seconds", "seconds"),
    ("cpu_seconds", "CPU seconds, with measuring"),
)  # fmt: skip
_EXTRA = (
    evaluation.Metric(name="gain_empty", label="Gain of an empty thought", explanation="delimiters alone"),
    evaluation.Metric(name="gain_random", label="Gain of random tokens", explanation="as many, drawn uniformly"),
    evaluation.Metric(name="gain_shuffled", label="Gain of another's thought", explanation="of another position"),
    evaluation.Metric(
        name="kept_shuffled", label="Gain that shuffling keeps", unit="share", better=-1,
        explanation="gain of another's thought divided by the own one's; near 0, or below, what is said matters",
    ),
)  # fmt: skip
_OTHERS = ("minus/", "cost/", f"{QUESTIONS}/")
METRICS = {one.name: one for one in (*evaluation.METRICS, *_EXTRA)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of compare.json."""

    arm: str
    seed: int | str
    metric: str
    value: int | float
    low: int | float
    high: int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """How an arm was trained."""

    seeds: list[int]
    options: dict[str, Any]
    budget: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Figures of others over an option."""

    said: str
    points: list[tuple[int | float | str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """An option, and for each value the arm that was trained with it."""

    name: str
    option: str
    points: list[tuple[int | float | str, str]]
    seeds: list[int]
    published: Published | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a claim holds; None where it could not be judged."""

    claim: str
    holds: bool | None
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """experiment.json."""

    name: str
    model: str
    corpus: str
    held_out: str
    arms: dict[str, Arm]
    sweeps: list[Sweep]
    claims: list[Verdict]
    missing: dict[str, str]
    """Jobs that are not finished, and why, where it is known."""
    spent: dict[str, float] = field(default_factory=dict)
    """`seconds` of all calls, and `cpu_seconds` of all runs, both with loading and measuring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells (value, interval) under named columns."""

    caption: str
    columns: list[tuple[str, str]]
    """(label, explanation)"""
    rows: list[tuple[str, list[tuple[str, str]]]]


class Figures:
    """The rows by arm, seed and metric."""

    def __init__(self, rows: Sequence[Row], described: Described):
        self._rows = {(row.arm, row.seed, row.metric): row for row in rows}
        self.described = described
        self.arms = [BASE, *described.arms]
        names = dict.fromkeys(row.metric for row in rows if not row.metric.startswith(_OTHERS))
        self.groups = sorted({name.partition("/")[0] for name in names}, key=lambda group: (group == ALL, group))
        self._metrics = [name.partition("/")[2] for name in names]
        answered = [row.metric.split("/") for row in rows if row.metric.startswith(f"{QUESTIONS}/")]
        self.asked = list(dict.fromkeys(parts[2] for parts in answered))  # tasks, and averages of them

    def row(self, arm: str, metric: str, seed: int | str = ALL) -> Row | None:
        """The row, where it was measured."""
        return self._rows.get((arm, seed, metric))

    def metrics(self, group: str) -> list[str]:
        """All metrics of a group, the main ones first."""
        known = [
            name for name in dict.fromkeys([*MAIN, *METRICS, *self._metrics]) if name not in ("positions", "documents")
        ]
        return [name for name in known if any(self.row(arm, f"{group}/{name}") for arm in self.arms)]

    def cell(self, arm: str, metric: str, unit: str, seed: int | str = ALL, plus: bool = False) -> tuple[str, str]:
        """A figure and its interval as text; an en dash where it was not measured."""
        row = self.row(arm, metric, seed)
        if row is None:
            return "–", ""
        shown = signed(row.value, unit) if plus else figure(row.value, unit)
        return shown, f"{figure(row.low, unit)} to {figure(row.high, unit)}" if seed == ALL else ""

    def point(self, arm: str, metric: str, name: str = "", cost: str = "") -> Point | None:
        """A figure to draw."""
        row, x = self.row(arm, metric), self.row(arm, cost) if cost else None
        if row is None or (cost and x is None and arm != BASE):
            return None
        place = self.arms.index(arm) if arm in self.arms else 0
        return Point(
            name=name or arm, value=row.value, low=row.low, high=row.high, x=x.value if x else 0.0, colour=place
        )


def load(run: Path) -> Figures:
    """Read the two files. Raises UserError where one is missing or broken."""
    return Figures(_read(run / "compare.json", list[Row]), _read(run / "experiment.json", Described))


def _read(path: Path, kind: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise UserError(f"{path}: is no comparison: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON: {error}") from None


def content(figures: Figures) -> dict[str, Any]:
    """What the page's template shows."""
    described = figures.described
    return {
        "experiment": described,
        "seeds": sorted({seed for arm in described.arms.values() for seed in arm.seeds}),
        "failed": sum(one.holds is False for one in described.claims),
        "unknown": sum(one.holds is None for one in described.claims),
        "tables": [_table(figures, group, main=True) for group in figures.groups],
        "whole": [_table(figures, group, main=False) for group in figures.groups],
        "paired": [table for group in figures.groups for table in _paired(figures, group)],
        "cost": _cost(figures),
        "seed_tables": [_seeds(figures, group) for group in figures.groups],
        "drawings": _drawings(figures),
        "cost_drawings": _cost_drawings(figures),
        "sweeps": _sweeps(figures),
        "options": [(name, _options(arm)) for name, arm in described.arms.items()],
    }


def _label(metric: str) -> evaluation.Metric:
    return METRICS.get(metric) or evaluation.Metric(name=metric, label=metric, explanation="")


def _table(figures: Figures, group: str, main: bool) -> Table:
    """The main metrics of a group, or all the others."""
    known = [_label(metric) for metric in figures.metrics(group) if (metric in MAIN) == main]
    rows = [(arm, [figures.cell(arm, f"{group}/{one.name}", one.unit) for one in known]) for arm in figures.arms]
    return Table(caption=group, columns=[(one.label, one.explanation) for one in known], rows=rows)


def _paired(figures: Figures, group: str) -> list[Table]:
    """For each metric: the arms' differences to the base and to each other."""
    rivals = [name for name in figures.arms if name == BASE or figures.described.arms[name].seeds]
    tables = []
    for metric in map(_label, PAIRED):
        name = f"{group}/{metric.name}"
        shown = [one for one in rivals if any(figures.row(arm, f"minus/{one}/{name}") for arm in figures.arms)]
        rows = []
        for arm in figures.arms[1:]:
            cells = [figures.cell(arm, f"minus/{rival}/{name}", metric.unit, plus=True) for rival in shown]
            rows.append((arm, cells))
        columns = [(f"minus {rival}", "") for rival in shown]
        tables.append(Table(caption=f"{group}: {metric.label}", columns=columns, rows=rows))
    return tables


def _cost(figures: Figures) -> Table:
    known = [(name, label) for name, label in COSTS if any(figures.row(arm, f"cost/{name}") for arm in figures.arms)]
    rows = []
    for arm in figures.arms[1:]:
        cells = [figures.row(arm, f"cost/{name}") for name, _ in known]
        rows.append((arm, [("–", "") if one is None else _amounts(one) for one in cells]))
    return Table(caption="", columns=[(label, "") for _, label in known], rows=rows)


def _amounts(row: Row) -> tuple[str, str]:
    value, low, high = (f"{one:.4g}" if one >= 1e6 else f"{one:,.0f}" for one in (row.value, row.low, row.high))
    return value, "" if low == high else f"{low} to {high}"


def _seeds(figures: Figures, group: str) -> Table:
    """The main metrics of every seed."""
    known = [_label(name) for name in MAIN if name in figures.metrics(group)]
    rows = []
    for arm in figures.arms[1:]:
        for seed in figures.described.arms[arm].seeds:
            cells = [figures.cell(arm, f"{group}/{one.name}", one.unit, seed) for one in known]
            rows.append((f"{arm}, seed {seed}", cells))
    return Table(caption=group, columns=[(one.label, "") for one in known], rows=rows)


def _drawings(figures: Figures) -> list[tuple[str, Markup]]:
    found = []
    for group in figures.groups:
        for metric, axis in DRAWN:
            points = [one for arm in figures.arms if (one := figures.point(arm, f"{group}/{metric}"))]
            if points:
                drawn = charts.intervals(points, axis, _label(metric).unit)
                found.append((group, _inline(drawn, f"i-{group}-{metric}", f"{group}: {axis}", points)))
    return found


def _cost_drawings(figures: Figures) -> list[tuple[str, Markup]]:
    found = []
    for group in figures.groups:
        for metric, axis in DRAWN:
            points = [
                one for arm in figures.arms if (one := figures.point(arm, f"{group}/{metric}", cost="cost/flops"))
            ]
            if len(points) > 1:
                drawn = charts.costs(points, axis, "FLOPs", _label(metric).unit)
                found.append((group, _inline(drawn, f"c-{group}-{metric}", f"{group}: {axis} against FLOPs", points)))
    return found


def _sweeps(figures: Figures) -> list[tuple[str, str, Markup]]:
    """(option and seeds, group or whose figures, drawing)"""
    found = []
    for one in figures.described.sweeps:
        for group in figures.groups:
            for metric in SWEPT:
                all_points = [figures.point(arm, f"{group}/{metric}", name=f"{value}") for value, arm in one.points]
                points = [point for point in all_points if point]
                if points:
                    label = _label(metric)
                    drawn = charts.sweep(points, one.option, label.label, label.unit)
                    said = f"{group}: {label.label} over {one.option}"
                    found.append((_swept(one), group, _inline(drawn, f"s-{one.name}-{group}-{metric}", said, points)))
        if one.published is not None:
            points = [Point(name=f"{x}", value=y, low=y, high=y) for x, y in one.published.points]
            drawn = charts.sweep(points, one.option, "", "")
            found.append((one.option, one.published.said, _inline(drawn, f"p-{one.name}", one.published.said, points)))
    return found


def _swept(one: Sweep) -> str:
    return f"{one.option}, {'seed' if len(one.seeds) == 1 else 'seeds'} {', '.join(map(str, one.seeds))}"


def _inline(drawing: str, name: str, said: str, points: Sequence[Point]) -> Markup:
    read = "; ".join(f"{one.name} {one.value:.4g}, from {one.low:.4g} to {one.high:.4g}" for one in points)
    safe = "".join(char if char.isalnum() or char == "-" else "-" for char in name)
    return Markup(svg.inline(drawing, safe, str(escape(f"{said}. {read}"))))


def _options(arm: Arm) -> str:
    flat = [f"{option} = {value}" for option, value in flatten(arm.options).items()]
    return ", ".join([*flat, *(f"the {kind} of {of}" for kind, of in arm.budget.items())]) or "as the experiment"
