"""Diagnostics: warnings about problems that show in a run's metrics, with advice.

A check compares the mean of a metric over the last WINDOW logged steps with a threshold, alone or relative to an
earlier mean. It warns once when the threshold is reached, and again only after the value has fallen below a second,
lower threshold. docs/diagnostics.md explains every check.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, TypeGuard

WINDOW = 10
"""Logged steps in a mean."""
KEPT_SHUFFLED = 0.5
"""Share of a gain that may remain when thoughts are shuffled between positions."""
CONTENT_UNUSED = "content-unused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """A warning, which is a row of warnings.jsonl: the step, the check, what was observed and what to do."""

    step: int
    name: str
    evidence: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check: `size(recent mean, reference mean)` grows as things get worse."""

    name: str
    metric: str
    size: Callable[[float, float], float]
    warns: float  # the size from which it warns
    clears: float  # the size below which it may warn again
    evidence: str  # what was observed, with {recent} and {reference}
    advice: str
    reference: Literal["none", "start", "before"] = "none"
    """The reference: none, the first WINDOW logged values, or the WINDOW before the last WINDOW."""
    beside: str = ""  # a metric that only those runs log to which the check applies


CHECKS = (
    Check(
        name="thoughts-shrinking", metric="rollout/length", reference="start",
        size=lambda recent, start: 1 - recent / start if start > 0 else 0.0, warns=0.5, clears=0.35,
        evidence="a thought has {recent:.1f} tokens, at the start {reference:.1f}",
        advice="unless the gain rises, lower optim.learning_rate or raise method.group",
    ),
    Check(
        name="thoughts-not-closing", metric="rollout/closed", size=lambda recent, _: 1 - recent, warns=0.5, clears=0.35,
        evidence="{recent:.0%} of the thoughts close themselves, the others are truncated",
        advice="raise method.thought_length, or set method.unclosed to penalize",
    ),
    Check(
        name="leakage-rising", metric="rollout/leakage", reference="start",
        size=lambda recent, start: recent - start, warns=0.25, clears=0.15,
        evidence="{recent:.0%} of the thoughts contain their target token, at the start {reference:.0%}",
        advice="read the thoughts in the report: are they reasoning, or just guesses of the next token?",
    ),
    Check(
        name="groups-flat", metric="reward/zero_std_fraction", size=lambda recent, _: recent, warns=0.9, clears=0.8,
        evidence="at {recent:.0%} of the positions all thoughts have the same reward, so nothing is learned there",
        advice="choose harder positions with method.position_policy, or raise method.group or method.temperature",
    ),
    Check(
        name="plain-prediction-drifting", metric="reward/nothink", reference="start",
        size=lambda recent, start: start - recent, warns=0.5, clears=0.25,
        evidence="log p without a thought is {recent:.2f} nats, at the start {reference:.2f}: a gain over a teacher "
        "that gets worse is no progress",
        advice="watch the evidence instead of the gain, and lower optim.learning_rate or set method.kl_weight",
    ),
    Check(
        name="sampler-mismatch", metric="objective/mismatch", size=lambda recent, _: recent, warns=0.1, clears=0.05,
        evidence="sampler and trainer differ by {recent:.3f} nats per token on the same thoughts",
        advice="set model.precision to fp32; if it persists, the engine does not sample from the model being trained",
    ),
    Check(
        name="loss-spike", metric="objective/loss", beside="objective/accuracy", reference="before",
        size=lambda recent, before: recent - before, warns=0.5, clears=0.1,
        evidence="the loss is {recent:.2f} nats per token, over the {window} logged steps before {reference:.2f}",
        advice="lower optim.learning_rate or optim.gradient_clip, or lengthen optim.warmup",
    ),
    Check(
        name="gradient-spike", metric="optim/gradient_norm", reference="before",
        size=lambda recent, before: recent / before if before > 0 else 0.0, warns=4.0, clears=2.5,
        evidence="the gradient norm is {recent:.3g}, over the {window} logged steps before {reference:.3g}",
        advice="lower optim.gradient_clip or optim.learning_rate, and read the thoughts of these steps",
    ),
)  # fmt: skip
"""The checks of every run, besides `ratio-off`, whose thresholds depend on the updates per batch."""


def _ratio_off(updates: int) -> Check:
    warns, clears = (0.001, 0.0005) if updates == 1 else (0.2, 0.1)
    return Check(
        name="ratio-off", metric="objective/ratio", size=lambda recent, _: abs(recent - 1), warns=warns, clears=clears,
        evidence="the importance ratio is {recent:.4f} on average",
        advice="lower method.inner_steps or optim.learning_rate"
        if updates > 1
        else "with one update per batch it should be 1, so the policy changed between sampling and training",
    )  # fmt: skip


class Monitor:
    """The checks of one run and their history. `updates`: per batch (method.inner_steps)."""

    def __init__(self, updates: int = 1):
        self._checks = (*CHECKS, _ratio_off(updates))
        self._values: dict[str, list[float]] = {check.name: [] for check in self._checks}
        self._warned: set[str] = set()

    def observe(self, step: int, metrics: Mapping[str, Any]) -> list[Diagnosis]:
        """New warnings at a logged step. A metric that is missing or not finite is ignored."""
        found = []
        for check in self._checks:
            value = metrics.get(check.metric)
            if not is_number(value) or (check.beside and check.beside not in metrics):
                continue
            values = self._values[check.name]
            values.append(float(value))
            if len(values) < (WINDOW if check.reference == "none" else 2 * WINDOW):
                continue
            first = 0 if check.reference == "start" else max(0, len(values) - 2 * WINDOW)
            recent, reference = fmean(values[-WINDOW:]), fmean(values[first : first + WINDOW])
            size = check.size(recent, reference)
            if check.name not in self._warned and size >= check.warns:
                self._warned.add(check.name)
                evidence = check.evidence.format(recent=recent, reference=reference, window=WINDOW)
                found.append(Diagnosis(step=step, name=check.name, evidence=evidence, advice=check.advice))
            elif size < check.clears:
                self._warned.discard(check.name)
        return found

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> list[Diagnosis]:
        """Observe the rows of metrics.jsonl again. Returns the warnings, which a resumed run has logged already."""
        return [one for row in rows for one in self.observe(row["step"], row)]


def diagnose_evaluation(figures: Mapping[str, Any], step: int) -> list[Diagnosis]:
    """Groups of positions where thoughts help significantly, but thoughts of other positions help nearly as much.

    `figures` are those of summary.json: `after/GROUP/kept_shuffled` is the share of the gain that remains when thoughts
    are shuffled between positions, `after/GROUP/gain_self/low` the lower end of the confidence interval of the gain.
    """
    found = []
    for name, share in figures.items():
        when, _, rest = name.partition("/")
        group, _, metric = rest.rpartition("/")
        gain = figures.get(f"after/{group}/gain_self/low")
        if when != "after" or metric != "kept_shuffled" or not (is_number(share) and is_number(gain)):
            continue
        if share >= KEPT_SHUFFLED and gain > 0:
            found.append(
                Diagnosis(
                    step=step,
                    name=CONTENT_UNUSED,
                    evidence=f"{share:.0%} of the gain on {group} remains with the thoughts of other positions",
                    advice="do not take the gain for reasoning: that there is a thought helps, hardly its content",
                )
            )
    return found


def diagnose_split(shared: Sequence[str]) -> list[Diagnosis]:
    """Held-out files that are trained on too."""
    if not shared:
        return []
    what = f"evaluate.path and corpus.path share {len(shared)} files, {shared[0]} among them"
    advice = "hold out text that the run does not read: figures of text that it is trained on are too good"
    return [Diagnosis(step=0, name="held-out-trained-on", evidence=what, advice=advice)]


def diagnose_text(tokens: Sequence[int], unknown: Any, name: Any) -> list[Diagnosis]:
    """Text of the first step most of which is the tokenizer's unknown token: its id (None: there is none), its name."""
    share = sum(token == unknown for token in tokens) / len(tokens)
    if share <= 0.5:
        return []
    what = f"{share:.0%} of the tokens of the first step are {name}"
    return [Diagnosis(step=1, name="text-unknown", evidence=what, advice="take a model that knows these words")]


def diagnose_resume(
    step: int, changes: Mapping[str, tuple[Any, Any]], raised: bool, files: Sequence[str]
) -> list[Diagnosis]:
    """Options (with the values before and now) and files of the corpus that changed; `raised`: a budget among them."""
    found = []
    if changes:
        what = ", ".join(f"{option} = {now!r} (was {before!r})" for option, (before, now) in changes.items())
        follows = "from the next step on, the schedule of the learning rate follows the new end"
        advice = follows if raised else "results stay the same up to rounding"
        found.append(Diagnosis(step=step, name="options-changed", evidence=what, advice=advice))
    if files:
        what = f"{len(files)} files of the corpus have changed, {files[0]} among them"
        advice = "the run goes on at the same file and row, and reads what is there now"
        found.append(Diagnosis(step=step, name="corpus-changed", evidence=what, advice=advice))
    return found


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
