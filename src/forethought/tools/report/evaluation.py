"""The evaluation before and after training, from summary.json, as tables: one per group of positions."""

from dataclasses import dataclass

from forethought.tools.report.runs import Run, number
from forethought.tools.report.text import UNBROKEN, figure, signed


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """How an evaluated metric is shown."""

    name: str
    label: str
    explanation: str
    unit: str = "nats"
    better: int = 1
    """1: higher is better, -1: lower is, 0: neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run's figures for one metric, as text; an en dash where there is none."""

    before: str
    before_interval: str
    after: str
    after_interval: str
    difference: str
    verdict: str
    """`better` or `worse` where the two intervals do not overlap, else empty."""
    missing: bool
    """Whether the run evaluated this neither before nor after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A table: for each metric, one cell a run."""

    name: str
    rows: list[tuple[Metric, list[Cell]]]


METRICS = (
    Metric(
        name="gain_over_base", label="Gain over the start",
        explanation="nats per token that thinking now brings over the model before training without a thought",
    ),
    Metric(
        name="gain_self", label="Gain over itself",
        explanation="nats per token that thinking brings over the same model without a thought",
    ),
    Metric(
        name="accuracy_think", label="Accuracy, thinking", unit="share",
        explanation="how often the likeliest token after a thought is the true one",
    ),
    Metric(
        name="accuracy_nothink", label="Accuracy, no thought", unit="share",
        explanation="how often the likeliest token is the true one without a thought",
    ),
    Metric(
        name="ce_think", label="Cross-entropy, thinking", better=-1,
        explanation="surprise at the true token after a thought, in nats; lower is better",
    ),
    Metric(
        name="ce_nothink", label="Cross-entropy, no thought", better=-1,
        explanation="surprise at the true token without a thought, in nats; lower is better",
    ),
    Metric(
        name="plain_gain_over_base", label="Plain gain over the start",
        explanation="nats per token that prediction without a thought gained over the start",
    ),
    Metric(
        name="drift", label="Drift of plain prediction", better=-1,
        explanation="what training cost the cross-entropy without a thought, in nats; near 0 is right",
    ),
    Metric(
        name="gain_over_teacher", label="Gain over the teacher",
        explanation="nats per token that thinking brings over the EMA teacher without one: the reward of training",
    ),
    Metric(
        name="marginal", label="Cross-entropy, mixture", better=-1,
        explanation="surprise at the true token after all sampled thoughts together, in nats; lower is better",
    ),
    Metric(
        name="leakage", label="Thoughts with the target", unit="share", better=0,
        explanation="thoughts that contain the text of the true token",
    ),
    Metric(
        name="truth", label="Right statements", unit="share",
        explanation="how many of the checkable statements in thoughts are right",
    ),
    Metric(
        name="checkable", label="Statements in a thought", unit="statements", better=0,
        explanation="statements in a thought that can be checked",
    ),
    Metric(
        name="thought_length", label="Thought length", unit="tokens", better=0,
        explanation="tokens in a thought",
    ),
    Metric(
        name="closed", label="Closed thoughts", unit="share",
        explanation="thoughts that ended on their own",
    ),
)  # fmt: skip


def groups(runs: list[Run]) -> list[Group]:
    """A table for each group that any run evaluated, `all` first; empty when no run was evaluated."""
    keys = [key.split("/") for run in runs for key in run.summary]
    found = {(group, metric) for phase, group, metric in (key for key in keys if len(key) == 3) if _is(phase)}
    tables = []
    for name in sorted({group for group, _ in found}, key=lambda group: (group != "all", group)):
        present = {metric for group, metric in found if group == name}
        known = [metric for metric in METRICS if metric.name in present]
        others = sorted(present - {metric.name for metric in METRICS} - {"positions", "documents"})
        shown = known + [Metric(name=other, label=other, explanation="", better=0) for other in others]
        tables.append(Group(name=name, rows=[(one, [_cell(run, name, one) for run in runs]) for one in shown]))
    return tables


def _is(phase: str) -> bool:
    return phase in ("before", "after")


def _cell(run: Run, group: str, metric: Metric) -> Cell:
    (before, before_ends), (after, after_ends) = (
        (number(run.summary.get(key)), [number(run.summary.get(f"{key}/{end}")) for end in ("low", "high")])
        for key in (f"{phase}/{group}/{metric.name}" for phase in ("before", "after"))
    )
    difference = None if before is None or after is None else after - before
    return Cell(
        before=figure(before, metric.unit),
        before_interval=interval(before_ends, metric.unit),
        after=figure(after, metric.unit),
        after_interval=interval(after_ends, metric.unit),
        difference=signed(difference, metric.unit).replace(f"{UNBROKEN}%", " points"),
        verdict=_verdict(before_ends, after_ends, metric.better),
        missing=before is None and after is None,
    )


def interval(ends: list[float | None], unit: str) -> str:
    """The ends of an interval as text; empty where one is not known."""
    low, high = ends
    return "" if low is None or high is None else f"{figure(low, unit)} to {figure(high, unit)}"


def _verdict(before: list[float | None], after: list[float | None], better: int) -> str:
    (before_low, before_high), (after_low, after_high) = before, after
    if before_low is None or before_high is None or after_low is None or after_high is None or not better:
        return ""
    if after_low > before_high:
        return "better" if better > 0 else "worse"
    if after_high < before_low:
        return "worse" if better > 0 else "better"
    return ""
