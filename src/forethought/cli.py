"""The command line: a thin caller of the library, and the only place that prints."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import forethought
from forethought.config import Config, RunError, UserError, difference, from_dict, load, merge, read_overrides, to_dict
from forethought.run.distributed import RemoteRankError, launcher_rank_and_size, require_single_process
from forethought.tools.console import CONTROLS, FIGURES, ProgressBar, answer_table, line, table

USAGE = """\
usage: forethought train CONFIG [--section.option value ...]   train a config file, or a shipped one such as quickstart
       forethought train --resume RUN                          continue a stopped run from its last checkpoint
       forethought evaluate MODEL_OR_RUN [--section.option value ...]
       forethought questions MODEL_OR_RUN [--questions.data FOLDER] [--section.option value ...]
       forethought compare EXPERIMENT [--config CONFIG] [--seeds 0,1,2] [--processes N] [--section.option value ...]
       forethought posttrain STAGE --start MODEL_OR_RUN [--run FOLDER] [--option value ...]
       forethought report RUN [RUN ...] [--out FILE]
       forethought plan CONFIG [--gpus N] [--gpu h100] [--simulate] [--json FILE] [--section.option value ...]
       forethought lm-eval --model_args path=MODEL,thoughts=4 --tasks TASK    any task of lm-evaluation-harness

`forethought train --help` lists every option.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 2 for a user's error, 1 for a run that failed, 128 + n for signal n."""
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        return _command(list(sys.argv[1:] if words is None else words), out, err)
    except RemoteRankError:
        return 1
    except UserError as error:
        line(err, f"{_name()}: {error}")
        return 2
    except RunError as error:
        line(err, f"{_name()}: {error}")
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        line(err, "forethought: interrupted")
        return 130


def _name() -> str:
    """Who speaks: of several processes all but the first say their number."""
    rank = os.environ.get("RANK", "0")
    return "forethought" if rank == "0" else f"forethought process {rank}"


def _command(words: list[str], out: Console, err: Console) -> int:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--help", "-h", "help"):
        out.print(USAGE, end="", markup=False, soft_wrap=True)
        return 0
    if name == "--version":
        out.print(f"forethought {forethought.__version__}", markup=False)
        return 0
    known = (_train, _evaluate, _questions, _compare, _posttrain, _plan, _report, _lm_eval)
    commands = {command.__name__[1:].replace("_", "-"): command for command in known}
    if name not in commands:
        *most, last = commands
        raise UserError(f"unknown command {name!r}: must be {', '.join(most)} or {last}")
    if ("--help" in rest or "-h" in rest) and name != "lm-eval":
        _help(name, out)
        return 0
    require_single_process(name) if name != "train" else None
    return commands[name](rest, out, err)


def _help(name: str, out: Console) -> None:
    out.print(USAGE, markup=False, soft_wrap=True)
    if name in ("report", "posttrain"):
        return
    if name == "plan":
        from forethought.tools.plan import OPTIONS

        for option, meaning in OPTIONS.items():
            line(out, f"  {option:12}{meaning}")
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
    from forethought.run.signals import Stopped
    from forethought.tools import report, resume, train

    first = launcher_rank_and_size()[0] == 0
    try:
        with ProgressBar(err) if first else contextlib.nullcontext() as watcher:
            go_on = resumed is not None
            summary = resume(resumed, watcher, config.parallel) if go_on else train(config, watcher)
    except Stopped as stopped:
        line(err, f"forethought: {stopped}") if first else None
        return 128 + stopped.number
    if not first:
        return 0
    run = Path(config.run if resumed is None else resumed)
    page = report.write([run])
    table(summary, ("before", "after"), out)
    line(out, f"{summary['steps']} steps, {summary['seconds']:.0f} s; trained model: {run / 'policy'}; report: {page}")
    return 0


def _saved_config(run: str, name: str | None, words: list[str]) -> Config:
    """The config of the run to resume, shared as asked now; refuses options that would change what comes out."""
    from forethought.run.folder import RunLog

    saved = RunLog.open(run).config()
    start = load(name, words) if name else from_dict(merge(to_dict(saved), read_overrides(words)))
    if found := difference(saved, start):
        option, before, now = found
        raise UserError(f"{option} = {now!r}: the run to resume has {before!r}; resuming cannot change an option")
    return dataclasses.replace(saved, parallel=start.parallel)


def _evaluate(words: list[str], out: Console, err: Console) -> int:
    if not words or words[0].startswith("--"):
        raise UserError("evaluate takes a run folder or a model: embedded, a hub id, a folder or a .gguf file")
    overrides = read_overrides(words[1:])
    _quiet_libraries()
    from forethought.tools import evaluate

    with ProgressBar(err) as watcher:
        figures, file = evaluate(words[0], overrides, watcher.phase)
    table({f"model/{name}": value for name, value in figures.items()}, ("model",), out, FIGURES | CONTROLS)
    line(out, f"figures: {file}")
    return 0


def _questions(words: list[str], out: Console, err: Console) -> int:
    if not words or words[0].startswith("--"):
        raise UserError("questions takes a run folder or a model: embedded, a hub id, a folder or a .gguf file")
    overrides = read_overrides(words[1:])
    _quiet_libraries()
    from forethought.tools.questions.ask import ask

    with ProgressBar(err) as watcher:
        figures, file = ask(words[0], overrides, lambda done, total: watcher.phase("answering", done, total))
    answer_table(figures, out)
    line(out, f"figures: {file}; every prompt and answer: {file.with_suffix('.jsonl')}")
    return 0


def _compare(words: list[str], out: Console, err: Console) -> int:
    if not words or words[0].startswith("--"):
        raise UserError("compare takes an experiment file, or the name of a shipped one such as compare-quickstart")
    overrides = read_overrides(words[1:])
    _quiet_libraries()
    from forethought.run.signals import Stopped
    from forethought.tools.experiment import compare

    try:
        with ProgressBar(err) as watcher:
            verdicts, page = compare(words[0], overrides, watcher)
    except Stopped as stopped:
        line(err, f"forethought: {stopped}")
        return 128 + stopped.number
    for one in verdicts:
        line(out, f"{ {True: 'holds', False: 'FAILS', None: '?'}[one.holds]:5}  {one.claim}: {one.evidence}")
    spent = json.loads(page.with_name("experiment.json").read_bytes())["spent"]
    line(out, f"{spent['seconds']:.0f} s in all calls, {spent['cpu_seconds']:.0f} CPU seconds of all finished runs")
    line(out, f"page: {page}; rows: {page.with_name('compare.json')}")
    return 0


def _posttrain(words: list[str], out: Console, err: Console) -> int:
    start, words = _take(words, "--start")
    if start is None or not words or words[0].startswith("--"):
        raise UserError("posttrain takes a stage's file, or the name of a shipped one, and --start MODEL_OR_RUN")
    overrides = read_overrides(words[1:])
    _quiet_libraries()
    from forethought.run.folder import RunLog
    from forethought.tools.posttrain import posttrain

    with ProgressBar(err) as watcher:
        folder = posttrain(words[0], start, overrides, watcher)
    log = RunLog.open(folder)
    figures, measure = log.read_json("summary.json"), "evaluate" if log.config().evaluate.path else "questions"
    if "after/heldout_loss" in figures:
        before, after = figures["before/heldout_loss"], figures["after/heldout_loss"]
        line(out, f"held-out loss, nats a token: {before:.3f} before, {after:.3f} after")
    line(out, f"trained model: {folder / 'policy'}; measure it with: forethought {measure} {folder}")
    return 0


def _report(words: list[str], out: Console, err: Console) -> int:
    target, words = _take(words, "--out")
    for word in words:
        if word.startswith("--"):
            raise UserError(f"unknown option {word}: report takes run folders and --out FILE")
    if not words:
        raise UserError("report takes at least one run folder")
    from forethought.tools import report

    line(out, f"report: {report.write([Path(word) for word in words], Path(target) if target else None)}")
    return 0


def _plan(words: list[str], out: Console, err: Console) -> int:
    from forethought.tools import plan
    from forethought.tools.plan.page import shown

    name, options, overrides = plan.words_of(words)
    config = load(name, overrides)
    shape = plan.shipped_shape(config.model.path)
    if shape is None:
        _quiet_libraries()
        from forethought.models.loading import load_shape

        shape = load_shape(config.model)
    found = plan.plan(config, shape, options)
    plan.write(found, options.get("json"))
    for one in shown(found):
        line(out, one) if isinstance(one, str) else out.print(one)
    return 0


def _lm_eval(words: list[str], out: Console, err: Console) -> int:
    """The harness's own command line, which prints for itself."""
    try:
        from forethought.tools import lm_eval
    except ModuleNotFoundError as error:
        raise UserError(f"lm-eval: {error.name} is not installed; pip install 'forethought[lm-eval]'") from None
    lm_eval.main(words)
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
