"""The command line: a thin caller of the library, and the only place that prints."""

import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console

import forethought
from forethought.config import (
    Config,
    RunError,
    UserError,
    changed_on_resume,
    from_dict,
    load,
    merge,
    own_options,
    read_overrides,
    to_dict,
)
from forethought.config.registry import OPTION, TABLES
from forethought.run.diagnostics import Diagnosis
from forethought.run.distributed import RemoteRankError, launcher_rank_and_size, require_single_process
from forethought.run.signals import Stopped
from forethought.tools.console import (
    CONTROLS,
    FIGURES,
    ProgressBar,
    Stream,
    answer_table,
    line,
    notices,
    run_table,
    table,
)


@dataclass(frozen=True, slots=True)
class Command:
    """A command. `run` takes the words behind its name and a console each for stdout and stderr."""

    run: Callable[[list[str], Console, Console], None]
    usage: str
    help: str
    needs: str = ""  # what the first word must be
    options: bool = True  # whether it takes --section.option
    own: str = ""  # module:class of its own options
    lasting: bool = True  # whether its results are in files, so that nobody needs to read what it prints


def main(words: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 2 for a user's error, 1 for a run that failed, 128 + n for signal n."""
    # Python sets a stream that was closed at the start to None. In this order each gets its own descriptor back.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    streams = Stream(sys.stdout), Stream(sys.stderr)
    out, err = (Console(file=cast(TextIO, stream), highlight=False) for stream in streams)
    words = list(sys.argv[1:] if words is None else words)
    rank = os.environ.get("RANK", "0")
    speaker = "forethought" if rank == "0" else f"forethought process {rank}"
    try:
        with notices(err, launcher_rank_and_size()[0] == 0):
            _command(words, out, err)
        lasting = words and words[0] in COMMANDS and COMMANDS[words[0]].lasting
        return 128 + signal.SIGPIPE if streams[0].gone and not lasting else 0
    except RemoteRankError:
        return 1
    except (UserError, RunError) as error:
        line(err, f"{speaker}: {error}")
        return 2 if isinstance(error, UserError) else 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        less = "a smaller train.rollout_batch, update.tokens_per_chunk or questions.batch, or model.device cpu"
        line(err, f"{speaker}: {str(error).partition('. ')[0]}; less memory takes {less}")
        return 1
    except Stopped as stopped:
        line(err, f"{speaker}: {stopped}") if launcher_rank_and_size()[0] == 0 else None
        return 128 + stopped.number
    except KeyboardInterrupt:
        line(err, f"{speaker}: interrupted")
        return 128 + signal.SIGINT


def _command(words: list[str], out: Console, err: Console) -> None:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--help", "-h", "help"):
        _usage(out)
    elif name == "--version":
        line(out, f"forethought {forethought.__version__}")
    elif name not in COMMANDS:
        *most, last = COMMANDS
        raise UserError(f"unknown command {name!r}: must be {', '.join(most)} or {last}")
    elif ("--help" in rest or "-h" in rest) and name != "lm-eval":
        _help(name, out)
    else:
        command = COMMANDS[name]
        if name != "train":
            require_single_process(name)
        if command.needs and (not rest or rest[0].startswith("--")):
            raise UserError(f"{name} takes {command.needs}")
        try:
            command.run(rest, out, err)
        except OSError as error:
            if error.filename is None:  # it is about no file
                raise
            raise UserError(f"{error.filename}: {error.strerror}") from error


def _usage(out: Console, *names: str) -> None:
    for i, name in enumerate(names or COMMANDS):
        line(out, f"{'       ' if i else 'usage: '}forethought {name} {COMMANDS[name].usage}")
        line(out, f"           {COMMANDS[name].help}")
    if not names:
        line(
            out, "CONFIG is a file or a shipped config such as quickstart; `forethought train --help` lists all options"
        )


def _help(name: str, out: Console) -> None:
    _usage(out, name)
    if own := COMMANDS[name].own:
        module, _, kind = own.partition(":")
        for option in fields(getattr(importlib.import_module(f"forethought.tools.{module}"), kind)):
            line(out, f"  --{option.name:14}{cast(Any, option.default).description}")
    if not COMMANDS[name].options:
        return
    import tyro

    with contextlib.suppress(SystemExit):
        settings = (tyro.conf.FlagConversionOff,)
        tyro.cli(Config, args=["--help"], prog=f"forethought {name}", use_underscores=True, config=settings)
    for kind, entries in TABLES.items():
        line(out, f"--{OPTION[kind]}: one of these, or module:attribute for a class or function of your own")
        for entry in entries.values():
            line(out, f"  {entry.name:18}{entry.help}")


def _train(words: list[str], out: Console, err: Console) -> None:
    resumed, words = _take(words, "--resume")
    name, words = (words[0], words[1:]) if words and not words[0].startswith("--") else (None, words)
    if name is None and resumed is None:
        raise UserError("train takes a config file, the name of a shipped one such as quickstart, or --resume RUN")
    config = load(name, words) if resumed is None else _saved_config(resumed, name, words)
    _quiet_libraries()
    from forethought.tools import report, resume, train

    first = launcher_rank_and_size()[0] == 0
    with ProgressBar(err) if first else contextlib.nullcontext() as progress:
        summary = train(config, progress) if resumed is None else resume(resumed, progress, config)
    if first:
        run = Path(config.run if resumed is None else resumed)
        page = report.write([run])
        table(summary, ("before", "after"), out)
        cost = f"{summary['steps']} steps, {summary['seconds']:.0f} s"
        line(out, f"{cost}; trained model: {run / 'policy'}; report: {page}")


def _saved_config(run: str, name: str | None, words: list[str]) -> Config:
    """The config with which to resume a run; refuses options that would change the results."""
    from forethought.run.folder import RunLog

    saved = RunLog.open(run).config()
    for option in read_overrides(words).keys() & {"run", "overwrite"}:
        raise UserError(f"--{option}: --resume goes on in the folder of the run itself, {run}")
    wanted = load(name, words) if name else from_dict(merge(to_dict(saved), read_overrides(words)))
    changed_on_resume(saved, wanted)
    return wanted


def _evaluate(words: list[str], out: Console, err: Console) -> None:
    overrides = read_overrides(words[1:])
    _quiet_libraries()
    from forethought.tools import evaluate

    with ProgressBar(err) as progress:
        figures, file = evaluate(words[0], overrides, progress.phase)
        for row in figures.pop("warnings", []):
            progress.warning(Diagnosis(**row))
    table({f"model/{name}": value for name, value in figures.items()}, ("model",), out, FIGURES + CONTROLS)
    if thought := figures.get("generic_thought"):
        line(out, f"generic thought: {thought}")
    line(out, f"figures: {file}")


def _questions(words: list[str], out: Console, err: Console) -> None:
    overrides = read_overrides(words[1:])
    _quiet_libraries()
    from forethought.tools.benchmarks import run_benchmarks

    with ProgressBar(err) as progress:
        figures, file = run_benchmarks(
            words[0], overrides, lambda done, total: progress.phase("answering", done, total)
        )
    answer_table(figures, out)
    line(out, f"figures: {file}; every prompt and answer: {file.with_suffix('.jsonl')}")


def _compare(words: list[str], out: Console, err: Console) -> None:
    overrides = read_overrides(words[1:], ("config",))
    _quiet_libraries()
    from forethought.tools.experiment import compare

    with ProgressBar(err) as progress:
        verdicts, page = compare(words[0], overrides, progress)
    for one in verdicts:
        line(out, f"{ {True: 'holds', False: 'FAILS', None: '?'}[one.holds]:5}  {one.claim}: {one.evidence}")
    spent = json.loads(page.with_name("experiment.json").read_bytes())["spent"]
    line(out, f"{spent['seconds']:.0f} s in all calls, {spent['cpu_seconds']:.0f} CPU seconds of all finished runs")
    line(out, f"page: {page}; rows: {page.with_name('compare.json')}")


def _posttrain(words: list[str], out: Console, err: Console) -> None:
    start, words = _take(words, "--start")
    if start is None or not words or words[0].startswith("--"):
        raise UserError("posttrain takes a stage's file, or the name of a shipped one, and --start MODEL_OR_RUN")
    overrides = read_overrides(words[1:], ("data", "heldout", "end"))
    _quiet_libraries()
    from forethought.run.folder import RunLog
    from forethought.tools.posttrain import posttrain

    with ProgressBar(err) as progress:
        folder = posttrain(words[0], start, overrides, progress)
    log = RunLog.open(folder)
    figures, measure = log.read_json("summary.json"), "evaluate" if log.config().evaluate.path else "questions"
    if "after/heldout_loss" in figures:
        before, after = figures["before/heldout_loss"], figures["after/heldout_loss"]
        line(out, f"held-out loss, nats per token: {before:.3f} before, {after:.3f} after")
    line(out, f"trained model: {folder / 'policy'}; measure it with: forethought {measure} {folder}")


def _plan(words: list[str], out: Console, err: Console) -> None:
    from forethought.tools import plan
    from forethought.tools.plan.page import shown

    options, overrides = own_options(plan.Options, words[1:])
    config = from_dict(merge(to_dict(load(words[0])), overrides))
    shape = plan.shipped_shape(config.model.path)
    if shape is None:
        _quiet_libraries()
        from forethought.models.loading import load_shape

        shape = load_shape(config.model)
    found = plan.plan(config, shape, options)
    plan.write(found, options.json)
    for one in shown(found):
        line(out, one) if isinstance(one, str) else out.print(one)


def _think(words: list[str], out: Console, err: Console) -> None:
    from forethought.tools import report, think

    count = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    (name, *text), words = words[:count], words[count:]
    options, overrides = own_options(think.Options, words)
    if not text and (options.json or options.html):
        raise UserError("think takes --json and --html with a text")
    given = think.read_text(text) if text else None
    if options.html:
        report.writable(options.html)
    _quiet_libraries()
    model = think.load(name, overrides)
    if given is None:
        _prompt(model, options, out, err)
        return
    with ProgressBar(err) as progress:
        found = think.think(model, name, given, options, lambda done, total: progress.phase("thinking", done, total))
    if options.json:
        line(out, json.dumps(found))
    for one in () if options.json else think.shown(found, out):
        out.print(one)
    if options.html:
        line(err if options.json else out, f"page: {think.write_page(found, options.html)}")


def _prompt(model: Any, options: Any, out: Console, err: Console) -> None:
    """Read texts, a line each, and write on with thoughts. Ctrl-C stops the writing, Ctrl-D or the end of stdin all."""
    from forethought.tools import think

    asks = sys.stdin.isatty() and out.is_terminal
    if asks:
        importlib.import_module("readline")  # edits lines and keeps a history
        line(out, "Type a text and see it continued. Ctrl-C stops, Ctrl-D ends.")
    for text in _typed(asks):
        texts, gains = [text], cast(list[float | None], [None])
        try:
            tokens = model.generate(
                text, max_tokens=options.max_tokens, think_every=options.think_every, thoughts=options.thoughts,
                temperature=options.temperature, seed=options.seed,
            )  # fmt: skip
            for one in think.written(tokens, texts, gains):
                out.print(one)
        except UserError as error:
            if not asks:
                raise
            line(err, f"forethought: {error}")
        except KeyboardInterrupt:
            if not asks:
                raise
            line(out, "stopped")
        out.print(think.colored(texts, gains, out))
        if cast(Any, out.file).gone:
            return
    line(out, "") if asks else None


def _typed(asks: bool) -> Iterator[str]:
    """The lines of stdin that are not blank. Raises UserError."""
    while True:
        try:
            text = input("> " if asks else "")
            text.encode()
        except UnicodeError:
            raise UserError("text: is not UTF-8") from None
        except EOFError:
            return
        if text.strip():
            yield text


def _report(words: list[str], out: Console, err: Console) -> None:
    target, words = _take(words, "--out")
    runs = [word for word in words if word != "--follow"]
    if unknown := [word for word in runs if word.startswith("--")]:
        raise UserError(f"unknown option {unknown[0]}: report takes run folders, --out FILE and --follow")
    if not runs:
        raise UserError("report takes at least one run folder")
    from forethought.tools import report
    from forethought.tools.report.runs import state

    if len(runs) == len(words):
        line(out, f"report: {report.write(runs, target)}")
        return
    for number, page in enumerate(report.follow(runs, target)):
        if number == 0:
            line(out, f"report: {page}, written again until the run ends or Ctrl-C")
    for run in runs:
        line(out, f"{run}: {state(Path(run)).state}")


def _runs(words: list[str], out: Console, err: Console) -> None:
    if len(words) > 1 or (words and words[0].startswith("--")):
        raise UserError("runs takes one folder, or none for runs/")
    from forethought.tools.report.runs import find, state

    folder = words[0] if words else "runs"
    if not (found := find(folder)):
        line(out, f"{folder} holds no run")
        return
    run_table([state(path) for path in found], out)


def _push(words: list[str], out: Console, err: Console) -> None:
    run, name, *flags = words if len(words) > 1 and not words[1].startswith("--") else ("", "", "")
    flags = {flag.replace("-", "_") for flag in flags}
    if not name or flags - {"__private", "__dry_run"}:
        raise UserError("push takes a run folder, user/name, and --private or --dry_run")
    from forethought.tools.report import card

    files = card.to_push(Path(run), name)
    for file, size in files.items():
        line(out, f"{size:>15,} bytes  {file}")
    line(out, f"{sum(files.values()):>15,} bytes in {len(files)} files of {Path(run) / 'policy'}")
    if "__dry_run" in flags:
        line(out, f"nothing was uploaded; without --dry_run they go to {name}")
    else:
        line(out, f"uploaded to {card.push(Path(run), name, '__private' in flags)}")


def _lm_eval(words: list[str], out: Console, err: Console) -> None:
    """The harness's own command line, which prints for itself."""
    try:
        from forethought.tools import lm_eval
    except ModuleNotFoundError as error:
        raise UserError(f"lm-eval: {error.name} is not installed; pip install 'forethought[eval]'") from None
    lm_eval.main(words)


_MODEL = "a run folder or a model: embedded, a hub id, a folder or a .gguf file"
_EXPERIMENT = "an experiment file, or the name of a shipped one such as compare-quickstart"
_MORE = "[--section.option value ...]"
COMMANDS = {
    "train": Command(_train, f"CONFIG | --resume RUN {_MORE}", "train, or continue from the last checkpoint"),
    "evaluate": Command(_evaluate, f"MODEL_OR_RUN {_MORE}", "held-out text with and without thoughts", _MODEL),
    "questions": Command(_questions, f"MODEL_OR_RUN {_MORE}", "benchmark questions with and without thoughts", _MODEL),
    "compare": Command(
        _compare, f"EXPERIMENT [--config CONFIG] [--seeds 0,1,2] [--processes N] {_MORE}",
        "train the arms of an experiment and compare them", _EXPERIMENT,
    ),
    "posttrain": Command(
        _posttrain, "STAGE --start MODEL_OR_RUN [--run FOLDER] [--option value ...]", "SFT or RLVR with TRL",
        options=False,
    ),
    "plan": Command(
        _plan, f"CONFIG [--gpus N] [--gpu h100] [--simulate] [--json FILE] {_MORE}", "memory, time and cost of a run",
        "a config file, or the name of a shipped one such as qwen3-1.7b",
        own="plan:Options", lasting=False,
    ),
    "think": Command(
        _think, f"MODEL_OR_RUN [TEXT | FILE | -] [--thoughts N] [--html FILE] [--json] {_MORE}",
        "see a model think about a text, or at a prompt", _MODEL,
        own="think:Options", lasting=False,
    ),
    "report": Command(_report, "RUN [RUN ...] [--out FILE] [--follow]", "an HTML page about runs", options=False),
    "runs": Command(_runs, "[FOLDER]", "how far the runs in a folder are", options=False, lasting=False),
    "push": Command(
        _push, "RUN user/name [--private] [--dry_run]", "upload a trained model to the Hugging Face Hub",
        "a run folder", options=False,
    ),
    "lm-eval": Command(_lm_eval, "--model_args path=MODEL,thoughts=4 --tasks TASK", "tasks of lm-evaluation-harness"),
}  # fmt: skip


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
