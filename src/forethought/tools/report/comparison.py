"""The page of an experiment: claims and whether they hold, arms with intervals, costs, sweeps, every seed.

RUN/compare.json       rows: arm, seed or `all`, metric, value, low, high
RUN/experiment.json    names, arms, sweeps, verdicts
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from markupsafe import Markup
from pydantic import ConfigDict, Field

from forethought import html
from forethought.config import flatten
from forethought.config.registry import METRICS, Metric
from forethought.tools.report import plots
from forethought.tools.report.plots import Point
from forethought.tools.report.runs import read_checked
from forethought.tools.report.tables import (
    UNLISTED,
    as_points,
    capitalized,
    duration,
    figure,
    interval,
    metric,
    signed,
    windows_note,
)

BASE, ALL, QUESTIONS = "base", "all", "questions"
MAIN = (
    "accuracy_think", "accuracy_nothink", "ce_think", "ce_nothink", "gain_over_base", "drift", "thought_length",
    "closed",
)  # fmt: skip
DRAWN = ("accuracy_think", "gain_over_base")
PAIRED = ("accuracy_think", "ce_think", "ce_nothink")
COSTS = (
    "flops", "flops_rollout", "flops_update", "tokens", "t_flop_tokens", "steps", "seconds", "cpu_seconds",
)  # fmt: skip
AVERAGES = ("math", "science", "overall")
MODES = {"nothink": "no thought", "think": "thinking"}
ANSWERS = ("pass_at_1", "greedy", "loglik_letter", "loglik_plain", "loglik_normalised", "extracted", "closed")
_OTHERS = ("minus/", "cost/", f"{QUESTIONS}/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of compare.json."""

    arm: str
    seed: int | str
    metric: str
    value: int | float
    low: int | float | None = None  # of its interval; None where there is none (fewer than 10 documents)
    high: int | float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """The training of an arm."""

    options: dict[str, Any]
    budget: dict[str, str]
    seeds: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Published figures over the same option, drawn beside a sweep."""

    said: Annotated[str, Field(min_length=1)]  # source and quantity
    points: Annotated[list[tuple[int | float | str, float]], Field(min_length=2)]  # (value of the option, figure)
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """An option, and the arm that was trained with each value, or that arm's name in the table."""

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
    missing: dict[str, str]  # unfinished jobs and the reason, if it is known
    generic: dict[str, str] = field(default_factory=dict)  # text of the generic thought of the base and each first seed
    spent: dict[str, float] = field(default_factory=dict)
    """`seconds` of all calls and `cpu_seconds` of all runs, loading and evaluation included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells (value, interval) with named columns."""

    caption: str
    columns: list[tuple[str, str]]  # (label, explanation)
    rows: list[tuple[str, list[tuple[str, str]]]]
    note: str = ""


class Figures:
    """The rows of compare.json by arm, seed and metric."""

    def __init__(self, rows: Sequence[Row], described: Described):
        self._rows = {(row.arm, row.seed, row.metric): row for row in rows}
        self.described = described
        self.arms = [BASE, *described.arms]
        names = dict.fromkeys(row.metric for row in rows if not row.metric.startswith(_OTHERS))
        self.groups = sorted({name.rpartition("/")[0] for name in names}, key=lambda group: (group == ALL, group))
        self._metrics = [name.rpartition("/")[2] for name in names]
        answered = [row.metric.split("/") for row in rows if row.metric.startswith(f"{QUESTIONS}/")]
        self.asked = list(dict.fromkeys(parts[2] for parts in answered))  # tasks, and averages of them

    def _repr_html_(self) -> str:
        """The claims, and the main metrics of each group of positions."""
        judged = {True: "holds", False: "fails", None: "undecided"}
        claims = [(one.claim, judged[one.holds], one.evidence) for one in self.described.claims]
        shown = [html.table(["claim", "", "evidence"], claims)] if claims else []
        for one in content(self)["tables"]:
            rows = [(arm, *(html.with_note(*cell) for cell in cells)) for arm, cells in one.rows]
            shown.append(html.table(["", *(label for label, _ in one.columns)], rows, one.caption))
        return "".join(shown)

    def row(self, arm: str, metric: str, seed: int | str = ALL) -> Row | None:
        """The row, or None if it was not measured."""
        return self._rows.get((arm, seed, metric))

    def metrics(self, group: str) -> list[str]:
        """The measured metrics of a group, the main ones first."""
        known = dict.fromkeys([*MAIN, *METRICS, *self._metrics])
        measured = [name for name in known if any(self.row(arm, f"{group}/{name}") for arm in self.arms)]
        return [name for name in measured if name not in UNLISTED]

    def cell(self, arm: str, metric: str, unit: str, seed: int | str = ALL, plus: bool = False) -> tuple[str, str]:
        """A value and its interval as text; an en dash if it was not measured."""
        row = self.row(arm, metric, seed)
        if row is None:
            return "–", ""
        shown = signed(row.value, unit) if plus else figure(row.value, unit)
        ends = interval((row.low, row.high), unit) if seed == ALL else ""
        return (as_points(shown), as_points(ends)) if plus else (shown, ends)

    def points(self, arms: Sequence[tuple[str, str]], metric: str, cost: str = "") -> list[Point]:
        """The measured values of (arm, its name in the plot), each at its cost, or 0."""
        found = []
        for arm, name in arms:
            row, spent = self.row(arm, metric), self.row(arm, cost)
            index = self.arms.index(arm) if arm in self.arms else 0
            if row:
                x = spent.value if spent else 0.0
                found.append(Point(name=name, value=row.value, low=row.low, high=row.high, x=x, index=index))
        return found


def load(run: str | Path) -> Figures:
    """Read what an experiment has found. Raises UserError if one of its files is missing or broken."""
    run = Path(run)
    return Figures(read_checked(run / "compare.json", list[Row]), read_checked(run / "experiment.json", Described))


def content(figures: Figures) -> dict[str, Any]:
    """What the template of the page shows."""
    described, groups = figures.described, figures.groups
    arms = [(arm, arm, ALL) for arm in figures.arms]
    seeds = [(f"{arm}, seed {seed}", arm, seed) for arm in figures.arms[1:] for seed in described.arms[arm].seeds]

    def table(group: str, main: bool, rows: Sequence[tuple[str, str, int | str]] = arms) -> Table:
        """The main metrics of a group, or all others. `rows`: name, arm and seed."""
        known = [metric(name) for name in figures.metrics(group) if (name in MAIN) == main]
        cells = [
            (title, [figures.cell(arm, f"{group}/{one.name}", one.unit, seed) for one in known])
            for title, arm, seed in rows
        ]
        found = (figures.row(arm, f"{group}/windows") for arm in figures.arms)
        note = windows_note(one.value for one in found if one)
        return Table(caption=group, columns=_columns(known), rows=cells, note=note)

    return {
        "experiment": described,
        "seeds": sorted({seed for arm in described.arms.values() for seed in arm.seeds}),
        "failed": sum(one.holds is False for one in described.claims),
        "unknown": sum(one.holds is None for one in described.claims),
        "tables": [table(group, main=True) for group in groups],
        "whole": [table(group, main=False) for group in groups],
        "paired": [_paired(figures, group, metric(name)) for group in groups for name in PAIRED],
        "cost": _cost(figures),
        "seed_tables": [table(group, True, seeds) for group in groups],
        "drawings": _arm_plots(figures),
        "cost_drawings": _cost_plots(figures),
        "thinking": _thinking_plots(figures),
        "sweeps": _sweeps(figures),
        "averages": [_questions(figures, group) for group in AVERAGES if group in figures.asked],
        "tasks": [_questions(figures, group) for group in figures.asked if group not in AVERAGES],
        "options": [(name, _options(arm)) for name, arm in described.arms.items()],
    }


def _columns(metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    return [(capitalized(one.label), one.help) for one in metrics]


def _paired(figures: Figures, group: str, one: Metric) -> Table:
    """The differences of the arms in a metric to the base and to each other."""
    names = {rival: f"minus/{rival}/{group}/{one.name}" for rival in figures.arms}
    shown = {rival: name for rival, name in names.items() if any(figures.row(arm, name) for arm in figures.arms)}
    rows = [
        (arm, [figures.cell(arm, name, one.unit, plus=True) for name in shown.values()]) for arm in figures.arms[1:]
    ]
    return Table(caption=f"{group}: {one.label}", columns=[(f"minus {rival}", "") for rival in shown], rows=rows)


def _cost(figures: Figures) -> Table:
    known = [metric(name) for name in COSTS if any(figures.row(arm, f"cost/{name}") for arm in figures.arms)]
    rows = [
        (arm, [_amounts(figures.row(arm, f"cost/{one.name}"), one.unit) for one in known]) for arm in figures.arms[1:]
    ]
    return Table(caption="", columns=_columns(known), rows=rows)


def _amounts(row: Row | None, unit: str) -> tuple[str, str]:
    if row is None:
        return "–", ""
    ends = [row.value, *(row.value if end is None else end for end in (row.low, row.high))]
    value, low, high = (duration(one) if unit == "s" else f"{one:.4g}" if one >= 1e6 else f"{one:,.0f}" for one in ends)
    return value, "" if low == high else f"{low} to {high}"


def _drawn(figures: Figures) -> Iterator[tuple[str, Metric]]:
    return ((group, metric(name)) for group in figures.groups for name in DRAWN)


def _arm_plots(figures: Figures) -> list[tuple[str, Markup]]:
    """(group, plot) of the drawn metrics: the arms with their intervals."""
    found = []
    for group, one in _drawn(figures):
        if points := figures.points([(arm, arm) for arm in figures.arms], f"{group}/{one.name}"):
            svg = plots.intervals(points, one.label, one.unit)
            found.append((group, plots.inline_points(svg, f"i-{group}-{one.name}", f"{group}: {one.label}", points)))
    return found


def _thinking_plots(figures: Figures) -> list[tuple[str, Markup]]:
    """(group, plot) of the gain over the share of positions that think: a curve for each arm."""

    def look(arm: str, group: str, name: str) -> tuple[int | float | None, ...]:
        row = figures.row(arm, f"{group}/{name}")
        return (row.value, row.low, row.high) if row else (None, None, None)

    colors, found = len(plots.COLORS), []
    for group in figures.groups:
        arms = [(arm, i, i // colors, partial(look, arm, group)) for i, arm in enumerate(figures.arms)]
        if (drawing := plots.thinking_shares(group, arms)) is not None:
            found.append((group, drawing))
    return found


def _cost_plots(figures: Figures) -> list[tuple[str, Markup]]:
    """(group, plot) of the drawn metrics against FLOPs; the base has none."""
    found, cost = [], metric("flops")
    spent = [(arm, arm) for arm in figures.arms if arm == BASE or figures.row(arm, f"cost/{cost.name}")]
    for group, one in _drawn(figures):
        points = figures.points(spent, f"{group}/{one.name}", f"cost/{cost.name}")
        if len(points) > 1:
            svg, text = plots.costs(points, one.label, one.unit, cost.label), f"{one.label} against {cost.label}"
            found.append((group, plots.inline_points(svg, f"c-{group}-{one.name}", f"{group}: {text}", points)))
    return found


def _sweeps(figures: Figures) -> list[tuple[str, str, Markup]]:
    """(option and seeds, group or source of the results, plot)"""
    found = []
    for sweep in figures.described.sweeps:
        option, seeds = sweep.option, "seed" if len(sweep.seeds) == 1 else "seeds"
        for group, one in _drawn(figures):
            if points := figures.points([(arm, f"{value}") for value, arm in sweep.points], f"{group}/{one.name}"):
                svg, text = plots.sweep(points, one.label, one.unit, option), f"{group}: {one.label} over {option}"
                drawing = plots.inline_points(svg, f"s-{sweep.name}-{group}-{one.name}", text, points)
                found.append((f"{option}, {seeds} {', '.join(map(str, sweep.seeds))}", group, drawing))
        if (published := sweep.published) is not None:
            points = [Point(name=f"{x}", value=y, low=None, high=None) for x, y in published.points]
            svg = plots.sweep(points, "", "", option)
            found.append((option, published.said, plots.inline_points(svg, f"p-{sweep.name}", published.said, points)))
    return found


def _options(arm: Arm) -> str:
    flat = [f"{option} = {value}" for option, value in flatten(arm.options).items()]
    budget = [f"as many {metric(kind).label} as {of}" for kind, of in arm.budget.items()]
    return ", ".join([*flat, *budget]) or "as the experiment"


def _questions(figures: Figures, group: str) -> Table:
    """A task, or an average of tasks: each accuracy of each mode with its error and the difference to the base."""
    columns = {
        f"{QUESTIONS}/{mode}/{group}/{name}": (f"{said}, {metric(name).label}", metric(name).help)
        for mode, said in MODES.items()
        for name in ANSWERS
    }
    known = {name: column for name, column in columns.items() if any(figures.row(arm, name) for arm in figures.arms)}
    arms = [arm for arm in figures.arms if any(figures.row(arm, name) for name in known)]
    counts = [figures.row(BASE, f"{QUESTIONS}/{mode}/{group}/questions") for mode in MODES]
    asked = [f": {row.value:.0f} questions" for row in counts if row]
    rows = [(arm, [_question_cell(figures, arm, name) for name in known]) for arm in arms]
    return Table(caption=group + [*asked, " average"][0], columns=list(known.values()), rows=rows)


def _question_cell(figures: Figures, arm: str, name: str) -> tuple[str, str]:
    """The share in percent; below it the standard error, and what the arm has more than the base."""
    row, more = figures.row(arm, name), figures.row(arm, f"minus/{BASE}/{name}")
    if row is None:
        return "–", ""
    errors = [figures.row(arm, f"{one}/se") for one in (name, f"minus/{BASE}/{name}")]
    own, over = (f"± {100 * error.value:.1f}" if error else "" for error in errors)
    to_base = f"{signed(more.value, 'share')} {over}".strip() + " to base" if more else ""
    return figure(row.value, "share"), "; ".join(filter(None, [own, to_base]))
