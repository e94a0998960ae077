"""Reports: run folders in, one self-contained HTML page out, with its plots as SVG files beside it.

Never imports torch.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from forethought import html
from forethought.config import UserError, flatten
from forethought.config.registry import METHODS
from forethought.html import visible
from forethought.run.folder import RunLog, replace_text
from forethought.tools.report import comparison, plots, viewer
from forethought.tools.report import runs as run_folders
from forethought.tools.report.runs import STEP_OF_STAGE, Position, Run, number
from forethought.tools.report.tables import (
    Cell,
    capitalized,
    duration,
    evaluations,
    figure,
    metric,
    render,
    signed,
    windows_note,
    with_ends,
)

SIZES = {"positions_shown": 4, "thoughts_shown": 8, "context_shown": 400, "thought_shown": 600}
"""Positions of a step, thoughts of a position, characters of a context and of a thought that are not collapsed."""
FOLLOW_S, POLL_S = 10, 1.0
"""Shortest time between two pages of a running run, and how often it is looked whether it has ended."""
OVERVIEW = (
    "reward/gain", "reward/evidence", "reward/match", "rollout/closed", "rollout/length", "objective/loss",
    "objective/accuracy",
)  # fmt: skip


def write(runs: Sequence[str | Path], out: str | Path | None = None, reload_s: int = 0) -> Path:
    """Report on one run, or compare several, and return the page's path.

    The page of one run is RUN/report.html and its plots are RUN/plots/NAME.svg. The page of several runs is
    report.html next to the first run, and its plots are in report-plots/. `out` names another page. With `reload_s`,
    browsers load the page anew after as many seconds.

    Raises:
        UserError: no runs, a folder that is not a run, a broken file in it, or a page that cannot be written.
    """
    if not runs:
        raise UserError("a report takes at least one run folder")
    paths, loaded = [Path(run) for run in runs], read_runs(*runs)
    several = len(paths) > 1
    usual = (paths[0].absolute().parent if several else paths[0]) / "report.html"
    target = writable(usual if out is None else out)
    folder = target.with_name(f"{target.stem}-plots") if several else paths[0] / "plots"
    drawn = {plot: plots.draw(plot, loaded) for plot in plots.plots_of(loaded)}
    content = _content(loaded, drawn, folder.name)
    needed = {"viewer.js": content["viewer"], "follow.js": reload_s}
    scripts = [viewer.script(name) for name, is_needed in needed.items() if is_needed]
    more = {"scripts": scripts, "reload_s": reload_s, "now": time.strftime("%H:%M:%S")}
    for plot, svg in drawn.items():
        _written(folder / f"{plot.name}.svg", svg)
    return _written(target, _render("page.html.j2", content | more))


def follow(runs: Sequence[str | Path], out: str | Path | None = None) -> Iterator[Path]:
    """Write the page while any of the runs goes on, and yield its path each time. Raises UserError.

    The page reloads itself until it is written for the last time, when the last run has ended, or on Ctrl-C. It
    takes at most a tenth of a CPU core from the run.
    """
    due, pause = 0.0, FOLLOW_S
    with contextlib.suppress(KeyboardInterrupt):
        while any(RunLog(Path(run)).in_use() for run in runs):
            if time.monotonic() >= due:
                spent = time.process_time()
                yield write(runs, out, pause)
                pause = max(FOLLOW_S, math.ceil(10 * (time.process_time() - spent)))
                due = time.monotonic() + pause
            time.sleep(POLL_S)
    yield write(runs, out)


class Runs(list[Run]):
    """Runs, as a notebook shows them: what they are, and their held-out figures before and after training."""

    def _repr_html_(self) -> str:
        facts = [_facts(run) for run in self]
        names = ["", *(run.name for run in self)]
        shown = [html.table(names, [(label, *(each[label] for each in facts)) for label in facts[0]])]
        for group, rows in evaluations(self):
            cells = [
                (capitalized(one.label), *(_before_and_after(cell) for cell in row))
                for one, row in rows
                if one.name in comparison.MAIN
            ]
            shown.append(html.table(names, cells, "all positions" if group == "all" else f"positions marked {group}"))
        return "".join(shown)

    def __repr__(self) -> str:
        return f"<Runs {', '.join(run.name for run in self)}>"

    def curves(self, *names: str) -> "Drawing":
        """Curves of training: plots with the names of the files in RUN/plots, or the first four that have data."""
        known = {plot.name: plot for plot in plots.plots_of(self)}
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"curves: {unknown[0]!r}: must be one of {', '.join(known)}")
        shown = [known[name] for name in names or list(known)[:4]]
        return Drawing(plots.side_by_side([plots.draw(plot, self, plot.title) for plot in shown]))


class Drawing(str):
    """An SVG document that a notebook shows."""

    def _repr_svg_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return "<Drawing>"


def _before_and_after(cell: Cell) -> Markup:
    values, intervals = zip(cell.before, cell.after, strict=True)
    value = " → ".join(values) if values[0] != "–" else values[1]
    return html.with_note(value, " → ".join(filter(None, intervals)))


def read_runs(*runs: str | Path) -> Runs:
    """Read run folders for a notebook: `read_runs("runs/quickstart")[0].positions[-1]` are the thoughts logged last.

    Raises:
        UserError: a folder that is not a run, or a broken file in it.
    """
    paths = [Path(run) for run in runs]
    return Runs(run_folders.load(path, name) for path, name in zip(paths, run_folders.names(paths), strict=True))


def write_comparison(run: Path) -> Path:
    """Write the page of an experiment, RUN/compare.html, from its compare.json and experiment.json; return its path.

    Also writes RUN/curves.html, a report on the first seed of each arm.

    Raises:
        UserError: a file is missing or broken, or a page cannot be written.
    """
    figures = comparison.load(run)
    first = [run / arm / f"seed-{one.seeds[0]}" for arm, one in figures.described.arms.items() if one.seeds]
    if first:
        write(first, run / "curves.html")
    return _written(run / "compare.html", _render("comparison.html.j2", comparison.content(figures)))


def write_thoughts(found: viewer.Documents, out: str | Path) -> Path:
    """Write the thought viewer for documents that belong to no run, and return the page's path. Raises UserError."""
    content = {"viewer": viewer.collect([(found.model, found, [])]), "documents": found.documents}
    return _written(Path(out), _render("thoughts.html.j2", content | {"script": viewer.script("viewer.js")}))


def writable(out: str | Path) -> Path:
    """The path of a page, whose folder is made. Raises UserError where it cannot be written, before the work for it."""
    target = Path(out)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError("is a folder; name a file")
        if not os.access(target.parent if target.is_file() or not target.exists() else target, os.W_OK):
            raise PermissionError("the folder cannot be written")
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r}: {error}") from None
    return target


def _written(target: Path, text: str) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, text)
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r}: {error}") from None
    return target


def _render(template: str, content: dict[str, Any]) -> str:
    filters = (passage, token, visible, figure, signed, duration, probability, strength, capitalized)
    return render(template, content, escape=True, **{one.__name__: one for one in filters})


def passage(text: str) -> Markup:
    """Escaped text with visible line breaks and control characters."""
    shown = escape(visible(text, kept="\n"))
    return Markup(shown.replace("\n", Markup('<span class="sign">↵</span>\n')))


def token(text: str) -> str:
    """The text of a token with visible spaces and line breaks, not escaped yet."""
    return visible(text.replace("\n", "↵").replace(" ", "␣"))


def probability(logp: float) -> str:
    """A log-probability as a probability in percent."""
    value = math.exp(min(logp, 0.0))
    return f"{100 * value:.1f} %" if value >= 0.001 else "below 0.1 %"


def strength(position: Position, advantage: float | None) -> str:
    """Color strength of a thought, 0 to 1: its advantage relative to the largest one at its position."""
    largest = max((abs(one.advantage) for one in position.thoughts if one.advantage is not None), default=0.0)
    return "0" if not largest or advantage is None else f"{abs(advantage) / largest:.2f}"


def _content(runs: list[Run], drawn: dict[plots.Plot, str], folder: str) -> dict[str, Any]:
    """What the template of a page shows. `drawn`: the SVG of each plot, `folder`: where they are saved."""
    facts = list(map(_facts, runs))
    return {
        "runs": runs,
        "methods": METHODS,
        "folder": folder,
        "facts": [(label, [each[label] for each in facts]) for label in facts[0]],
        "overview": _overview(runs),
        "warnings": [run for run in runs if run.warnings],
        "viewer": viewer.collect((run.name, viewer.load(run.path), run.positions) for run in runs),
        "unfinished": [run for run in runs if not run.summary],
        "groups": [(*group, _windows(runs, group[0])) for group in evaluations(runs)],
        "thinking": [(group, one) for group, _ in evaluations(runs) if (one := _thinking(runs, group)) is not None],
        "drawings": [(plot, _inline(plot, svg, runs)) for plot, svg in drawn.items()],
        "thoughts": [
            (run, [(step, list(group)) for step, group in groupby(run.positions, key=lambda one: one.step)])
            for run in runs
        ],
        "settings": _settings(runs),
        "summaries": [(run, rows) for run in runs if (rows := _other_values(run.summary))],
        "palette": len(plots.COLORS),
        **SIZES,
    }


def _steps(run: Run) -> str:
    logged = run.metrics[-1]["step"] if run.metrics else 0
    if not run.summary:
        return f"{logged:,} of {run.option('train.steps', '?')}, not finished"
    done = number(run.summary.get("steps"))
    return f"{logged if done is None else int(done):,}"


def _facts(run: Run) -> dict[str, Any]:
    """What the run was, in a few words each."""
    batch, seconds = run.option("train.batch", "?"), number(run.summary.get("seconds"))
    thoughts = f"{batch} positions with {run.option('method.group', '?')} thoughts each"
    others = f"{batch} {STEP_OF_STAGE.get(run.method, 'windows of text')}"
    return {
        "Method": run.method_label,
        "Model": run.option("model.path", "not recorded"),
        "Corpus": run.option("corpus.path", "not recorded"),
        "Steps": _steps(run),
        "Each step": thoughts if run.samples_thoughts else others,
        "Seed": run.option("seed", run.summary.get("seed", "not recorded")),
        "Wall time": "not recorded" if seconds is None else duration(seconds),
    }


def _windows(runs: list[Run], group: str) -> str:
    return windows_note(run.summary.get(f"{when}/{group}/windows") for run in runs for when in ("before", "after"))


def _thinking(runs: list[Run], group: str) -> Markup | None:
    """The gain over the share of positions that think, dashed before training; a color for each run."""
    curves = []
    for index, run in enumerate(runs):
        name = f"{run.name}, " if len(runs) > 1 else ""
        for dash, when in enumerate(("after", "before")):
            curves.append((f"{name}{when} training", index, dash, partial(with_ends, run.summary, f"{when}/{group}")))
    return plots.thinking_shares(group, curves)


def _overview(runs: list[Run]) -> list[tuple[Any, list[tuple[float, float] | None]]]:
    """For each metric and run: means over the first and the last tenth of the logged steps."""
    rows = []
    for name in OVERVIEW:
        next_token = name == "objective/loss"  # any other loss is near 0 by construction
        ends = [
            None if next_token and not run.logs("objective/accuracy") else _ends(run.series(name)[1]) for run in runs
        ]
        if any(ends):
            rows.append((metric(name), ends))
    return rows


def _ends(values: list[float]) -> tuple[float, float] | None:
    if not values:
        return None
    count = math.ceil(len(values) / 10)
    return sum(values[:count]) / count, sum(values[-count:]) / count


def _inline(plot: plots.Plot, svg: str, runs: list[Run]) -> Markup:
    """The drawing with the ends of its curves as a text alternative."""
    texts = []
    for run in filter(plot.shows, runs):
        for one in map(metric, plot.metrics):
            if ends := _ends(run.series(one.name)[1]):
                start, end = (figure(value, "share" if one.unit == "share" else "nats") for value in ends)
                texts.append(f"{visible(run.name)}, {one.label}: from {start} to {end}")
    return plots.inline(svg, plot.name, f"{plot.title}. {'; '.join(texts)}")


def _settings(runs: list[Run]) -> list[tuple[str, list[str], bool]]:
    """Options in the order of the first config: name, value in each run, whether the runs differ."""
    flat = [_texts(run.config) for run in runs]
    rows = [
        (name, [one.get(name, "–") for one in flat]) for name in dict.fromkeys(name for one in flat for name in one)
    ]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def _other_values(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The values of summary.json that are not evaluations."""
    return [(key, text) for key, text in _texts(summary).items() if not key.startswith(("before/", "after/"))]


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) and value.strip() else json.dumps(value, ensure_ascii=False)
        for name, value in flatten(values).items()
    }
