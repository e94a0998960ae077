"""Drawings of a comparison: intervals of the arms, gain against cost, and sweeps over an option."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from forethought.tools.report.svg import COLOURS, INK, styled
from forethought.tools.report.text import MINUS, visible

WIDTH = 5.0
_HEIGHT_PT, _LINE_PT = 170.0, 11.0
"""Height of what a drawing of costs shows, about, and of a name in it; typographic points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A figure with its interval. `x` is the value of a sweep, or a cost."""

    name: str
    value: float
    low: float
    high: float
    x: float = 0.0
    colour: int = 0
    """Index of the arm's colour; the same in every drawing."""


def intervals(points: Sequence[Point], axis: str, unit: str) -> str:
    """Arms one below the other, each a dot on its interval; a dashed line at the first, the base."""
    with styled() as save:
        figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(points)), layout="constrained")
        axes = figure.add_subplot()
        for place, point in enumerate(points):
            axes.plot([point.low, point.high], [place, place], color=_colour(point), linewidth=2.4)
            axes.plot([point.value], [place], marker="o", markersize=6, color=_colour(point))
        axes.axvline(points[0].value, color=INK, linewidth=0.8, alpha=0.5, linestyle="--")
        axes.set_yticks(range(len(points)), [visible(point.name) for point in points])
        axes.set_ylim(len(points) - 0.5, -0.5)
        _frame(axes, axis, unit, "x")
        return save(figure)


def costs(points: Sequence[Point], axis: str, cost: str, unit: str) -> str:
    """A figure against what it cost: each arm a dot with its interval and its name."""
    with styled() as save:
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for point in points:
            axes.plot([point.x, point.x], [point.low, point.high], color=_colour(point), linewidth=2.0)
            axes.plot([point.x], [point.value], marker="o", markersize=6, color=_colour(point))
        axes.set_xlim(0, 1.35 * max(point.x for point in points))
        for point, lift in zip(points, _lifts(points), strict=True):
            axes.annotate(
                visible(point.name), (point.x, point.value), xytext=(7, lift), textcoords="offset points", va="center",
                fontsize=9.5, color=_colour(point),
            )  # fmt: skip
        axes.set_xlabel(cost, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        _frame(axes, axis, unit, "y")
        return save(figure)


def _lifts(points: Sequence[Point]) -> list[float]:
    """How far each name moves up, in typographic points, so that none lies on another: names of neighbours in cost."""
    bottom, top = min(point.low for point in points), max(point.high for point in points)
    scale = _HEIGHT_PT / ((top - bottom) or 1.0)
    reach = 0.3 * max(point.x for point in points)
    placed: list[tuple[float, float]] = []
    lifts = [0.0] * len(points)
    for i in sorted(range(len(points)), key=lambda i: points[i].value):
        natural = place = (points[i].value - bottom) * scale
        for x, other in sorted(placed, key=lambda one: one[1]):
            if abs(x - points[i].x) < reach and abs(place - other) < _LINE_PT:
                place = other + _LINE_PT
        placed.append((points[i].x, place))
        lifts[i] = place - natural
    return lifts


def sweep(points: Sequence[Point], option: str, axis: str, unit: str) -> str:
    """A figure over the values of an option, evenly spaced as in the paper's Figure 2, each with its interval."""
    with styled() as save:
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(points))
        axes.fill_between(
            places, [point.low for point in points], [point.high for point in points],
            color=COLOURS[0], alpha=0.2, linewidth=0,
        )  # fmt: skip
        axes.plot(places, [point.value for point in points], color=COLOURS[0], marker="o", markersize=5, linewidth=2)
        axes.set_xticks(places, [visible(point.name) for point in points])
        axes.set_xlabel(visible(option), loc="right")
        _frame(axes, axis, unit, "y")
        return save(figure)


def _colour(point: Point) -> str:
    return COLOURS[point.colour % len(COLOURS)]


def _frame(axes: Axes, title: str, unit: str, along: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5)
    axes.grid(axis="x" if along == "x" else "y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    measured = axes.xaxis if along == "x" else axes.yaxis
    measured.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    share = unit == "share"
    measured.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value if share else value:.4g}".replace("-", MINUS) + " %" * share)
    )
