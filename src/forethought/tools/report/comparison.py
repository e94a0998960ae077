"""The page of an experiment: claims and whether they hold, arms with intervals, costs, sweeps, every seed.

RUN/compare.json       rows: arm, seed or `all`, metric, value, low, high
RUN/experiment.json    names, arms, sweeps, verdicts
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from forethought.config import flatten
from forethought.config.registry import METRICS
from forethought.tools.report import plots
from forethought.tools.report.plots import Point
from forethought.tools.report.runs import read_checked
from forethought.tools.report.tables import capitalized, duration, figure, interval, metric, signed

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
DRAWN = ("accuracy_think", "gain_over_base")
PAIRED = ("accuracy_think", "ce_think", "ce_nothink")
COSTS = (
    "flops", "flops_rollout", "flops_update", "tokens", "t_flop_tokens", "steps", "seconds", "cpu_seconds",
)  # fmt: skip
_OTHERS = ("minus/", "cost/", f"{QUESTIONS}/")


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
    """The training of an arm."""

    seeds: list[int]
    options: dict[str, Any]
    budget: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Published results over an option."""

    said: str
    points: list[tuple[int | float | str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """An option, and the arm that was trained with each value."""

    name: str
    option: str
    points: list[tuple[int | float | str, str]]
    seeds: list[int]
    published: Published | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a claim holds; None if it could not be tested."""

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
    """Unfinished jobs and the reason, if it is known."""
    spent: dict[str, float] = field(default_factory=dict)
    """`seconds` of all calls and `cpu_seconds` of all runs, loading and evaluation included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells (value, interval) with named columns."""

    caption: str
    columns: list[tuple[str, str]]
    """(label, explanation)"""
    rows: list[tuple[str, list[tuple[str, str]]]]


class Figures:
    """The rows of compare.json by arm, seed and metric."""

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
        """The row, or None if it was not measured."""
        return self._rows.get((arm, seed, metric))

    def metrics(self, group: str) -> list[str]:
        """The measured metrics of a group, the main ones first."""
        known = dict.fromkeys([*MAIN, *METRICS, *self._metrics])
        measured = [name for name in known if any(self.row(arm, f"{group}/{name}") for arm in self.arms)]
        return [name for name in measured if name not in ("positions", "documents")]

    def cell(self, arm: str, metric: str, unit: str, seed: int | str = ALL, plus: bool = False) -> tuple[str, str]:
        """A value and its interval as text; an en dash if it was not measured."""
        row = self.row(arm, metric, seed)
        if row is None:
            return "–", ""
        shown = signed(row.value, unit) if plus else figure(row.value, unit)
        return shown, interval((row.low, row.high), unit) if seed == ALL else ""

    def point(self, arm: str, metric: str, name: str = "", cost: str = "") -> Point | None:
        """A value to plot, or None if it was not measured."""
        row, x = self.row(arm, metric), self.row(arm, cost) if cost else None
        if row is None or (cost and x is None and arm != BASE):
            return None
        index = self.arms.index(arm) if arm in self.arms else 0
        return Point(
            name=name or arm, value=row.value, low=row.low, high=row.high, x=x.value if x else 0.0, index=index
        )


def load(run: Path) -> Figures:
    """Read the two files. Raises UserError if one is missing or broken."""
    return Figures(read_checked(run / "compare.json", list[Row]), read_checked(run / "experiment.json", Described))


def content(figures: Figures) -> dict[str, Any]:
    """What the template of the page shows."""
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
        "drawings": _arm_plots(figures),
        "cost_drawings": _arm_plots(figures, "flops"),
        "sweeps": _sweeps(figures),
        "options": [(name, _options(arm)) for name, arm in described.arms.items()],
    }


def _table(figures: Figures, group: str, main: bool) -> Table:
    """The main metrics of a group, or all others."""
    known = [metric(name) for name in figures.metrics(group) if (name in MAIN) == main]
    rows = [(arm, [figures.cell(arm, f"{group}/{one.name}", one.unit) for one in known]) for arm in figures.arms]
    return Table(caption=group, columns=[(capitalized(one.label), one.help) for one in known], rows=rows)


def _paired(figures: Figures, group: str) -> list[Table]:
    """For each metric, the differences of the arms to the base and to each other."""
    rivals = [name for name in figures.arms if name == BASE or figures.described.arms[name].seeds]
    tables = []
    for one in map(metric, PAIRED):
        name = f"{group}/{one.name}"
        shown = [rival for rival in rivals if any(figures.row(arm, f"minus/{rival}/{name}") for arm in figures.arms)]
        rows = []
        for arm in figures.arms[1:]:
            cells = [figures.cell(arm, f"minus/{rival}/{name}", one.unit, plus=True) for rival in shown]
            rows.append((arm, cells))
        columns = [(f"minus {rival}", "") for rival in shown]
        tables.append(Table(caption=f"{group}: {one.label}", columns=columns, rows=rows))
    return tables


def _cost(figures: Figures) -> Table:
    known = [name for name in COSTS if any(figures.row(arm, f"cost/{name}") for arm in figures.arms)]
    rows = []
    for arm in figures.arms[1:]:
        rows.append((arm, [_amounts(figures.row(arm, f"cost/{name}"), metric(name).unit) for name in known]))
    return Table(
        caption="", columns=[(capitalized(metric(name).label), metric(name).help) for name in known], rows=rows
    )


def _amounts(row: Row | None, unit: str) -> tuple[str, str]:
    if row is None:
        return "–", ""
    ends = (row.value, row.low, row.high)
    value, low, high = (duration(one) if unit == "s" else f"{one:.4g}" if one >= 1e6 else f"{one:,.0f}" for one in ends)
    return value, "" if low == high else f"{low} to {high}"


def _seeds(figures: Figures, group: str) -> Table:
    """The main metrics of every seed."""
    known = [metric(name) for name in MAIN if name in figures.metrics(group)]
    rows = []
    for arm in figures.arms[1:]:
        for seed in figures.described.arms[arm].seeds:
            cells = [figures.cell(arm, f"{group}/{one.name}", one.unit, seed) for one in known]
            rows.append((f"{arm}, seed {seed}", cells))
    return Table(caption=group, columns=[(capitalized(one.label), "") for one in known], rows=rows)


def _arm_plots(figures: Figures, cost: str = "") -> list[tuple[str, Markup]]:
    """(group, plot) of the drawn metrics: the arms with their intervals, or against a cost."""
    found = []
    for group in figures.groups:
        for one in map(metric, DRAWN):
            points = [figures.point(arm, f"{group}/{one.name}", cost=cost and f"cost/{cost}") for arm in figures.arms]
            points = [point for point in points if point]
            text = f"{group}: {one.label}"
            if cost and len(points) > 1:
                svg = plots.costs(points, one.label, one.unit, metric(cost).label)
                found.append(
                    (group, _inline(svg, f"c-{group}-{one.name}", f"{text} against {metric(cost).label}", points))
                )
            elif points and not cost:
                svg = plots.intervals(points, one.label, one.unit)
                found.append((group, _inline(svg, f"i-{group}-{one.name}", text, points)))
    return found


def _sweeps(figures: Figures) -> list[tuple[str, str, Markup]]:
    """(option and seeds, group or source of the results, plot)"""
    found = []
    for one in figures.described.sweeps:
        seeds = f"{one.option}, {'seed' if len(one.seeds) == 1 else 'seeds'} {', '.join(map(str, one.seeds))}"
        for group in figures.groups:
            for shown in map(metric, DRAWN):
                points = [figures.point(arm, f"{group}/{shown.name}", f"{value}") for value, arm in one.points]
                points = [point for point in points if point]
                if points:
                    svg = plots.sweep(points, shown.label, shown.unit, one.option)
                    text = f"{group}: {shown.label} over {one.option}"
                    found.append((seeds, group, _inline(svg, f"s-{one.name}-{group}-{shown.name}", text, points)))
        if (published := one.published) is not None:
            points = [Point(name=f"{x}", value=y, low=y, high=y) for x, y in published.points]
            svg = plots.sweep(points, "", "", one.option)
            found.append((one.option, published.said, _inline(svg, f"p-{one.name}", published.said, points)))
    return found


def _inline(svg: str, name: str, text: str, points: Sequence[Point]) -> Markup:
    values = "; ".join(f"{one.name} {one.value:.4g}, from {one.low:.4g} to {one.high:.4g}" for one in points)
    safe = "".join(char if char.isalnum() or char == "-" else "-" for char in name)
    return Markup(plots.inline(svg, safe, str(escape(f"{text}. {values}"))))


def _options(arm: Arm) -> str:
    flat = [f"{option} = {value}" for option, value in flatten(arm.options).items()]
    budget = [f"as many {metric(kind).label} as {of}" for kind, of in arm.budget.items()]
    return ", ".join([*flat, *budget]) or "as the experiment"


AVERAGES = ("math", "science", "overall")
MODES = {"nothink": "no thought", "think": "thinking"}
SHOWN = ("pass_at_1", "greedy", "loglik_letter", "loglik_plain", "loglik_normalised", "extracted", "closed")


def question_tables(figures: Figures) -> dict[str, Any]:
    """What the page's template shows of answers: no tables where nothing was asked."""
    groups = figures.asked
    averages = [_question_table(figures, group) for group in AVERAGES if group in groups]
    tasks = [_question_table(figures, group) for group in groups if group not in AVERAGES]
    return {"averages": averages, "tasks": tasks}


def _question_table(figures: Figures, group: str) -> Table:
    """A task, or an average of tasks: each accuracy of each mode with its error and the difference to the base."""
    columns = [
        (f"{mode}/{group}/{metric.name}", (f"{said}, {metric.label}", metric.help))
        for mode, said in MODES.items()
        for metric in (METRICS[name] for name in SHOWN)
    ]
    known = [one for one in columns if any(figures.row(arm, f"{QUESTIONS}/{one[0]}") for arm in figures.arms)]
    rows = [(arm, [_question_cell(figures, arm, name) for name, _ in known]) for arm in figures.arms]
    shown = [(arm, cells) for arm, cells in rows if any(value != "–" for value, _ in cells)]
    return Table(caption=_question_caption(figures, group), columns=[column for _, column in known], rows=shown)


def _question_caption(figures: Figures, group: str) -> str:
    counts = [figures.row(BASE, f"{QUESTIONS}/{mode}/{group}/questions") for mode in MODES]
    asked = [int(one.value) for one in counts if one is not None]
    return f"{group}: {asked[0]} questions" if asked else f"{group} average"


def _question_cell(figures: Figures, arm: str, name: str) -> tuple[str, str]:
    """The share in percent; below it the standard error, and what the arm has more than the base."""
    row = figures.row(arm, f"{QUESTIONS}/{name}")
    if row is None:
        return "–", ""
    parts = [_question_error(figures, arm, f"{QUESTIONS}/{name}")]
    more = figures.row(arm, f"minus/{BASE}/{QUESTIONS}/{name}")
    if more is not None:
        error = _question_error(figures, arm, f"minus/{BASE}/{QUESTIONS}/{name}")
        parts.append(f"{signed(more.value, 'share')} {error}".strip() + " to base")
    return figure(row.value, "share"), "; ".join(part for part in parts if part)


def _question_error(figures: Figures, arm: str, metric: str) -> str:
    row = figures.row(arm, f"{metric}/se", ALL)
    return "" if row is None else f"± {100 * row.value:.1f}"
