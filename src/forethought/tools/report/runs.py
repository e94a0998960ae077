"""Reading a run folder: config.json, metrics.jsonl, thoughts.jsonl, warnings.jsonl and summary.json."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, TypeAdapter, ValidationError

from forethought.config import UserError, flatten, merge
from forethought.config.registry import AUTOMATIC, METHODS, REWARDS, label
from forethought.html import table
from forethought.run.diagnostics import Diagnosis, is_number
from forethought.run.folder import RunLog, checkpoints, numbered_rows, read_json, refuse

T = TypeVar("T")


def number(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    return float(value) if is_number(value) else None


def _rounded(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def by_reward(thoughts: "list[Thought]") -> "list[Thought]":
    """Thoughts by descending reward; those without one come last."""
    return sorted(thoughts, key=lambda one: math.inf if one.reward is None else -one.reward)


Number = Annotated[float | None, BeforeValidator(number)]
"""A finite number, or None for a value that is missing or not finite."""
STEP_OF_STAGE = {"sft": "examples", "rlvr": "prompts"}
"""What a step of post-training takes train.batch of."""
Text = Annotated[str, PlainValidator(str)]
"""Any value as text, which may have parts of characters that are not valid Unicode."""
Probability = Annotated[float, Field(ge=0, le=1.001)]  # exp of a rounded log-probability may exceed 1
TopTokens = Annotated[list[tuple[str, Probability]], BeforeValidator(lambda value: [] if value is None else value)]
"""The most likely tokens and their probabilities, in descending order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """One sampled thought. Log-probabilities, reward and advantage are in nats."""

    text: Text
    length: Number = None  # sampled tokens
    closed: bool = False  # whether the thought ended with the closing delimiter; otherwise it was truncated
    evidence: Number = None  # log p of the target after the thought
    reward: Number = None  # information gain; for RPT 1 or 0
    advantage: Number = None
    prediction: str | None = None  # the prediction written after the thought (RPT)
    top: TopTokens = field(default_factory=list)  # next-token probabilities after the thought, where measured


Thoughts = Annotated[list[Thought], AfterValidator(by_reward)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A position of a document with all thoughts sampled there, in descending order of reward."""

    step: int
    document: Text = "?"
    row: Text = ""  # file and row, which tell documents with the same label apart
    position: Text = "?"
    context: Text
    target: Text
    nothink: Number = None  # log p of the target without a thought (the teacher's), in nats
    thoughts: Thoughts

    def _repr_html_(self) -> str:
        """The end of the context with the target, and the thoughts."""
        rows = [(_rounded(one.reward), _rounded(one.evidence), one.text) for one in self.thoughts]
        title = f"step {self.step}: … {self.context[-80:]} [{self.target}]"
        return table(
            ["reward", "log p after it", f"thought (log p without one: {_rounded(self.nothink)})"], rows, title
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The content of a run folder."""

    path: Path
    name: str  # short, and unique among the runs of a report
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    """Logged steps in order; a step that was logged again after a resume is there once, as logged last."""
    positions: list[Position]  # the positions of the first, the middle and the last step with logged thoughts
    warnings: list[Diagnosis]  # warnings of the diagnostics during training, in order
    summary: dict[str, Any]  # empty while the run has not finished
    running: bool = False  # whether a process trains in the folder

    @property
    def method(self) -> str:
        """The name of the method, which may have been registered elsewhere."""
        return str(self.option("method.name", self.summary.get("method", "rlp")))

    @property
    def method_label(self) -> str:
        """The label of the method, and of the reward if it is not the method's default."""
        default = AUTOMATIC | (dict(METHODS[self.method].defaults) if self.method in METHODS else {})
        reward = str(self.option("method.reward", "auto"))
        text = label("method", self.method)
        if not self.samples_thoughts or reward in ("auto", default["method.reward"], AUTOMATIC["method.reward"]):
            return text
        known = f" ({REWARDS[reward].help})" if reward in REWARDS else ""
        return f"{text}, with the reward {label('reward', reward)}{known}"

    @property
    def samples_thoughts(self) -> bool:
        """Whether training samples thoughts: as registered, or as logged by an unknown method."""
        return METHODS[self.method].samples_thoughts if self.method in METHODS else self.logs("rollout/length")

    def option(self, name: str, default: Any = None) -> Any:
        """The value of `section.option` in the run's config."""
        return flatten(self.config).get(name, default)

    def logs(self, metric: str) -> bool:
        """Whether the run logged a finite value of the metric."""
        return any(number(row.get(metric)) is not None for row in self.metrics)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, without steps where it is missing or not finite."""
        values = [(row["step"], number(row.get(metric))) for row in self.metrics]
        kept = [(step, value) for step, value in values if value is not None]
        return [step for step, _ in kept], [value for _, value in kept]


def load(path: Path, name: str) -> Run:
    """Read a run folder. Raises UserError if it is not one or contains a broken file."""
    if not (path / "config.json").is_file():
        raise UserError(f"{str(path)!r} is not a run folder: it has no config.json")
    log = RunLog(path)
    config = log.options()
    metrics = {row["step"]: row for row in _rows(path / "metrics.jsonl", _metrics)}
    if stage := log.read_json("stage.json", {}):  # of post-training: the config is that of the start, but for the loop
        config = merge(config, {"method": {"name": stage["stage"]}, "corpus": {"path": stage["data"]}})
    return Run(
        path=path,
        name=name,
        config=config,
        metrics=[metrics[step] for step in sorted(metrics)],
        positions=_landmarks(path / "thoughts.jsonl"),
        warnings=list(_rows(path / "warnings.jsonl", _diagnosis)),
        summary=log.read_json("summary.json", {}),
        running=log.in_use(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a run is."""

    path: Path
    state: str  # running, finished, stopped (saved), failed (not saved), measured, or what is broken
    step: int | None = None  # the last one, as far as it is logged or saved
    steps: int | None = None  # at which the run ends; with a budget of tokens or FLOPs estimated
    gain: float | None = None  # reward/gain as logged last, in nats
    left_s: float | None = None  # of training, in seconds, for a run that is running


def find(folder: str | Path) -> list[Path]:
    """The run folders in a folder, at any depth but not inside each other; itself if it is one. Raises UserError."""
    if not Path(folder).is_dir():
        raise UserError(f"runs: {str(folder)!r}: no such folder")
    found = []
    for path, folders, files in os.walk(folder, onerror=refuse):
        if "config.json" in files and not {".lock", "metrics.jsonl", "summary.json"}.isdisjoint(files):
            found.append(Path(path))
            folders.clear()
    return sorted(found)


def state(path: Path) -> State:
    """How far a run is, from its config, metrics, checkpoints, summary and lock."""
    log = RunLog(path)
    try:
        options, rows = flatten(log.options()), list(_rows(path / "metrics.jsonl", _metrics))
        summary = log.read_json("summary.json", {})
    except UserError as error:
        return State(path=path, state=str(error))
    running, saved = log.in_use(), max(checkpoints(path), default=-1)
    logged = rows[-1]["step"] if rows else 0
    if running:
        name, step = "running", logged
    elif summary:
        name, step = "finished", int(number(summary.get("steps")) or logged)
    elif saved < 0 and any((path / f"{one}.json").is_file() for one in ("evaluate", "questions", "records")):
        return State(path=path, state="measured")
    else:
        name, step = "failed" if logged > saved else "stopped", max(logged, saved)
    limits = [number(options.get(f"train.{one}")) for one in ("steps", "tokens", "flops")]
    reached = (step, *(number(rows[-1].get(one)) or 0 if rows else 0 for one in ("corpus/tokens", "cost/flops_total")))
    done = max((now / limit for now, limit in zip(reached, limits, strict=True) if limit), default=0.0)
    recent = [seconds for row in rows[-20:] if (seconds := number(row.get("time/step_s"))) is not None]
    gains = [gain for row in rows if (gain := number(row.get("reward/gain"))) is not None]
    return State(
        path=path,
        state=name,
        step=step,
        steps=step if name == "finished" else max(step, round(step / done)) if done else int(limits[0] or step),
        gain=gains[-1] if gains else None,
        left_s=fmean(recent) * step * max(0.0, 1 / done - 1) if running and recent and done else None,
    )


def names(paths: list[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to make them unique. Raises UserError for a repeated run."""
    parts = [path.resolve().parts for path in paths]
    for index, one in enumerate(parts):
        if one in parts[:index]:
            raise UserError(f"run {str(paths[index])!r} is given twice")
    depth = 1
    while len({one[-depth:] for one in parts}) < len(parts):
        depth += 1
    return ["/".join(one[-depth:]) for one in parts]


def _explain(error: ValidationError) -> str:
    """The first mistake in one line: where it is, and what."""
    first = error.errors(include_url=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'top level'}: {first['msg']}"


def read_checked(path: Path, kind: Any) -> Any:
    """A JSON file as a value of a type. Raises UserError if it is missing or something else."""
    try:
        return TypeAdapter(kind).validate_python(read_json(path))
    except ValidationError as error:
        raise UserError(f"{path}: unexpected content: {_explain(error)}") from None


def _rows(path: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """The parsed lines of a .jsonl file. Raises UserError with file and line."""
    for count, row in numbered_rows(path):
        try:
            value = parse(row)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            what = _explain(error) if isinstance(error, ValidationError) else f"{type(error).__name__} {error}"
            raise UserError(f"{path}:{count}: unexpected content: {what}") from None
        yield value


def _metrics(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "step": int(row["step"])}


def _diagnosis(row: dict[str, Any]) -> Diagnosis:
    return Diagnosis(step=int(row["step"]), **{name: str(row[name]) for name in ("name", "evidence", "advice")})


def _landmarks(path: Path) -> list[Position]:
    """Positions of three steps; reads the file twice, so that the thoughts of a long run need not fit in memory."""
    steps = sorted(set(_rows(path, lambda row: int(row["step"]))))
    if not steps:
        return []
    wanted, read = {steps[0], steps[(len(steps) - 1) // 2], steps[-1]}, TypeAdapter(Position).validate_python
    found = _rows(path, lambda row: read(row) if int(row["step"]) in wanted else None)
    latest = {(one.step, one.document, one.row, one.position): one for one in found if one is not None}
    return sorted(latest.values(), key=lambda one: one.step)
