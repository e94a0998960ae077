"""Reading a run folder: config.json, metrics.jsonl, thoughts.jsonl, warnings.jsonl and summary.json."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from forethought.config import UserError, flatten
from forethought.config.registry import AUTOMATIC, METHODS, REWARDS, current_metrics, label
from forethought.run.folder import RunLog, read_jsonl

T = TypeVar("T")


def number(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


Number = Annotated[float | None, BeforeValidator(number)]
"""A finite number, or None for a value that is missing or not finite."""
Probability = Annotated[float, Field(ge=0, le=1.001)]  # exp of a rounded log-probability may exceed 1
TopTokens = Annotated[list[tuple[str, Probability]], BeforeValidator(lambda value: [] if value is None else value)]
"""The most likely tokens and their probabilities, in descending order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """One sampled thought. Log-probabilities, reward and advantage are in nats."""

    text: str
    length: Number = None
    """Sampled tokens."""
    closed: bool = False
    """Whether the thought ended with the closing delimiter; otherwise it was truncated."""
    evidence: Number = None
    """log p of the target after the thought."""
    reward: Number = None
    """Information gain; for RPT 1 or 0."""
    advantage: Number = None
    prediction: str | None = None
    """The prediction written after the thought (RPT)."""
    top: TopTokens = field(default_factory=list)
    """Next-token probabilities after the thought, where measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A position of a document with all thoughts sampled there, in descending order of reward."""

    step: int
    document: str
    position: str
    context: str
    target: str
    nothink: float | None
    """log p of the target without a thought (the teacher's), in nats."""
    thoughts: list[Thought]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """A line of warnings.jsonl."""

    step: int
    name: str
    evidence: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The content of a run folder."""

    path: Path
    name: str
    """Short, and unique among the runs of a report."""
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    """Logged steps in order; a step that was logged again after a resume is there once, as logged last."""
    positions: list[Position]
    """The positions of the first, the middle and the last step with logged thoughts."""
    warnings: list[Diagnostic]
    """Warnings of the diagnostics during training, in order."""
    summary: dict[str, Any]
    """Empty while the run has not finished."""

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
    """Read a run folder. Raises UserError if it is not one, has nothing to report, or contains a broken file."""
    if not (path / "config.json").is_file():
        raise UserError(f"{str(path)!r} is not a run folder: it has no config.json")
    log = RunLog(path)
    metrics = {row["step"]: row for row in _rows(path / "metrics.jsonl", _metrics)}
    finished = (path / "summary.json").is_file()
    if not metrics and not finished:
        raise UserError(f"run {str(path)!r} has neither metrics nor a summary yet: nothing to report")
    return Run(
        path=path,
        name=name,
        config=log.read_json("config.json"),
        metrics=[metrics[step] for step in sorted(metrics)],
        positions=_landmarks(path / "thoughts.jsonl"),
        warnings=list(_rows(path / "warnings.jsonl", _diagnostic)),
        summary=log.read_json("summary.json") if finished else {},
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


def _rows(path: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """The parsed lines of a .jsonl file. Raises UserError with file and line."""
    if not path.is_file():
        return
    for count, row in read_jsonl(path, allow_truncated=True):
        try:
            value = parse(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}:{count}: unexpected content: {type(error).__name__} {error}") from None
        yield value


def _metrics(row: dict[str, Any]) -> dict[str, Any]:
    return {**current_metrics(row), "step": int(row["step"])}


def _diagnostic(row: dict[str, Any]) -> Diagnostic:
    return Diagnostic(step=int(row["step"]), **{key: str(row[key]) for key in ("name", "evidence", "advice")})


def _landmarks(path: Path) -> list[Position]:
    """Positions of three steps; reads the file twice, so that the thoughts of a long run need not fit in memory."""
    steps = sorted(set(_rows(path, lambda row: int(row["step"]))))
    if not steps:
        return []
    wanted = {steps[0], steps[(len(steps) - 1) // 2], steps[-1]}
    found = _rows(path, lambda row: _position(row) if int(row["step"]) in wanted else None)
    latest = {(one.step, one.document, one.position): one for one in found if one is not None}
    return sorted(latest.values(), key=lambda one: one.step)


def _position(row: dict[str, Any]) -> Position:
    return Position(
        step=int(row["step"]),
        document=str(row.get("document", "?")),
        position=str(row.get("position", "?")),
        context=str(row["context"]),
        target=str(row["target"]),
        nothink=number(row.get("nothink")),
        thoughts=sorted(map(_thought, row["thoughts"]), key=by_reward),
    )


def _thought(row: dict[str, Any]) -> Thought:
    return Thought(
        text=str(row["text"]),
        length=number(row.get("length")),
        closed=bool(row.get("closed")),
        evidence=number(row.get("evidence")),
        reward=number(row.get("reward")),
        advantage=number(row.get("advantage")),
        prediction=None if row.get("prediction") is None else str(row["prediction"]),
    )


def by_reward(thought: Thought) -> float:
    """The key that sorts thoughts by descending reward; thoughts without one come last."""
    return math.inf if thought.reward is None else -thought.reward
