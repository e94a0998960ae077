"""One HTML page about one or several runs: everything in the file, one script of ours, nothing fetched."""

import json
import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from forethought.config import flatten
from forethought.tools.report import answers, comparison, evaluation, plots, svg, viewer
from forethought.tools.report.runs import Position, Run, number
from forethought.tools.report.text import duration, figure, signed, visible

POSITIONS_SHOWN, THOUGHTS_SHOWN = 4, 8
"""Positions of a step on the page, and thoughts of a position that are not folded away."""
CONTEXT_SHOWN, THOUGHT_SHOWN = 400, 600
"""Characters of a context's end and of a thought's beginning that are not folded away."""

_METHODS = {
    "rlp": "RLP, reinforcement learning pretraining: it practised thinking before it predicts the next token",
    "rpt": "RPT, reinforcement pre-training: it practised thinking before it writes a prediction, right or wrong",
    "mixed": "Mixed SFT: it went on predicting the next token, with and without thoughts of its start that gained",
    "cpt": "CPT, continued pretraining: it went on predicting the next token, without thoughts",
}
_GLANCE = (
    ("Information gain", "nats", "reward/gain", ""),
    ("Evidence after a thought", "nats", "reward/evidence", ""),
    ("Right predictions", "share", "reward/match", ""),
    ("Closed thoughts", "share", "rollout/closed", ""),
    ("Thought length", "tokens", "rollout/length", ""),
    ("Next-token loss", "nats", "objective/loss", "cpt"),
    ("Next-token accuracy", "share", "objective/accuracy", "cpt"),
)
"""(label, unit, metric, the only method it is for)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A plot with the SVG for the page."""

    plot: plots.Plot
    svg: Markup


def render(runs: list[Run], drawings: dict[str, str], folder: str) -> str:
    """The page's HTML. `drawings` holds each plot's standalone SVG by the plot's name, `folder` where they are kept."""
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            runs=runs,
            folder=folder,
            methods=_METHODS,
            facts=[(label, [fact(run) for run in runs]) for label, fact in _FACTS],
            glance=_glance(runs),
            warnings=[run for run in runs if run.warnings],
            viewer=viewer.collect(runs),
            unfinished=[run for run in runs if not run.summary],
            groups=evaluation.groups(runs),
            drawings=[
                Drawing(plot=plot, svg=_inline(plot, drawings[plot.name], runs))
                for plot in plots.PLOTS
                if plot.name in drawings
            ],
            thoughts=[(run, _steps(run.positions)) for run in runs],
            settings=_settings(runs),
            summaries=[(run, _plain(run.summary)) for run in runs if _plain(run.summary)],
            palette=len(svg.COLOURS),
            positions_shown=POSITIONS_SHOWN,
            thoughts_shown=THOUGHTS_SHOWN,
            context_shown=CONTEXT_SHOWN,
            thought_shown=THOUGHT_SHOWN,
        )
    )


def environment() -> Environment:
    """The templates of this folder; text in them is escaped unless it is Markup."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "passage": passage,
        "token": token,
        "visible": visible,
        "figure": figure,
        "signed": signed,
        "duration": duration,
        "chance": _chance,
        "strength": strength,
    }
    return templates


def render_comparison(figures: comparison.Figures) -> str:
    """The HTML of an experiment's page."""
    return (
        environment()
        .get_template("comparison.html.j2")
        .render({**comparison.content(figures), **answers.content(figures)})
    )


def passage(text: str) -> Markup:
    """Escaped text with its line breaks both kept and shown, and control characters as signs."""
    shown = escape(visible(text, kept="\n"))
    return Markup(shown.replace("\n", Markup('<span class="sign">↵</span>\n')))


def token(text: str) -> str:
    """A token's text with its spaces and line breaks as signs; not escaped yet."""
    return visible(text.replace("\n", "↵").replace(" ", "␣"))


def _chance(logp: float) -> str:
    """A log-probability as the chance it stands for."""
    chance = math.exp(min(logp, 0.0))
    return f"{100 * chance:.1f} %" if chance >= 0.001 else "below 0.1 %"


def _done(run: Run) -> str:
    logged = run.metrics[-1]["step"] if run.metrics else 0
    done = number(run.summary.get("steps"))
    if run.summary:
        return f"{logged if done is None else int(done):,}"
    return f"{logged:,} of {run.option('train.steps', '?')}, not finished"


def _batch(run: Run) -> str:
    batch = run.option("train.batch", "?")
    if run.method == "cpt":
        return f"{batch} windows of text"
    return f"{batch} positions with {run.option('method.group', '?')} thoughts each"


def _wall_time(run: Run) -> str:
    seconds = number(run.summary.get("seconds"))
    return "not recorded" if seconds is None else duration(seconds)


def _method(run: Run) -> str:
    name = run.method.upper()
    control = run.method != "cpt" and run.option("method.reward") == "random"
    return f"{name} with random rewards (a control)" if control else name


_FACTS = (
    ("Method", _method),
    ("Model", lambda run: run.option("model.path", "not recorded")),
    ("Corpus", lambda run: run.option("corpus.path", "not recorded")),
    ("Steps", _done),
    ("Each step", _batch),
    ("Seed", lambda run: run.option("seed", run.summary.get("seed", "not recorded"))),
    ("Wall time", _wall_time),
)


def _glance(runs: list[Run]) -> list[tuple[str, str, list[tuple[float, float] | None]]]:
    """(label, unit, for each run the mean over the first and over the last tenth of its logged steps)."""
    rows = []
    for label, unit, metric, only in _GLANCE:
        ends = [_ends(run.series(metric)[1]) if only in ("", run.method) else None for run in runs]
        if any(ends):
            rows.append((label, unit, ends))
    return rows


def _ends(values: list[float]) -> tuple[float, float] | None:
    if not values:
        return None
    part = math.ceil(len(values) / 10)
    return sum(values[:part]) / part, sum(values[-part:]) / part


def _inline(plot: plots.Plot, drawing: str, runs: list[Run]) -> Markup:
    readings = []
    for run in runs:
        for metric, legend in plot.series:
            ends = _ends(run.series(metric)[1]) if plot.shows(run) else None
            if ends:
                start, end = (figure(value, "share" if plot.unit == "share" else "nats") for value in ends)
                readings.append(f"{visible(run.name)}, {legend}: from {start} to {end}")
    # The label is escaped here; the drawing is matplotlib's own, which escapes the runs' names in it.
    return Markup(svg.inline(drawing, plot.name, str(escape(f"{plot.title}. {'; '.join(readings)}"))))


def _steps(positions: list[Position]) -> list[tuple[int, list[Position]]]:
    return [(step, list(group)) for step, group in groupby(positions, key=lambda one: one.step)]


def strength(position: Position, advantage: float | None) -> str:
    """How strongly a thought is coloured: its advantage against the largest of its group, 0 to 1."""
    largest = max((abs(one.advantage) for one in position.thoughts if one.advantage is not None), default=0.0)
    return "0" if not largest or advantage is None else f"{abs(advantage) / largest:.2f}"


def _settings(runs: list[Run]) -> list[tuple[str, list[str], bool]]:
    """(option, its value in each run, whether the runs differ in it), in the order of the first config."""
    flat = [dict(_flatten(run.config)) for run in runs]
    rows = []
    for option in dict.fromkeys(option for options in flat for option in options):
        values = [options.get(option, "–") for options in flat]
        rows.append((option, values, len(set(values)) > 1))
    return rows


def _flatten(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(option, _literal(value)) for option, value in flatten(values).items()]


def _literal(value: Any) -> str:
    return value if isinstance(value, str) and value.strip() else json.dumps(value, ensure_ascii=False)


def _plain(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the summary holds besides the evaluations."""
    return [(key, text) for key, text in _flatten(summary) if not key.startswith(("before/", "after/"))]
