"""Answers to benchmark questions on an experiment's page: every arm beside the base, which was asked the same."""

from typing import Any

from forethought.tools.report.comparison import ALL, BASE, QUESTIONS, Figures, Table
from forethought.tools.report.tables import figure, signed

AVERAGES = ("math", "science", "overall")
MODES = {"nothink": "no thought", "think": "thinking"}
METRICS = {
    "pass_at_1": ("pass@1", "share of right answers among the sampled ones"),
    "greedy": ("greedy", "share of questions whose greedy answer is right"),
    "loglik_letter": ("likeliest letter", "share of questions whose right letter is the likeliest"),
    "loglik_plain": ("likeliest choice", "the same for the text of the choice"),
    "loglik_normalised": ("likeliest per byte", "the same, divided by the bytes of the text"),
    "extracted": ("extracted", "share of answers in which any answer was found"),
    "closed": ("thoughts that close", "share of thoughts that closed themselves"),
}


def content(figures: Figures) -> dict[str, Any]:
    """What the page's template shows of answers: no tables where nothing was asked."""
    groups = figures.asked
    averages = [_table(figures, group) for group in AVERAGES if group in groups]
    tasks = [_table(figures, group) for group in groups if group not in AVERAGES]
    return {"averages": averages, "tasks": tasks}


def _table(figures: Figures, group: str) -> Table:
    """A task, or an average of tasks: each accuracy of each mode with its error and the difference to the base."""
    columns = [
        (f"{mode}/{group}/{metric}", (f"{said}, {label}", explanation))
        for mode, said in MODES.items()
        for metric, (label, explanation) in METRICS.items()
    ]
    known = [one for one in columns if any(figures.row(arm, f"{QUESTIONS}/{one[0]}") for arm in figures.arms)]
    rows = [(arm, [_cell(figures, arm, name) for name, _ in known]) for arm in figures.arms]
    shown = [(arm, cells) for arm, cells in rows if any(value != "–" for value, _ in cells)]
    return Table(caption=_caption(figures, group), columns=[column for _, column in known], rows=shown)


def _caption(figures: Figures, group: str) -> str:
    counts = [figures.row(BASE, f"{QUESTIONS}/{mode}/{group}/questions") for mode in MODES]
    asked = [int(one.value) for one in counts if one is not None]
    return f"{group}: {asked[0]} questions" if asked else f"{group} average"


def _cell(figures: Figures, arm: str, name: str) -> tuple[str, str]:
    """The share in percent; below it the standard error, and what the arm has more than the base."""
    row = figures.row(arm, f"{QUESTIONS}/{name}")
    if row is None:
        return "–", ""
    parts = [_error(figures, arm, f"{QUESTIONS}/{name}")]
    more = figures.row(arm, f"minus/{BASE}/{QUESTIONS}/{name}")
    if more is not None:
        error = _error(figures, arm, f"minus/{BASE}/{QUESTIONS}/{name}")
        parts.append(f"{signed(more.value, 'share')} {error}".strip() + " to base")
    return figure(row.value, "share"), "; ".join(part for part in parts if part)


def _error(figures: Figures, arm: str, metric: str) -> str:
    row = figures.row(arm, f"{metric}/se", ALL)
    return "" if row is None else f"± {100 * row.value:.1f}"
