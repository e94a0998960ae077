"""The command line: a thin caller of the library, and the only place that prints."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import forethought
from forethought.config import Config, RunError, UserError, difference, from_dict, load, merge, read_overrides, to_dict
from forethought.diagnostics import Diagnosis

USAGE = """\
usage: forethought train CONFIG [--section.option value ...]   train a config file, or a shipped one such as quickstart
       forethought train --resume RUN                          continue a stopped run from its last checkpoint
       forethought evaluate MODEL_OR_RUN [--section.option value ...]
       forethought questions MODEL_OR_RUN [--questions.data FOLDER] [--section.option value ...]
       forethought compare EXPERIMENT [--config CONFIG] [--seeds 0,1,2] [--processes N] [--section.option value ...]
       forethought posttrain STAGE --start MODEL_OR_RUN [--run FOLDER] [--option value ...]
       forethought report RUN [RUN ...] [--out FILE]
       forethought plan CONFIG [--gpus N] [--gpu h100] [--simulate] [--json FILE] [--section.option value ...]

`forethought train --help` lists every option.
"""
PLAIN_EVERY_S = 5.0

FIGURES = {
    "accuracy_think": "accuracy, thinking",
    "accuracy_nothink": "accuracy, no thought",
    "ce_think": "cross-entropy, thinking",
    "ce_nothink": "cross-entropy, no thought",
    "gain_over_base": "gain over the base (nats)",
    "thought_length": "thought length (tokens)",
    "closed": "thoughts that close",
}
ANSWERS = {
    "pass_at_1": "pass@1",
    "greedy": "greedy",
    "loglik_letter": "likeliest letter",
    "loglik_plain": "likeliest choice",
    "loglik_normalised": "likeliest per byte",
    "extracted": "extracted",
    "stated": "stated",
    "cut_off": "cut off",
    "answer_length": "answer, tokens",
    "thought_length": "thought, tokens",
    "closed": "thoughts closed",
}
CONTROLS = {
    "gain_over_teacher": "gain over the teacher (nats)",
    "gain_self": "gain over itself (nats)",
    "gain_empty": "... with an empty thought",
    "gain_random": "... with random tokens",
    "gain_shuffled": "... with another's thought",
    "kept_shuffled": "gain that shuffling keeps",
    "marginal": "cross-entropy, mixture",
    "drift": "drift of plain prediction",
    "leakage": "thoughts with the target",
    "checkable": "statements in a thought",
    "truth": "statements that are right",
}
SHARES = ("accuracy_think", "accuracy_nothink", "closed", "kept_shuffled", "leakage", "truth")


def main(words: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 2 for a user's error, 1 for a run that failed, 128 + n for signal n."""
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        return _command(list(sys.argv[1:] if words is None else words), out, err)
    except UserError as error:
        _line(err, f"forethought: {error}")
        return 2
    except RunError as error:
        _line(err, f"forethought: {error}")
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        _line(err, "forethought: interrupted")
        return 130


def _command(words: list[str], out: Console, err: Console) -> int:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--help", "-h", "help"):
        out.print(USAGE, end="", markup=False, soft_wrap=True)
        return 0
    if name == "--version":
        out.print(f"forethought {forethought.__version__}", markup=False)
        return 0
    known = (_train, _evaluate, _questions, _compare, _posttrain, _plan, _report)
    commands = {command.__name__[1:]: command for command in known}
    if name not in commands:
        *most, last = commands
        raise UserError(f"unknown command {name!r}: must be {', '.join(most)} or {last}")
    if "--help" in rest or "-h" in rest:
        _help(name, out)
        return 0
    return commands[name](rest, out, err)


def _help(name: str, out: Console) -> None:
    out.print(USAGE, markup=False, soft_wrap=True)
    if name in ("report", "posttrain"):
        return
    if name == "plan":
        from forethought.plan import OPTIONS

        for option, meaning in OPTIONS.items():
            _line(out, f"  {option:12}{meaning}")
    import tyro

    with contextlib.suppress(SystemExit):
        settings = (tyro.conf.FlagConversionOff,)
        tyro.cli(Config, args=["--help"], prog=f"forethought {name}", use_underscores=True, config=settings)


def _train(words: list[str], out: Console, err: Console) -> int:
    resumed, words = _take(words, "--resume")
    name, words = (words[0], words[1:]) if words and not words[0].startswith("--") else (None, words)
    if name is None and resumed is None:
        raise UserError("train takes a config file, the name of a shipped one such as quickstart, or --resume RUN")
    config = load(name, words) if resumed is None else _saved_config(resumed, name, words)
    _quiet_libraries()
    from forethought import report
    from forethought.interrupts import Stopped
    from forethought.loop import resume, train

    try:
        with Watcher(err) as watcher:
            summary = train(config, watcher) if resumed is None else resume(resumed, watcher)
    except Stopped as stopped:
        _line(err, f"forethought: {stopped}")
        return 128 + stopped.number
    run = Path(config.run if resumed is None else resumed)
    page = report.write([run])
    _table(summary, ("before", "after"), out)
    _line(out, f"{summary['steps']} steps, {summary['seconds']:.0f} s; trained model: {run / 'policy'}; report: {page}")
    return 0


def _saved_config(run: str, name: str | None, words: list[str]) -> Config:
    """The config of the run to resume; refuses options that would change it."""
    from forethought.runlog import RunLog

    saved = RunLog.open(run).config()
    start = load(name, words) if name else from_dict(merge(to_dict(saved), read_overrides(words)))
    if found := difference(saved, start):
        option, before, now = found
        raise UserError(f"{option} = {now!r}: the run to resume has {before!r}; resuming cannot change an option")
    return saved


def _evaluate(words: list[str], out: Console, err: Console) -> int:
    if not words or words[0].startswith("--"):
        raise UserError("evaluate takes a run folder or a model: embedded, a hub id, a folder or a .gguf file")
    overrides = read_overrides(words[1:])
    _quiet_libraries()
    from forethought.evaluation import evaluate

    with Watcher(err) as watcher:
        figures, file = evaluate(words[0], overrides, watcher.phase)
    _table({f"model/{name}": value for name, value in figures.items()}, ("model",), out, FIGURES | CONTROLS)
    _line(out, f"figures: {file}")
    return 0


def _questions(words: list[str], out: Console, err: Console) -> int:
    if not words or words[0].startswith("--"):
        raise UserError("questions takes a run folder or a model: embedded, a hub id, a folder or a .gguf file")
    overrides = read_overrides(words[1:])
    _quiet_libraries()
    from forethought.evaluation.ask import ask

    with Watcher(err) as watcher:
        figures, file = ask(words[0], overrides, lambda done, total: watcher.phase("answering", done, total))
    _answer_table(figures, out)
    _line(out, f"figures: {file}; every prompt and answer: {file.with_suffix('.jsonl')}")
    return 0


def _compare(words: list[str], out: Console, err: Console) -> int:
    if not words or words[0].startswith("--"):
        raise UserError("compare takes an experiment file, or the name of a shipped one such as compare-quickstart")
    overrides = read_overrides(words[1:])
    _quiet_libraries()
    from forethought.experiment import compare
    from forethought.interrupts import Stopped

    try:
        with Watcher(err) as watcher:
            verdicts, page = compare(words[0], overrides, watcher)
    except Stopped as stopped:
        _line(err, f"forethought: {stopped}")
        return 128 + stopped.number
    for one in verdicts:
        _line(out, f"{ {True: 'holds', False: 'FAILS', None: '?'}[one.holds]:5}  {one.claim}: {one.evidence}")
    spent = json.loads(page.with_name("experiment.json").read_bytes())["spent"]
    _line(out, f"{spent['seconds']:.0f} s in all calls, {spent['cpu_seconds']:.0f} CPU seconds of all finished runs")
    _line(out, f"page: {page}; rows: {page.with_name('compare.json')}")
    return 0


def _posttrain(words: list[str], out: Console, err: Console) -> int:
    start, words = _take(words, "--start")
    if start is None or not words or words[0].startswith("--"):
        raise UserError("posttrain takes a stage's file, or the name of a shipped one, and --start MODEL_OR_RUN")
    overrides = read_overrides(words[1:])
    _quiet_libraries()
    from forethought.stages import posttrain

    with Watcher(err) as watcher:
        folder = posttrain(words[0], start, overrides, watcher)
    _line(out, f"trained model: {folder / 'policy'}; measure it with: forethought evaluate {folder}")
    return 0


def _report(words: list[str], out: Console, err: Console) -> int:
    target, words = _take(words, "--out")
    for word in words:
        if word.startswith("--"):
            raise UserError(f"unknown option {word}: report takes run folders and --out FILE")
    if not words:
        raise UserError("report takes at least one run folder")
    from forethought import report

    _line(out, f"report: {report.write([Path(word) for word in words], Path(target) if target else None)}")
    return 0


def _plan(words: list[str], out: Console, err: Console) -> int:
    from forethought import plan
    from forethought.plan.page import shown

    name, options, overrides = plan.words_of(words)
    config = load(name, overrides)
    shape = plan.shipped_shape(config.model.path)
    if shape is None:
        _quiet_libraries()
        from forethought.model import load_shape

        shape = load_shape(config.model)
    found = plan.plan(config, shape, options)
    plan.write(found, options.get("json"))
    for one in shown(found):
        _line(out, one) if isinstance(one, str) else out.print(one)
    return 0


def _take(words: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of `--option VALUE` or `--option=VALUE`, and the other words."""
    for i, word in enumerate(words):
        if word == option:
            if i + 1 == len(words):
                raise UserError(f"option {option} needs a value")
            return words[i + 1], words[:i] + words[i + 2 :]
        if word.startswith(f"{option}="):
            return word.partition("=")[2], words[:i] + words[i + 1 :]
    return None, words


def _quiet_libraries() -> None:
    """Keep loaders' bars and hints off the terminal; what matters they raise."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read by tqdm as it is imported
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Watcher:
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
        self._name = ""
        self._printed = self._began = 0.0
        self._first = 0

    def __enter__(self) -> "Watcher":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress of an evaluation."""
        self._show(name, done, total, "")

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Progress of training, with the figures that tell most."""
        names = {
            "gain": "reward/gain",
            "length": "rollout/length",
            "tokens/s": "time/thought_tokens_per_s",
            "loss": "objective/loss",
            "accuracy": "objective/accuracy",
        }
        shown = ("gain", "length", "tokens/s") if "rollout/length" in metrics else ("loss", "accuracy")
        figures = [f"{name} {metrics[names[name]]:.3g}" for name in shown if names[name] in metrics]
        self._show("training", step, total, ", ".join(figures))

    def warning(self, found: Diagnosis) -> None:
        """One yellow line; the run goes on."""
        text = f"warning: step {found.step}: {found.evidence}; {found.advice} (docs/diagnostics.md: {found.name})"
        self._console.print(Text(printable(text), style="yellow"), soft_wrap=True)

    def _show(self, name: str, done: int, total: int, figures: str) -> None:
        now = time.monotonic()
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
            _line(self._console, ", ".join(part for part in parts if part))


def _table(figures: dict[str, Any], columns: Sequence[str], out: Console, rows: dict[str, str] = FIGURES) -> None:
    """Figures by group of positions, one column for each of `columns`, intervals in brackets."""
    first = f"{columns[0]}/"
    groups = sorted({name.split("/")[1] for name in figures if name.startswith(first) and name.count("/") == 2})
    if not groups:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("held-out text [95 % interval]", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for group in groups:
        count = figures[f"{first}{group}/positions"]
        table.add_row(Text(f"{printable(group)}: {count} positions", style="bold"))
        for metric, meaning in rows.items():
            names = [f"{column}/{group}/{metric}" for column in columns]
            if any(name in figures for name in names):
                table.add_row(f"  {meaning}", *[_cell(figures, name, metric in SHARES) for name in names])
    out.print(table)


def _answer_table(figures: dict[str, Any], out: Console) -> None:
    """Figures by task and for the averages, one column for each model and mode, standard errors after ±."""
    keys = [name.split("/") for name in figures if name.startswith(("base/", "model/"))]
    columns = sorted({(key[0], key[1]) for key in keys}, key=lambda column: (column[0], column[1] != "nothink"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("± standard error", no_wrap=True)
    names = {"base": "base,\n", "model": "trained,\n"} if columns[0][0] == "base" else {"model": ""}
    for who, mode in columns:
        table.add_column(names[who] + ("thinking" if mode == "think" else "no thought"), justify="right", no_wrap=True)
    for group in dict.fromkeys(key[2] for key in keys):
        asked = [value for name, value in figures.items() if name.endswith(f"/{group}/questions")]
        table.add_row(Text(f"{group}: {asked[0]} asked" if asked else f"{group} average", style="bold"))
        for metric, meaning in ANSWERS.items():
            cells = [_answer_cell(figures, f"{who}/{mode}/{group}/{metric}", metric) for who, mode in columns]
            if any(cells):
                table.add_row(f"  {meaning}", *cells)
    out.print(table)


def _answer_cell(figures: dict[str, Any], name: str, metric: str) -> str:
    if name not in figures:
        return ""
    error = figures.get(f"{name}/se")
    scale, places, unit = (1, 0, "") if metric.endswith("length") else (100, 1, "%")
    after = "" if error is None else f" ±{scale * error:.{places}f}"
    return f"{scale * figures[name]:.{places}f}{unit}{after}"


def _cell(figures: dict[str, Any], name: str, share: bool) -> Text:
    if name not in figures:
        return Text("-")
    value, low, high = (figures[name + suffix] for suffix in ("", "/low", "/high"))
    if share:
        return Text(f"{value:.1%} [{100 * low:.1f}, {100 * high:.1f}]")
    return Text(f"{value:.2f} [{low:.2f}, {high:.2f}]")


def printable(text: str) -> str:
    """Text with control characters shown as escapes, so that it cannot drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _line(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, soft_wrap=True)
