"""Early warnings: what goes wrong in a run, found in the figures that it logs, with what to do about it.

A check compares the mean of a metric over the last WINDOW logged steps with a level, alone or against an earlier mean.
It warns once when the level is reached, and again only after it has fallen below a second, lower one.
docs/diagnostics.md explains every check.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal, TypeGuard

from forethought.config.registry import current_metrics

WINDOW = 10
"""Logged steps that a mean is taken over."""
KEPT_SHUFFLED = 0.5
"""Share of a gain that may stay when thoughts are shuffled between positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """A warning: since when, what was seen, and what to do."""

    step: int
    name: str
    evidence: str
    advice: str

    def row(self) -> dict[str, Any]:
        """The line of warnings.jsonl."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check: `size(recent mean, reference mean)` grows as things get worse."""

    name: str
    metric: str
    size: Callable[[float, float], float]
    warns: float
    """Size from which on it warns."""
    clears: float
    """Size below which it is ready to warn again."""
    evidence: str
    """What is seen, with {recent} and {reference}."""
    advice: str
    reference: Literal["none", "start", "before"] = "none"
    """What is compared with: nothing, the first WINDOW logged values, or the WINDOW before the last WINDOW."""
    beside: str = ""
    """A metric that only the runs log which the check is for."""


@dataclass(slots=True)
class _Memory:
    start: list[float] = field(default_factory=list)
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=2 * WINDOW))
    count: int = 0
    warned: bool = False

    def add(self, value: float) -> None:
        self.count += 1
        self.latest.append(value)
        if len(self.start) < WINDOW:
            self.start.append(value)

    def means(self, reference: str) -> tuple[float, float] | None:
        """(mean of the last WINDOW values, of the reference), or None as long as there are too few."""
        if self.count < (WINDOW if reference == "none" else 2 * WINDOW):
            return None
        values = list(self.latest)
        earlier = self.start if reference == "start" else values[:WINDOW]
        return fmean(values[-WINDOW:]), fmean(earlier)


def _itself(recent: float, reference: float) -> float:
    return recent


def _rise(recent: float, reference: float) -> float:
    return recent - reference


def _fall(recent: float, reference: float) -> float:
    return reference - recent


def _growth(recent: float, reference: float) -> float:
    return recent / reference if reference > 0 else 0.0


def _lost(recent: float, reference: float) -> float:
    """Share of the reference that is gone."""
    return 1 - recent / reference if reference > 0 else 0.0


def _missing(recent: float, reference: float) -> float:
    """What a share lacks to be whole."""
    return 1 - recent


def _off_one(recent: float, reference: float) -> float:
    return abs(recent - 1)


CHECKS = (
    Check(
        name="thoughts-shrinking", metric="rollout/length", reference="start", size=_lost, warns=0.5, clears=0.35,
        evidence="a thought has {recent:.1f} tokens, at the start it had {reference:.1f}",
        advice="unless the gain rises with it, lower optim.learning_rate or raise method.group",
    ),
    Check(
        name="thoughts-not-closing", metric="rollout/closed", size=_missing, warns=0.5, clears=0.35,
        evidence="{recent:.0%} of the thoughts close themselves, the others are cut off",
        advice="raise method.thought_length, or set method.unclosed to penalize",
    ),
    Check(
        name="leakage-rising", metric="rollout/leakage", reference="start", size=_rise, warns=0.25, clears=0.15,
        evidence="{recent:.0%} of the thoughts contain their target token, at the start {reference:.0%}",
        advice="read the thoughts in the report and see whether they are reasons or just guesses of the next token",
    ),
    Check(
        name="groups-flat", metric="reward/zero_std_fraction", size=_itself, warns=0.9, clears=0.8,
        evidence="at {recent:.0%} of the positions all thoughts earn the same, so that nothing is learned there",
        advice="choose harder positions by method.position_policy, or raise method.group or method.temperature",
    ),
    Check(
        name="plain-prediction-drifting", metric="reward/nothink", reference="start", size=_fall,
        warns=0.5, clears=0.25,
        evidence="log p without a thought is {recent:.2f} nats, at the start it was {reference:.2f}: a gain over a "
        "teacher that gets worse is no progress",
        advice="watch the evidence instead of the gain, and lower optim.learning_rate or set method.kl_weight",
    ),
    Check(
        name="sampler-mismatch", metric="objective/mismatch", size=_itself, warns=0.1, clears=0.05,
        evidence="sampler and trainer differ by {recent:.3f} nats a token on the same thoughts",
        advice="set model.precision to fp32; if it stays, the engine samples from another model than the one trained",
    ),
    Check(
        name="loss-spike", metric="objective/loss", beside="objective/accuracy", reference="before", size=_rise,
        warns=0.5, clears=0.1,
        evidence="the loss is {recent:.2f} nats a token, over the {window} logged steps before it was {reference:.2f}",
        advice="lower optim.learning_rate or optim.gradient_clip, or lengthen optim.warmup",
    ),
    Check(
        name="gradient-spike", metric="optim/gradient_norm", reference="before", size=_growth, warns=4.0, clears=2.5,
        evidence="the gradient norm is {recent:.3g}, over the {window} logged steps before it was {reference:.3g}",
        advice="lower optim.gradient_clip or optim.learning_rate, and read the thoughts of these steps",
    ),
)  # fmt: skip
"""The checks that every run has; `ratio-off` comes to them, with levels by the updates that a batch gets."""


def _ratio_off(updates: int) -> Check:
    warns, clears = (0.001, 0.0005) if updates == 1 else (0.2, 0.1)
    return Check(
        name="ratio-off", metric="objective/ratio", size=_off_one, warns=warns, clears=clears,
        evidence="the importance ratio is {recent:.4f} on average",
        advice="lower method.inner_steps or optim.learning_rate"
        if updates > 1
        else "a batch that gets one update has ratio 1, so the policy changed between sampling and learning",
    )  # fmt: skip


class Monitor:
    """The checks of one run, with what they remember. `updates` is how many a batch gets (method.inner_steps)."""

    def __init__(self, updates: int = 1):
        self._checks = (*CHECKS, _ratio_off(updates))
        self._memories = {check.name: _Memory() for check in self._checks}

    def observe(self, step: int, metrics: Mapping[str, Any]) -> list[Diagnosis]:
        """What is newly wrong at a logged step. A metric that is missing or not finite is no observation."""
        found = []
        for check in self._checks:
            value = metrics.get(check.metric)
            if not _is_number(value) or (check.beside and check.beside not in metrics):
                continue
            memory = self._memories[check.name]
            memory.add(float(value))
            means = memory.means(check.reference)
            if means is None:
                continue
            size = check.size(*means)
            if not memory.warned and size >= check.warns:
                memory.warned = True
                recent, reference = means
                evidence = check.evidence.format(recent=recent, reference=reference, window=WINDOW)
                found.append(Diagnosis(step=step, name=check.name, evidence=evidence, advice=check.advice))
            elif size < check.clears:
                memory.warned = False
        return found

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> list[Diagnosis]:
        """See the lines of metrics.jsonl again. Returns what was found, which a resumed run has logged already."""
        return [one for row in rows for one in self.observe(row["step"], current_metrics(row))]


def diagnose_evaluation(figures: Mapping[str, Any], step: int) -> list[Diagnosis]:
    """Groups of positions where thinking helps for sure, but thoughts of other positions would help nearly as much.

    `figures` is what summary.json holds: `after/GROUP/kept_shuffled` is the share of the gain that stays when thoughts
    are shuffled between positions, `after/GROUP/gain_self/low` the lower end of the gain's interval.
    """
    found = []
    for name, share in figures.items():
        when, _, rest = name.partition("/")
        group, _, metric = rest.rpartition("/")
        gain = figures.get(f"after/{group}/gain_self/low")
        if when != "after" or metric != "kept_shuffled" or not (_is_number(share) and _is_number(gain)):
            continue
        if share >= KEPT_SHUFFLED and gain > 0:
            found.append(
                Diagnosis(
                    step=step,
                    name="content-unused",
                    evidence=f"{share:.0%} of the gain on {group} stays with the thoughts of other positions",
                    advice="do not take the gain for reasoning: it helps that there is a thought, hardly what it says",
                )
            )
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
