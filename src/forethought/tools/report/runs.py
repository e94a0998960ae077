"""Reading a run folder: config.json, metrics.jsonl, thoughts.jsonl, warnings.jsonl and summary.json."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from forethought.config import UserError
from forethought.config.registry import current_metrics

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """One sampled thought; a number that the run did not log, or that is not finite, is None."""

    text: str
    length: float | None
    """Sampled tokens."""
    closed: bool
    """Whether the thought ended itself; otherwise it was closed by force at its longest length."""
    evidence: float | None
    """log p of the target after the thought, in nats."""
    reward: float | None
    """Information gain, in nats; in RPT 1 or 0."""
    advantage: float | None
    """Reward against its siblings, in nats."""
    prediction: str | None = None
    """What was written behind the thought (RPT)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """One place in a document with all thoughts sampled there, best reward first."""

    step: int
    document: str
    position: str
    context: str
    target: str
    nothink: float | None
    """log p of the target without a thought (the teacher's), in nats."""
    thoughts: list[Thought]


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """A line of warnings.jsonl."""

    step: int
    name: str
    evidence: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run folder holds."""

    path: Path
    name: str
    """Short and different for every run of a report."""
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    """Logged steps in order, each once; where a resumed run logged a step again, the later line."""
    positions: list[Position]
    """Those of the first, the middle and the last step that logged thoughts."""
    warnings: list[Warned]
    """What the diagnostics said during training, in order."""
    summary: dict[str, Any]
    """Empty while the run has not finished."""

    @property
    def method(self) -> str:
        """`rlp`, `cpt`, or whatever else the run says."""
        return str(self.option("method.name", self.summary.get("method", "rlp")))

    def option(self, name: str, default: Any = None) -> Any:
        """The value of `section.option` in the run's config."""
        value: Any = self.config
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, without the steps where it is missing or not finite."""
        values = [(row["step"], number(row.get(metric))) for row in self.metrics]
        kept = [(step, value) for step, value in values if value is not None]
        return [step for step, _ in kept], [value for _, value in kept]


def load(path: Path, name: str) -> Run:
    """Read a run folder. Raises UserError when it is none, holds nothing to report, or a file of it is broken."""
    if not (path / "config.json").is_file():
        raise UserError(f"{str(path)!r} is not a run folder: it has no config.json")
    metrics = {row["step"]: row for row in _each(path / "metrics.jsonl", _metrics_row)}
    has_summary = (path / "summary.json").is_file()
    if not metrics and not has_summary:
        raise UserError(f"run {str(path)!r} has neither metrics nor a summary yet: nothing to report")
    return Run(
        path=path,
        name=name,
        config=_object(path / "config.json"),
        metrics=[metrics[step] for step in sorted(metrics)],
        positions=_landmarks(path / "thoughts.jsonl"),
        warnings=list(_each(path / "warnings.jsonl", _warned)),
        summary=_object(path / "summary.json") if has_summary else {},
    )


def names(paths: list[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart. Raises UserError on a repeated run."""
    parts = [path.resolve().parts for path in paths]
    for index, one in enumerate(parts):
        if one in parts[:index]:
            raise UserError(f"run {str(paths[index])!r} is given twice")
    depth = 1
    while len({one[-depth:] for one in parts}) < len(parts):
        depth += 1
    return ["/".join(one[-depth:]) for one in parts]


def number(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold one JSON object")
    return value


def _each(path: Path, read: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """The file's lines, each a JSON object given to `read`; a last line cut short is a killed run's, and left out."""
    if not path.is_file():
        return
    cut = 0
    with path.open("rb") as file:
        for count, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if cut:
                raise UserError(f"{path}:{cut} is not valid JSON, and lines follow it")
            try:
                row = json.loads(line)
            except ValueError:
                cut = count
                continue
            try:
                value = read(row)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{path}:{count} is not a line of a run: {type(error).__name__} {error}") from None
            yield value


def _metrics_row(row: dict[str, Any]) -> dict[str, Any]:
    return {**current_metrics(row), "step": int(row["step"])}


def _warned(row: dict[str, Any]) -> Warned:
    return Warned(
        step=int(row["step"]), name=str(row["name"]), evidence=str(row["evidence"]), advice=str(row["advice"])
    )


def _landmarks(path: Path) -> list[Position]:
    """Two passes, so that a long run's thoughts need not fit into memory."""
    steps = sorted(set(_each(path, lambda row: int(row["step"]))))
    if not steps:
        return []
    wanted = {steps[0], steps[(len(steps) - 1) // 2], steps[-1]}
    read = _each(path, lambda row: _position(row) if int(row["step"]) in wanted else None)
    latest = {(one.step, one.document, one.position): one for one in read if one is not None}
    return sorted(latest.values(), key=lambda one: one.step)


def _position(row: dict[str, Any]) -> Position:
    thoughts = [
        Thought(
            text=str(one["text"]),
            length=number(one.get("length")),
            closed=bool(one.get("closed")),
            evidence=number(one.get("evidence")),
            reward=number(one.get("reward")),
            advantage=number(one.get("advantage")),
            prediction=None if one.get("prediction") is None else str(one["prediction"]),
        )
        for one in row["thoughts"]
    ]
    return Position(
        step=int(row["step"]),
        document=str(row.get("document", "?")),
        position=str(row.get("position", "?")),
        context=str(row["context"]),
        target=str(row["target"]),
        nothink=number(row.get("nothink")),
        thoughts=sorted(thoughts, key=lambda one: -math.inf if one.reward is None else one.reward, reverse=True),
    )
