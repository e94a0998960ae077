"""Run folders in, one self-contained HTML page out, with its plots as SVG files beside it. Never imports torch."""

from collections.abc import Sequence
from pathlib import Path

from forethought.config import UserError
from forethought.tools.report import comparison, page, plots
from forethought.tools.report import runs as run_folders


def write(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Report on one run, or on several side by side, and return the page's path.

    One run: the page is RUN/report.html, its plots are RUN/plots/NAME.svg. Several: the page is report.html beside the
    first run, and the plots lie beside the page in a folder of its name (report-plots/). `out` names another page.

    Raises:
        UserError: no runs, a folder that is no run or has nothing to report yet, a broken file in it, or a page that
            cannot be written.
    """
    if not runs:
        raise UserError("a report takes at least one run folder")
    paths = [Path(run) for run in runs]
    loaded = [run_folders.load(path, name) for path, name in zip(paths, run_folders.names(paths), strict=True)]
    several = len(paths) > 1
    target = Path(out) if out is not None else (paths[0].absolute().parent if several else paths[0]) / "report.html"
    folder = target.with_name(f"{target.stem}-plots") if several else paths[0] / "plots"
    drawings = {plot.name: plots.draw(plot, loaded) for plot in plots.PLOTS if any(map(plot.shows, loaded))}
    html = page.render(loaded, drawings, folder.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        for name, svg in drawings.items():
            (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
        target.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {str(target)!r}: {error}") from None
    return target


def write_comparison(run: Path) -> Path:
    """The page of an experiment, RUN/compare.html, from its compare.json and experiment.json; returns its path.

    Beside it go the curves and thoughts of each arm's first seed, RUN/curves.html.

    Raises:
        UserError: a file is missing or broken, or a page cannot be written.
    """
    figures = comparison.load(run)
    first = [run / arm / f"seed-{one.seeds[0]}" for arm, one in figures.described.arms.items() if one.seeds]
    if first:
        write(first, run / "curves.html")
    target = run / "compare.html"
    try:
        target.write_text(page.render_comparison(figures), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the page {str(target)!r}: {error}") from None
    return target
