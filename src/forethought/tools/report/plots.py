"""Curves over steps as SVG: one file per plot to keep, and the same plot in the page."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from forethought.tools.report.runs import Run
from forethought.tools.report.svg import COLOURS, DASHES, INK, styled
from forethought.tools.report.text import MINUS, visible

WIDTH, HEIGHT, LEGEND_ROW = 5.0, 3.0, 0.24
SMOOTH_FROM, BINS = 32, 256
"""From so many points on a running mean is drawn over them; above BINS points they become a band."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One plot of the page: which metrics, and what a newcomer should know to read it."""

    name: str
    """Stem of the SVG file."""
    title: str
    axis: str
    """What the vertical axis measures, with its unit."""
    series: tuple[tuple[str, str], ...]
    """(metric, what the legend calls it), drawn in one pair of axes."""
    explanation: str
    unit: Literal["number", "share"] = "number"
    level: float | None = None
    """Value that means "no effect", drawn as a line."""
    only: Literal["cpt", "thoughts", ""] = ""
    """Runs that the plot is for, where a metric means something else for the others."""

    def shows(self, run: Run) -> bool:
        """Whether the run logged something for this plot."""
        fits = not self.only or (run.method == "cpt") == (self.only == "cpt")
        return fits and any(run.series(metric)[0] for metric, _ in self.series)


PLOTS = (
    Plot(
        name="gain", title="Information gain", axis="nats", level=0.0,
        series=(("reward/gain", "gain"),),
        explanation="How much more likely the true next token became through a thought. This is the reward: above 0 "
        "thinking helps, below 0 it hurts.",
    ),
    Plot(
        name="evidence", title="With and without a thought", axis="log p of the true token, nats",
        series=(("reward/evidence", "after the thought"), ("reward/nothink", "without (teacher)")),
        explanation="The two sides of the gain. It is real progress when the upper line rises, not when the lower "
        "one sinks.",
    ),
    Plot(
        name="match", title="Right predictions", axis="share of thoughts", unit="share",
        series=(("reward/match", "right"),),
        explanation="Thoughts behind which the policy wrote what comes next in the text. This is the reward of RPT.",
    ),
    Plot(
        name="spread", title="Reward spread", axis="nats", level=0.0,
        series=(("reward/std", "spread"),),
        explanation="How much the thoughts of one position differ in reward. Near 0 there is nothing to prefer, so "
        "nothing to learn.",
    ),
    Plot(
        name="flat-groups", title="Flat groups", axis="share of positions", unit="share",
        series=(("reward/zero_std_fraction", "flat"),),
        explanation="Positions whose thoughts all earned about the same reward; they hardly teach anything.",
    ),
    Plot(
        name="closed", title="Closed thoughts", axis="share of thoughts", unit="share",
        series=(("rollout/closed", "closed"),),
        explanation="Thoughts that ended on their own. The others hit the length limit and were closed by force.",
    ),
    Plot(
        name="length", title="Thought length", axis="tokens",
        series=(("rollout/length", "length"),),
        explanation="Mean number of tokens in a thought. A slow slide towards very short thoughts is a warning sign.",
    ),
    Plot(
        name="leakage", title="Thoughts that contain the target", axis="share of thoughts", unit="share",
        series=(("rollout/leakage", "contain it"),),
        explanation="Thoughts in which the text of the true next token stands. A steep rise means that they guess the "
        "token instead of working towards it.",
    ),
    Plot(
        name="ratio", title="Importance ratio", axis="ratio", level=1.0,
        series=(("objective/ratio", "ratio"),),
        explanation="How likely the model being trained finds the thoughts, against the model that wrote them. It is "
        "1 before the first update on a batch.",
    ),
    Plot(
        name="clipped", title="Clipped tokens", axis="share of thought tokens", unit="share",
        series=(("objective/clip_fraction", "clipped"),),
        explanation="Tokens whose ratio left the allowed range and so stopped teaching. With one update per batch "
        "this stays at 0.",
    ),
    Plot(
        name="mismatch", title="Sampler against trainer", axis="mean |difference|, nats", level=0.0,
        series=(("objective/mismatch", "mismatch"),),
        explanation="How far the sampler's log-probabilities are from the trainer's for the same tokens. It should "
        "be rounding error.",
    ),
    Plot(
        name="kl", title="Distance from the start", axis="KL, nats per token", level=0.0,
        series=(("objective/kl", "KL"),),
        explanation="How far the model's thoughts have moved from those of the model it started as.",
    ),
    Plot(
        name="loss", title="Loss", axis="loss", only="thoughts", level=0.0,
        series=(("objective/loss", "loss"),),
        explanation="What the optimizer sees. It hovers around 0 by construction and need not fall; watch the gain "
        "instead.",
    ),
    Plot(
        name="next-token-loss", title="Next-token loss", axis="nats per token", only="cpt",
        series=(("objective/loss", "loss"),),
        explanation="Cross-entropy of the text being trained on. Lower is better.",
    ),
    Plot(
        name="accuracy", title="Next-token accuracy", axis="share of tokens", unit="share", only="cpt",
        series=(("objective/accuracy", "accuracy"),),
        explanation="How often the model's first choice is the true next token of the text being trained on.",
    ),
    Plot(
        name="gradient-norm", title="Gradient norm", axis="norm before clipping",
        series=(("optim/gradient_norm", "norm"),),
        explanation="Size of the update that the loss asks for. Single spikes are clipped; a steady climb points to "
        "an unstable run.",
    ),
    Plot(
        name="throughput", title="Throughput", axis="thought tokens per second",
        series=(("time/thought_tokens_per_s", "thought tokens per second"),),
        explanation="Speed of the whole loop: sampling, scoring and updating.",
    ),
    Plot(
        name="step-time", title="Time per step", axis="seconds",
        series=(("time/step_s", "step"),),
        explanation="Wall time of one step.",
    ),
)  # fmt: skip


def draw(plot: Plot, runs: list[Run]) -> str:
    """The plot as a standalone SVG document on white paper; a legend only where there is more than one curve.

    A run keeps its colour, that of its place in `runs`, in every plot.
    """
    legend = _legend(plot, runs)
    with styled() as save:
        figure = Figure(figsize=(WIDTH, HEIGHT + LEGEND_ROW * len(legend)), layout="constrained")
        axes = figure.add_subplot()
        _frame(axes, plot)
        for index, run in enumerate(runs):
            for place, (metric, _) in enumerate(plot.series):
                steps, values = run.series(metric)
                if plot.shows(run) and steps:
                    _curve(axes, np.array(steps), np.array(values), _style(plot, len(runs), index, place))
        _limits(axes, plot)
        if legend:
            figure.legend(legend, [str(line.get_label()) for line in legend], loc="outside lower left", frameon=False)
        return save(figure)


def _style(plot: Plot, runs: int, run: int, series: int) -> dict[str, Any]:
    """Colour tells runs apart and dash the curves of one run; a run alone uses both for its curves."""
    place = run if runs > 1 else series
    dash = series + (run // len(COLOURS) if len(plot.series) == 1 else 0)
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[dash % len(DASHES)]}


def _legend(plot: Plot, runs: list[Run]) -> list[Line2D]:
    lines = []
    if len(runs) > 1:
        shown = [(index, run) for index, run in enumerate(runs) if plot.shows(run)]
        lines += [Line2D([], [], label=_short(run.name), **_style(plot, len(runs), index, 0)) for index, run in shown]
    if len(plot.series) > 1:
        for place, (_, label) in enumerate(plot.series):
            style = _style(plot, len(runs), 0, place)
            if len(runs) > 1:
                style["color"] = INK
            lines.append(Line2D([], [], label=label, **style))
    return lines


def _short(name: str, longest: int = 44) -> str:
    name = visible(name)
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 + 1 :]}"


def _frame(axes: Axes, plot: Plot) -> None:
    axes.set_title(plot.axis, loc="left", fontsize=11.5)
    axes.set_xlabel("step", loc="right")
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.spines["left"].set_visible(False)
    axes.ticklabel_format(axis="x", style="plain")
    axes.yaxis.set_major_formatter(FuncFormatter(_percent if plot.unit == "share" else _tick))
    if plot.level is not None:
        axes.axhline(plot.level, color=INK, linewidth=0.8, alpha=0.5)


def _tick(value: float, _: int | None) -> str:
    """A tick that stands for itself; matplotlib's own would move an offset to the top of the axis."""
    return f"{value:.5g}".replace("-", MINUS)


def _percent(value: float, place: int | None) -> str:
    return f"{_tick(100 * value, place)} %"


def _limits(axes: Axes, plot: Plot) -> None:
    """Shares start at zero, and rounding errors around a level are not blown up to fill the plot."""
    low, high = axes.get_ylim()
    if plot.unit == "share":
        high = min(1.03, max(0.05, high))
        axes.set_ylim(-0.03 * high, high)
    elif plot.level == 1.0:
        axes.set_ylim(min(low, 0.99), max(high, 1.01))


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, style: dict[str, Any]) -> None:
    """Few points as they are; more as a thin line under their running mean; very many as a band around means."""
    if len(steps) < SMOOTH_FROM:
        axes.plot(steps, values, marker="o", markersize=3, linewidth=1.6, **style)
        return
    if len(steps) > BINS:
        starts = np.linspace(0, len(steps), BINS, endpoint=False).astype(int)
        low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        axes.fill_between(steps[starts], low, high, color=style["color"], alpha=0.2, linewidth=0)
        counts = np.diff(np.append(starts, len(steps)))
        steps, values = steps[starts], np.add.reduceat(values, starts) / counts
    else:
        axes.plot(steps, values, color=style["color"], linewidth=0.8, alpha=0.4)
    axes.plot(steps, running_mean(values), linewidth=2.0, **style)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a sixteenth of the points, centred; at the ends, over as much of it as there is."""
    half = max(1, len(values) // 32)
    totals = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (totals[high] - totals[low]) / (high - low)
