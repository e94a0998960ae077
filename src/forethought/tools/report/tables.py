"""Numbers and text as pages, plots and model cards show them, and tables of metrics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from forethought.config.registry import METRICS, THINKING_SHARES, Metric
from forethought.tools.report.runs import Run, number

MINUS, NBSP = "\u2212", "\u00a0"
UNLISTED = ("positions", "documents", "windows", *THINKING_SHARES.values())
"""Metrics of a group that tables leave out: they are in captions and in a plot."""


def render(template: str, content: dict[str, Any], *, escape: bool, **filters: Callable[..., Any]) -> str:
    """A template of this folder. With `escape` it is HTML, where text is escaped unless it is Markup."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(content)


def metric(name: str) -> Metric:
    """The registered metric of a name, or one without label and unit."""
    return METRICS.get(name) or Metric(name, name, "", "")


def capitalized(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def figure(value: float | None, unit: str = "nats") -> str:
    """A number as text: nats with three decimals, shares in percent, anything else with one decimal."""
    value = number(value)
    if value is None:
        return "–"
    if unit == "share":
        shown = f"{100 * value:.1f}{NBSP}%"
    elif unit == "nats":
        shown = f"{value:.3f}"
    else:
        shown = f"{value:,.1f}"
    # "-0.000" has a sign that its digits do not have.
    negative = shown.startswith("-") and any(char in "123456789" for char in shown)
    return (MINUS if negative else "") + shown.removeprefix("-")


def signed(value: float | None, unit: str = "nats") -> str:
    """Like `figure`, with a plus sign for positive numbers."""
    shown = figure(value, unit)
    return f"+{shown}" if any(char in "123456789" for char in shown) and not shown.startswith(MINUS) else shown


def as_points(difference: str) -> str:
    """A difference of shares: percentage points, not percent."""
    return difference.replace(f"{NBSP}%", " points")


def interval(ends: Sequence[float | None], unit: str) -> str:
    """The two ends of an interval as text; empty if one is unknown."""
    low, high = ends
    return "" if low is None or high is None else f"{figure(low, unit)} to {figure(high, unit)}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {small}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A metric of one run before and after training, as text; an en dash if it was not measured."""

    before: tuple[str, str]  # value, interval
    after: tuple[str, str]
    difference: str
    verdict: str  # `better` or `worse` if the two intervals do not overlap, else empty


def evaluations(runs: list[Run]) -> list[tuple[str, list[tuple[Metric, list[Cell]]]]]:
    """Evaluations from summary.json: for each group of positions rows of a metric and a cell per run."""
    groups = measured(key for run in runs for key in run.summary)
    return [(group, [(one, [_cell(run, group, one) for run in runs]) for one in rows]) for group, rows in groups]


def measured(names: Iterable[str], phases: Sequence[str] = ("before", "after")) -> list[tuple[str, list[Metric]]]:
    """The groups of positions in flat names PHASE/GROUP/METRIC, `all` first, each with its metrics.

    Metrics are in the order of the registry; unknown ones follow in alphabetical order.
    """
    groups: dict[str, set[str]] = {}
    for phase, _, rest in (name.partition("/") for name in names):
        group, _, name = rest.rpartition("/")
        if phase in phases and group and name not in ("low", "high"):
            groups.setdefault(group, set()).add(name)
    order = [name for name in METRICS if name not in UNLISTED]
    return [
        (group, [metric(name) for name in (*order, *sorted(found - METRICS.keys())) if name in found])
        for group, found in sorted(groups.items(), key=lambda one: (one[0] != "all", one[0]))
    ]


def windows_note(counts: Iterable[Any]) -> str:
    """What a table says about a group whose intervals are over the windows of its only document."""
    known = [count for value in counts if (count := number(value)) is not None]
    return f"1 document: intervals over its {known[0]:.0f} windows" if known else ""


def with_ends(figures: Mapping[str, Any], group: str, name: str) -> list[float | None]:
    """A metric of PHASE/GROUP and the two ends of its interval; None for what was not measured."""
    return [number(figures.get(f"{group}/{name}{end}")) for end in ("", "/low", "/high")]


def with_interval(figures: Mapping[str, Any], group: str, metric: Metric) -> tuple[str, str]:
    """The same as text: the figure, and its interval, which is empty where it has none."""
    value, *ends = with_ends(figures, group, metric.name)
    return figure(value, metric.unit), interval(ends, metric.unit)


def _cell(run: Run, group: str, metric: Metric) -> Cell:
    phases = (f"before/{group}", f"after/{group}")
    (before, *before_ends), (after, *after_ends) = (with_ends(run.summary, phase, metric.name) for phase in phases)
    difference = None if before is None or after is None else after - before
    return Cell(
        before=with_interval(run.summary, phases[0], metric),
        after=with_interval(run.summary, phases[1], metric),
        difference=as_points(signed(difference, metric.unit)),
        verdict=_verdict(before_ends, after_ends, metric.better),
    )


def _verdict(before: list[Any], after: list[Any], better: int) -> str:
    if None in before or None in after:
        return ""
    (before_low, before_high), (after_low, after_high) = before, after
    sign = (after_low > before_high) - (after_high < before_low)
    return {1: "better", -1: "worse", 0: ""}[sign * better]
