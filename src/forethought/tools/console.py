"""What the command line looks like: a progress bar, tables of figures, plain lines."""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from forethought.config import Notice
from forethought.config.registry import CONTROL_GAINS, METRICS
from forethought.run.diagnostics import Diagnosis
from forethought.run.trackers import Callbacks

if TYPE_CHECKING:
    from forethought.tools.report.runs import State

PLAIN_EVERY_S = 5.0

FIGURES = (
    "accuracy_think", "accuracy_nothink", "ce_think", "ce_nothink", "gain_over_base", "thought_length", "closed",
)  # fmt: skip
CONTROLS = (
    "gain_over_teacher", *CONTROL_GAINS, "marginal", "drift", "leakage", "checkable", "truth",
)  # fmt: skip
ANSWERS = (
    "pass_at_1", "greedy", "loglik_letter", "loglik_plain", "loglik_normalised", "extracted", "cut_off",
    "answer_length", "thought_length", "closed",
)  # fmt: skip


class Stream:
    """stdout or stderr, which may go away (a closed pipe or terminal, a full disk) without ending the process.

    What is written then is dropped; `gone` says so.
    """

    def __init__(self, file: Any):
        self._file, self.gone = file, False

    def write(self, text: str) -> int:
        """Write text, with what the encoding lacks as escapes, or drop it."""
        encoding = self._file.encoding or "utf-8"
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        self._try(lambda: self._file.write(shown))
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what cannot be written."""
        self._try(self._file.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError:
            self.gone = True
            with contextlib.suppress(OSError, ValueError):  # for the interpreter's own flush at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())


class ProgressBar(Callbacks):
    """Draws a live bar on a terminal and plain lines elsewhere."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: Any = None
        self._name = self._part = ""
        self._printed = self._began = 0.0
        self._first = 0

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def part(self, name: str) -> None:
        """The run that what follows belongs to, or "" for all of them."""
        self._part = f"{name}: " if name else ""

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress of an evaluation."""
        self._show(name, done, total, "")

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Progress of training, with its main metrics."""
        with_thoughts = {"gain": "reward/gain", "length": "rollout/length", "tokens/s": "time/thought_tokens_per_s"}
        without = {"loss": "objective/loss", "accuracy": "objective/accuracy"}
        names = with_thoughts if "rollout/length" in metrics else without
        figures = [f"{short} {metrics[name]:.3g}" for short, name in names.items() if name in metrics]
        self._show("training", step, total, ", ".join(figures))

    def note(self, text: str) -> None:
        """One line."""
        line(self._console, self._part + text)

    def warning(self, found: Diagnosis) -> None:
        """One yellow line; the run goes on."""
        text = f"warning: step {found.step}: {found.evidence}; {found.advice} (docs/diagnostics.md: {found.name})"
        self._console.print(Text(printable(text), style="yellow"), soft_wrap=True)

    def _show(self, name: str, done: int, total: int, figures: str) -> None:
        now, name = time.monotonic(), self._part + name
        if name != self._name:
            self._name, self._began, self._first, self._printed = name, now, done, 0.0
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=total, figures=figures)
        self._bar.update(self._task, completed=done, figures=figures)
        if not self._console.is_terminal and (done == total or now - self._printed > PLAIN_EVERY_S):
            self._printed = now
            parts = [f"{name} {done}/{total}", figures]
            if self._first < done < total:
                parts.append(f"{(now - self._began) / (done - self._first) * (total - done):.0f} s left")
            line(self._console, ", ".join(part for part in parts if part))


def table(figures: dict[str, Any], columns: Sequence[str], out: Console, metrics: Sequence[str] = FIGURES) -> None:
    """Figures by group of positions, one column for each of `columns`, intervals in brackets."""
    from forethought.tools.report.tables import measured, windows_note

    groups = sorted(group for group, _ in measured(figures, columns[:1]))
    if not groups:
        return
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("held-out text [95 % interval]", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for group in groups:
        names = [f"{column}/{group}" for column in columns]
        note = windows_note([figures.get(f"{names[0]}/windows")])
        title = f"{printable(group)}: {figures[f'{names[0]}/positions']} positions" + (f"; {note}" if note else "")
        _add_group(shown, title, names, metrics, partial(_cell, figures, digits=2, missing="-"))
    out.print(shown)


def answer_table(figures: dict[str, Any], out: Console) -> None:
    """Figures by task and for the averages, one column for each model and mode, standard errors after ±."""
    keys = [name.split("/") for name in figures if name.startswith(("base/", "model/"))]
    columns = sorted({(key[0], key[1]) for key in keys}, key=lambda column: (column[0], column[1] != "nothink"))
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("± standard error")  # the only column that may wrap
    names = {"base": "base,\n", "model": "trained,\n"} if columns[0][0] == "base" else {"model": ""}
    for who, mode in columns:
        shown.add_column(names[who] + ("thinking" if mode == "think" else "no thought"), justify="right", no_wrap=True)
    for group in dict.fromkeys(key[2] for key in keys):
        asked = [value for name, value in figures.items() if name.endswith(f"/{group}/questions")]
        title = f"{group}: {asked[0]} asked" if asked else f"{group} average"
        groups = [f"{who}/{mode}/{group}" for who, mode in columns]
        _add_group(shown, title, groups, ANSWERS, partial(_cell, figures, digits=0, missing=""))
    out.print(shown)


def run_table(states: "Sequence[State]", out: Console) -> None:
    """Runs, one a row: how far each is, its last gain and the time that it still takes."""
    from forethought.tools.report.tables import duration, signed

    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("run", overflow="fold")
    shown.add_column("state", overflow="fold", min_width=len("finished"))
    for title in ("step", "gain", "left"):
        shown.add_column(title, justify="right", no_wrap=True)
    for one in states:
        steps = "" if one.step is None else f"{one.step:,}/{one.steps:,}"
        gain = "" if one.gain is None else signed(one.gain)
        left = "" if one.left_s is None else duration(one.left_s)
        shown.add_row(*(Text(printable(cell)) for cell in (str(one.path), one.state, steps, gain, left)))
    out.print(shown)


def _add_group(
    shown: Table, title: str, columns: Sequence[str], metrics: Sequence[str], cell: Callable[[str, bool], str]
) -> None:
    """A heading, and a row for each metric that any column has; `cell` is told its name and whether it is a share."""
    shown.add_row(Text(title, style="bold"))
    for metric in (METRICS[name] for name in metrics):
        cells = [cell(f"{column}/{metric.name}", metric.unit == "share") for column in columns]
        if set(cells) - {"", "-"}:
            units = ("nats", "tokens") if "entropy" not in metric.label else ()  # an entropy is in nats
            label = metric.label + (f" ({metric.unit})" if metric.unit in units else "")
            shown.add_row(f"  {label}", *map(Text, cells))


def _cell(figures: dict[str, Any], name: str, share: bool, digits: int, missing: str) -> str:
    """A figure with its standard error or its interval; of numbers that are no shares so many digits."""
    if name not in figures:
        return missing
    scale, digits, unit = (100, 1, "%") if share else (1, digits, "")
    value, *others = (f"{scale * figures.get(name + end, 0):.{digits}f}" for end in ("", "/se", "/low", "/high"))
    error = f" ±{others[0]}" if f"{name}/se" in figures else ""
    return value + unit + error + (f" [{others[1]}, {others[2]}]" if f"{name}/low" in figures else "")


def printable(text: str) -> str:
    """Text with control characters shown as escapes, so that it cannot drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def line(console: Console, text: str) -> None:
    """A line of text, as it is."""
    console.print(printable(text), markup=False, soft_wrap=True)


@contextlib.contextmanager
def notices(err: Console, first: bool) -> Iterator[None]:
    """Print each notice and old name as one line, once; of several processes only the first one does."""
    with warnings.catch_warnings():
        others, seen = warnings.showwarning, set()

        def show(message: Any, category: type[Warning], *where: Any) -> None:
            key = str(message).partition(", the first is ")[0]
            if not issubclass(category, Notice):
                others(message, category, *where)
            elif first and key not in seen:
                seen.add(key)
                line(err, f"forethought: {message}")

        warnings.simplefilter("always", Notice)
        warnings.showwarning = show
        yield
