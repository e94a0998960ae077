"""Plots of runs and experiments as SVG: standalone files, and the same drawings inside a page.

Drawn without pyplot and with fixed settings, so that the same data give the same bytes.
"""

import contextlib
import io
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib.style
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from forethought.config.registry import METRICS, THINKING_SHARES
from forethought.html import visible
from forethought.tools.report.runs import Run
from forethought.tools.report.tables import MINUS, capitalized, metric

INK, GRID, PAPER = "#20242b", "#dfe2e6", "#ffffff"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's color-blind safe palette; more runs or arms repeat it with other dashes or markers."""
DASHES, MARKERS = ("-", "--", ":", "-."), "os^Dv"
WIDTH, HEIGHT, LEGEND_ROW = 5.0, 3.0, 0.24
SMOOTH_FROM, BINS = 32, 256
"""From SMOOTH_FROM points on, a running mean is drawn over them; more than BINS points become a band."""

_STYLE: dict[str, Any] = {
    "svg.hashsalt": "forethought",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": GRID,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.axisbelow": True,
    "xaxis.labellocation": "right",
    "grid.color": GRID,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "axes.facecolor": "none",
    "font.size": 11.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot of metrics over the steps of training."""

    name: str  # stem of the SVG file
    metrics: tuple[str, ...]
    note: str = ""  # how to read the plot
    label: str = ""  # title of a plot of several metrics; of a single one it is the metric's label
    level: float | None = None  # the value that means "no effect", drawn as a line
    next_token: bool | None = None  # draw only runs that train on a next-token loss (True), or on another one (False)

    @property
    def title(self) -> str:
        """The plot's title."""
        return capitalized(self.label or metric(self.metrics[0]).label)

    @property
    def explanation(self) -> str:
        """What the plot shows, and how to read it."""
        texts = [metric(name).help for name in self.metrics] if not self.label else []
        return ". ".join(filter(None, [*map(capitalized, texts), self.note])) + "."

    def shows(self, run: Run) -> bool:
        """Whether the run logged something for this plot."""
        fits = self.next_token is None or self.next_token == run.logs("objective/accuracy")
        return fits and any(map(run.logs, self.metrics))


PLOTS = (
    Plot(
        "gain", ("reward/gain",), "Above 0, thoughts make the next token more likely; below 0, less likely", level=0.0,
    ),
    Plot(
        "evidence", ("reward/evidence", "reward/nothink"),
        "Log p of the target after a thought, and the teacher's without one: the two sides of the gain. Progress "
        "is a rise of the first line, not a fall of the second", label="log p with and without a thought",
    ),
    Plot("match", ("reward/match",), "The reward of RPT"),
    Plot(
        "reward-std", ("reward/std",),
        "How much the thoughts of one position differ in reward. Near 0 there is nothing to learn from", level=0.0,
    ),
    Plot("zero-std", ("reward/zero_std_fraction",), "All thoughts of these positions have nearly the same reward"),
    Plot("closed", ("rollout/closed",), "The others reached method.thought_length and were truncated"),
    Plot("length", ("rollout/length",), "A slow decline to very short thoughts is a warning sign"),
    Plot(
        "leakage", ("rollout/leakage",),
        "A steep rise means that thoughts guess the token instead of working towards it",
    ),
    Plot(
        "ratio", ("objective/ratio",),
        "Probability of the thoughts under the trained policy relative to the policy that sampled them. It is 1 "
        "before the first update on a batch", level=1.0,
    ),
    Plot("clip-fraction", ("objective/clip_fraction",), "With one update per batch it stays at 0"),
    Plot("mismatch", ("objective/mismatch",), "It should be rounding error", level=0.0),
    Plot(
        "kl", ("objective/kl",),
        "How far the distribution of thoughts has moved from the model at the start", level=0.0,
    ),
    Plot(
        "loss", ("objective/loss",),
        "It stays near 0 by construction and need not fall; watch the gain instead", level=0.0, next_token=False,
    ),
    Plot(
        "next-token-loss", ("objective/loss",), label="next-token loss", next_token=True,
        note="Cross-entropy of the training text, in nats per token; lower is better",
    ),
    Plot("accuracy", ("objective/accuracy",), "Measured on the training text", next_token=True),
    Plot(
        "gradient-norm", ("optim/gradient_norm",), "Single spikes are clipped; a steady rise points to an unstable run",
    ),
    Plot("throughput", ("time/thought_tokens_per_s",), "The speed of the whole loop: sampling, scoring and updating"),
    Plot("step-time", ("time/step_s",)),
)  # fmt: skip


def plots_of(runs: Sequence[Run]) -> list[Plot]:
    """The plots that have data, metrics that are not in the registry included."""
    logged = dict.fromkeys(name for run in runs for row in run.metrics for name in row if name != "step")
    names = {plot.name: "" for plot in PLOTS}
    for name in [name for name in logged if name not in METRICS]:
        stem = re.sub(r"[^\w-]+", "-", name)
        while names.setdefault(stem, name) != name:
            stem += "-2"
    own = [Plot(stem, (name,)) for stem, name in names.items() if name]
    return [plot for plot in (*PLOTS, *own) if any(map(plot.shows, runs))]


def draw(plot: Plot, runs: Sequence[Run], title: str = "") -> str:
    """The plot as a standalone SVG document; the legend is left out if there is one curve only.

    A run keeps its color, that of its index in `runs`, in every plot.
    """
    several, unit = len(runs) > 1, metric(plot.metrics[0]).unit
    shown = [(index, run) for index, run in enumerate(runs) if plot.shows(run)]
    curves = [(index, run, place, name) for index, run in shown for place, name in enumerate(plot.metrics)]
    curves = [one for one in curves if one[1].logs(one[3])]
    rows = len(curves) if several or len(curves) > 1 else 0
    with _canvas(HEIGHT + LEGEND_ROW * rows) as (figure, axes):
        _frame(axes, title, unit)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.ticklabel_format(axis="x", style="plain")
        if plot.level is not None:
            axes.axhline(plot.level, color=INK, linewidth=0.8, alpha=0.5)
        lines, labels = [], []
        for index, run, place, name in curves:
            color = index if several else place
            dash = place + (index // len(COLORS) if len(plot.metrics) == 1 else 0)
            style = {"color": COLORS[color % len(COLORS)], "linestyle": DASHES[dash % len(DASHES)]}
            steps, values = run.series(name)
            lines.append(_curve(axes, np.array(steps), np.array(values), style))
            labels.append(", ".join([_short(run.name)] * several + [metric(name).label] * (len(plot.metrics) > 1)))
        _limits(axes, unit, plot.level)
        if rows:
            figure.legend(lines, labels, loc="outside lower left")
        return _svg(figure)


@contextlib.contextmanager
def _canvas(height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure in the style of all plots, to be drawn and saved inside the block."""
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(WIDTH, height))
        yield figure, figure.add_subplot()


def _short(name: str, longest: int = 44) -> str:
    name = visible(name)
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 + 1 :]}"


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, style: dict[str, Any]) -> Line2D:
    """Few points as they are, more as a thin line under their running mean, very many as a band around means."""
    if len(steps) < SMOOTH_FROM:
        return axes.plot(steps, values, marker="o", markersize=3, linewidth=1.6, **style)[0]
    if len(steps) > BINS:
        starts = np.linspace(0, len(steps), BINS, endpoint=False).astype(int)
        low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        axes.fill_between(steps[starts], low, high, color=style["color"], alpha=0.2, linewidth=0)
        counts = np.diff(np.append(starts, len(steps)))
        steps, values = steps[starts], np.add.reduceat(values, starts) / counts
    else:
        axes.plot(steps, values, color=style["color"], linewidth=0.8, alpha=0.4)
    return axes.plot(steps, running_mean(values), linewidth=2.0, **style)[0]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centered mean over a sixteenth of the points; windows at the ends are shorter."""
    window = np.ones(2 * max(1, len(values) // 32) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _limits(axes: Axes, unit: str, level: float | None) -> None:
    """Shares start at zero, and rounding errors around 1 do not fill the plot."""
    low, high = axes.get_ylim()
    if unit == "share":
        high = min(1.03, max(0.05, high))
        axes.set_ylim(-0.03 * high, high)
    elif level == 1.0:
        axes.set_ylim(min(low, 0.99), max(high, 1.01))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A measurement with its interval (None: it has none, and its marker is hollow); `x` is its cost."""

    name: str
    value: float
    low: float | None
    high: float | None
    x: float = 0.0
    index: int = 0  # index of the arm, which determines its color and marker in every plot


def intervals(points: Sequence[Point], title: str, unit: str) -> str:
    """Arms one below the other, each a marker on its interval; a dashed line at the first one, the base."""
    with _canvas(0.9 + 0.34 * len(points)) as (figure, axes):
        for row, point in enumerate(points):
            axes.hlines(row, *_ends(point), color=_color(point), linewidth=2.4)
            axes.plot(point.value, row, "o", markersize=6, color=_color(point), fillstyle=_fill(point))
        axes.axvline(points[0].value, color=INK, linewidth=0.8, alpha=0.5, linestyle="--")
        axes.set_yticks(range(len(points)), [visible(point.name) for point in points])
        axes.set_ylim(len(points) - 0.5, -0.5)
        _frame(axes, title, unit, "x")
        return _svg(figure)


def costs(points: Sequence[Point], title: str, unit: str, cost: str) -> str:
    """A metric against its cost: each arm a marker with its interval."""
    with _canvas(3.2 + LEGEND_ROW * ((len(points) + 1) // 2)) as (figure, axes):
        markers = []
        for point in points:
            axes.vlines(point.x, *_ends(point), color=_color(point), linewidth=2.0, clip_on=False)
            marker = MARKERS[point.index // len(COLORS) % len(MARKERS)]
            style: dict[str, Any] = {"color": _color(point), "fillstyle": _fill(point), "clip_on": False}
            markers += axes.plot(point.x, point.value, marker, markersize=6, **style)
        axes.set_xlim(left=0)
        axes.set_xlabel(cost)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        _frame(axes, title, unit)
        figure.legend(markers, [_short(point.name) for point in points], loc="outside lower left", ncols=2)
        return _svg(figure)


def sweep(points: Sequence[Point], title: str, unit: str, option: str) -> str:
    """A metric over the values of an option, evenly spaced as in the paper's Figure 2, with a band of intervals."""
    with _canvas(HEIGHT) as (figure, axes):
        ticks = range(len(points))
        _band(axes, ticks, points, COLORS[0])
        axes.set_xticks(ticks, [visible(point.name) for point in points])
        axes.set_xlabel(visible(option))
        _frame(axes, title, unit)
        return _svg(figure)


Lookup = Callable[[str], Sequence[int | float | None]]
"""The name of a metric -> its value and the two ends of its interval; None for what was not measured."""


def thinking_shares(group: str, curves: Sequence[tuple[str, int, int, Lookup]]) -> Markup | None:
    """What a text gains per position if only the positions of highest entropy think, over the share that does.

    Each curve is a label, the indices of its color and of its dash, and where its metrics are. None if no curve has
    two shares that were measured.
    """
    found = [(label, index, dash, _share_points(label, look)) for label, index, dash, look in curves]
    found = [one for one in found if len(one[3]) > 2]
    if not found:
        return None
    with _canvas(HEIGHT + LEGEND_ROW * ((len(found) + 1) // 2)) as (figure, axes):
        axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
        lines = [
            _band(axes, [one.x for one in points], points, COLORS[index % len(COLORS)], DASHES[dash % len(DASHES)])
            for _, index, dash, points in found
        ]
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("positions that think")
        _frame(axes, "gain per position of text", "nats")
        figure.legend(lines, [_short(label) for label, *_ in found], loc="outside lower left", ncols=2)
        text = f"{group}: gain per position of text over the share of positions that think"
        return inline_points(_svg(figure), f"t-{group}", text, [point for *_, points in found for point in points])


def _share_points(label: str, look: Lookup) -> list[Point]:
    """The origin, where none thinks, and the shares that were measured: as many positions as a whole number is."""
    points = [Point(name=f"{label}, 0 %", value=0.0, low=0.0, high=0.0)]
    count = look("positions")[0] or 0
    for percent, name in THINKING_SHARES.items():
        share, ends = math.ceil(percent * count / 100) / max(count, 1), look(name)
        value, low, high = (None if end is None else share * end for end in ends)
        if count and value is not None:
            points.append(Point(name=f"{label}, {100 * share:.3g} %", value=value, low=low, high=high, x=share))
    return points


def _band(
    axes: Axes, x: Sequence[int] | Sequence[float], points: Sequence[Point], color: str, dash: str = "-"
) -> Line2D:
    """A line through points in a band of their intervals."""
    low, high = zip(*map(_ends, points), strict=True)
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    for place, point in zip(x, points, strict=True):
        axes.plot(place, point.value, "o", color=color, markersize=5, fillstyle=_fill(point))
    return axes.plot(x, [point.value for point in points], color=color, linewidth=2, linestyle=dash)[0]


def _ends(point: Point) -> tuple[float, float]:
    """The ends of its interval; NaN, which is not drawn, without one."""
    return (math.nan, math.nan) if point.low is None or point.high is None else (point.low, point.high)


def _fill(point: Point) -> Literal["full", "none"]:
    return "none" if point.low is None or point.high is None else "full"


def _color(point: Point) -> str:
    return COLORS[point.index % len(COLORS)]


def _frame(axes: Axes, title: str, unit: str, values: str = "y") -> None:
    """Title and unit, and grid and ticks of the axis that has the values."""
    axes.set_title(", ".join(filter(None, [title, "" if unit == "share" else unit])))
    axes.grid(axis="x" if values == "x" else "y", linewidth=0.8)
    axis: Axis = axes.xaxis if values == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    scale, suffix = (100, " %") if unit == "share" else (1, "")
    # matplotlib's own formatter would move an offset to the end of the axis.
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{scale * value:.5g}".replace("-", MINUS) + suffix))


def _svg(figure: Figure) -> str:
    """A standalone SVG document on white."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Names may contain characters that only the reader's browser has a font for.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)


def side_by_side(drawings: Sequence[str], width: int = 450) -> str:
    """Drawings as one SVG document, two in a row, each `width` pixels wide."""
    parts, top, height = [], 0.0, 0.0
    for number, svg in enumerate(drawings):
        opening, _, drawing = svg[svg.index("<svg") :].partition(">")
        box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening)
        assert box is not None
        top, height = (top, height) if number % 2 else (top + height, 0.0)
        own = width * float(box[2]) / float(box[1])
        height = max(height, own)
        drawing = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>d{number}-", drawing)
        parts.append(f'<svg x="{width * (number % 2)}" y="{top}" width="{width}" height="{own}" {box[0]}>{drawing}')
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} width="{width * min(2, len(parts))}" height="{top + height}">{"".join(parts)}</svg>'


def inline(svg: str, name: str, text: str) -> Markup:
    """The drawing for an HTML page: its own ids, colors from the page's custom properties, a text alternative.

    The text is escaped here; matplotlib escapes the names of runs in its drawing.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    opening, _, drawing = svg.partition(">")
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    svg = f'<svg {box.group()} role="img" aria-label="{escape(text)}">{drawing}'
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>p{zlib.crc32(repr(name).encode()):x}-", svg)
    return Markup(re.sub(r'style="[^"]*"', lambda match: _themed(match.group()), svg))


def inline_points(svg: str, name: str, text: str, points: Sequence[Point]) -> Markup:
    """The same with the values of points and their intervals in the text alternative."""
    ends = ["no interval" if one.low is None else f"from {one.low:.4g} to {one.high:.4g}" for one in points]
    values = "; ".join(f"{one.name} {one.value:.4g}, {end}" for one, end in zip(points, ends, strict=True))
    return inline(svg, name, f"{text}. {values}")


def _themed(style: str) -> str:
    style = style.replace(PAPER, "none").replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for index, color in enumerate(COLORS):
        style = style.replace(color, f"var(--series-{index})")
    fonts = r"font-family: [^;\"]*;?|font: ([\d.]+px) [^;\"]*;?"
    return re.sub(fonts, lambda match: f"font-size: {match[1]};" if match[1] else "", style)
