"""The registry of methods, rewards, engines, position policies and metrics. Importing it imports no torch.

What is outside the package is named `module:attribute`: a class or function that can be imported from the current
folder. It may describe itself with an attribute `entry = Entry(...)`.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["method", "reward", "engine", "position_policy"]
OPTION: dict[Kind, str] = {
    "method": "method.name",
    "reward": "method.reward",
    "engine": "rollout.engine",
    "position_policy": "method.position_policy",
}
"""The option that names an entry of each kind."""
AUTOMATIC = {"method.reward": "information_gain", "method.position_policy": "uniform"}
"""What `auto` means in these options, unless the method's entry says otherwise."""
_OUTSIDE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class UserError(ValueError):
    """A user's mistake, in one line that names the option or file, the value and what is allowed; exit status 2."""


class Notice(UserWarning):
    """What a user should know and no one has to act on, in one line; the command line says it once."""


class RunError(RuntimeError):
    """A run that cannot continue (full disk, non-finite loss), in one line that says what is safe; exit status 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A method, reward, engine or position policy."""

    help: str  # one line for `--help` and the report
    name: str = ""
    label: str = ""  # in tables and model cards; empty: its name
    target: str = ""  # `module:attribute`, imported when it is used
    paper: str = ""  # arXiv identifier
    required: tuple[str, ...] = ()  # options that must be set with it
    excluded: Mapping[str, str] = field(default_factory=dict)  # options that must not, each with the reason
    samples_thoughts: bool = True  # of a method: whether training samples thoughts
    rewards: tuple[str, ...] = ()  # that fit a method, its own first; empty: those that name the method or none
    methods: tuple[str, ...] = ()  # that a reward fits; empty: all
    defaults: Mapping[str, str] = field(default_factory=dict)  # of a method: what `auto` means, if not AUTOMATIC
    teacher: bool = True  # of a method: whether it keeps an EMA teacher where method.teacher_every is above 0
    writes: bool = False  # a method needs, and an engine has, predictions after thoughts (`respond`)
    proxy: bool = False  # whether a position policy takes the entropies of a proxy model


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown."""

    name: str
    label: str
    unit: str
    help: str
    better: int = 0  # 1: higher is better, -1: lower is, 0: neither


def _table(*entries: Entry) -> dict[str, Entry]:
    return {one.name: replace(one, label=one.label or one.name) for one in entries}


_ALL_TEXT = "trains on all text"
_NO_RATIO = "trains on text alone, not on the choice of thoughts"
METHODS = _table(
    Entry(
        name="rlp", target="forethought.algo.rlp:RLP", label="RLP, reinforcement learning pretraining",
        paper="2510.01265", help="thoughts are rewarded by how much they help to predict the next token",
    ),
    Entry(
        name="warmup", target="forethought.algo.rlp:Warmup", label="warm start for RLP", paper="2602.03979",
        help="the text after sampled thoughts is learned, the thoughts are not",
        required=("method.prediction_weight",),
    ),
    Entry(
        name="rpt", target="forethought.algo.rpt:RPT", label="RPT, reinforcement pre-training", paper="2506.08007",
        help="a prediction is sampled after each thought, and is right or wrong", writes=True, teacher=False,
        defaults={"method.reward": "prefix_match", "method.position_policy": "entropy"},
        excluded={
            "method.clamp_gain": "has no gain to clamp", "method.min_gain": "has no gain to filter by",
            "method.repeat_context": "writes its prediction right after the thought",
            "method.prediction_weight": "samples its predictions, so that eq. 8 is the whole gradient",
        },
    ),
    Entry(
        name="cpt", target="forethought.algo.cpt:CPT", label="CPT, continued pretraining", samples_thoughts=False,
        help="next-token prediction without thoughts", teacher=False,
        excluded={"method.prediction_weight": _ALL_TEXT, "method.inner_steps": _NO_RATIO},
    ),
    Entry(
        name="mixed", target="forethought.algo.mixed:Mixed", label="mixed supervised training", paper="2608.23256",
        help="next-token prediction with and without thoughts of the start", rewards=("information_gain",),
        teacher=False,
        excluded={
            "method.prediction_weight": _ALL_TEXT, "method.inner_steps": _NO_RATIO, "method.kl_weight": _NO_RATIO,
            "update.offload": "samples with a copy of the start",
        },
    ),
)  # fmt: skip
REWARDS = _table(
    Entry(
        name="information_gain", target="forethought.algo.rewards:information_gain", methods=("rlp", "warmup", "mixed"),
        help="log p of the target with the thought, minus the teacher's without it (eq. 5)",
    ),
    Entry(
        name="prefix_match", target="forethought.algo.rewards:prefix_match_reward", methods=("rpt",),
        help="1 if the text begins with the prediction and a token ends where it does, else 0",
    ),
    Entry(
        name="random", target="forethought.algo.rewards:random_reward", methods=("rlp", "warmup", "rpt"),
        help="standard normal numbers, a control",
    ),
)  # fmt: skip
ENGINES = _table(
    Entry(name="native", target="forethought.rollout.native:native_engine", help="the policy itself", writes=True),
    Entry(
        name="vllm", target="forethought.rollout.vllm:start", label="vLLM",
        help="vLLM in the same process; its weights are updated after every step",
        excluded={"method.top_p": "returns log-probabilities of the nucleus"},
    ),
)  # fmt: skip
POSITION_POLICIES = _table(
    Entry(name="uniform", target="forethought.data.positions:uniform", help="uniformly at random"),
    Entry(name="stride", target="forethought.data.positions:stride", help="evenly spaced from a random start"),
    Entry(
        name="marked", target="forethought.data.positions:marked",
        help="at tokens that the corpus marks with probability method.marked_share, else uniform",
    ),
    Entry(
        name="entropy", target="forethought.data.positions:uncertain", proxy=True,
        help="where a proxy's next-token entropy is at least method.min_entropy",
    ),
)  # fmt: skip
TABLES: dict[Kind, dict[str, Entry]] = {
    "method": METHODS, "reward": REWARDS, "engine": ENGINES, "position_policy": POSITION_POLICIES,
}  # fmt: skip

CONTROLS = {
    "empty": "an empty thought", "shuffled": "another's thought", "random": "random tokens",
    "generic": "a generic thought",
}  # fmt: skip
"""What replaces the own thought of a position, to see whether its content counts (forethought.eval.controls)."""
CONTROL_GAINS = ("gain_self", *map("gain_{}".format, CONTROLS), "kept_shuffled", *map("gain_over_{}".format, CONTROLS))
"""The metrics that compare own thoughts with these."""
THINKING_SHARES = {share: f"gain_self_top_{share}" for share in (5, 10, 25, 50, 75, 100)}
"""Percent of a group's positions that think, those of highest entropy -> the metric of their mean gain."""
_METRICS = (
    Metric("reward/gain", "information gain", "nats", "log p of the target with the thought minus without (eq. 5)", 1),
    Metric("reward/mean", "mean reward", "", "the reward that thoughts are compared by", 1),
    Metric("reward/match", "right predictions", "share", "thoughts followed by a right prediction", 1),
    Metric("reward/evidence", "log p after a thought", "nats", "log p of the target after the thought (eq. 3)", 1),
    Metric("reward/nothink", "log p without a thought", "nats", "the teacher's log p of the target (eq. 4)"),
    Metric("reward/std", "reward standard deviation", "", "mean over positions of the rewards' standard deviation"),
    Metric("reward/zero_std_fraction", "groups of equal rewards", "share", "positions that teach nothing", -1),
    Metric("rollout/length", "thought length", "tokens", "mean sampled tokens of a thought"),
    Metric("rollout/closed", "closed thoughts", "share", "thoughts that ended on their own", 1),
    Metric("rollout/predicted", "thoughts with a prediction", "share", "thoughts followed by a complete prediction", 1),
    Metric("rollout/leakage", "thoughts with the target", "share", "thoughts that contain the text of the target"),
    Metric("rollout/kept", "trained thoughts", "share", "thoughts that were trained on"),
    Metric("rollout/tokens", "thought tokens", "tokens", "tokens of all thoughts of the step"),
    Metric("objective/loss", "loss", "nats", "the loss (eq. 8); for cpt and mixed the next-token loss (eq. 1)"),
    Metric("objective/prediction_loss", "prediction loss", "nats", "mean -log p of the targets, as it is trained", -1),
    Metric("objective/ratio", "importance ratio", "", "mean pi_theta / pi_theta_old of thought tokens"),
    Metric("objective/clip_fraction", "clipped tokens", "share", "thought tokens whose gradient the clip removed"),
    Metric("objective/mismatch", "sampler mismatch", "nats", "mean |log p by trainer - log p by sampler|", -1),
    Metric(
        "objective/importance_weight", "importance weight", "", "mean min(policy / sampler, rollout.importance_cap)"
    ),
    Metric("objective/kl", "KL to the start", "nats", "k3 estimate of KL(policy || start) on thought tokens"),
    Metric("objective/accuracy", "next-token accuracy", "share", "tokens that were the most likely ones", 1),
    Metric("optim/gradient_norm", "gradient norm", "", "global L2 norm before clipping"),
    Metric("optim/gradient_norm_policy", "gradient norm, policy", "", "the same of the policy term alone"),
    Metric("optim/gradient_norm_prediction", "gradient norm, prediction", "", "the same of the prediction term alone"),
    Metric("optim/learning_rate", "learning rate", "", "learning rate of the step"),
    Metric("corpus/documents", "documents", "count", "documents begun since the start"),
    Metric("corpus/tokens", "text tokens", "tokens", "tokens of all windows since the start"),
    Metric("corpus/skipped", "skipped windows", "count", "windows shorter than corpus.min_tokens"),
    Metric("corpus/bad_rows", "bad rows", "count", "rows skipped by corpus.skip_bad_rows"),
    Metric("corpus/epoch", "epoch", "count", "finished passes over the corpus"),
    Metric("cost/flops", "FLOPs of the step", "FLOPs", "all phases of the step at their real lengths"),
    Metric("cost/flops_total", "FLOPs", "FLOPs", "all steps since the start"),
    Metric("time/step_s", "step time", "s", "wall time of the step"),
    Metric("time/rollout_s", "rollout time", "s", "positions and thoughts, with log p of the targets"),
    Metric("time/score_s", "scoring time", "s", "teacher, rewards and advantages"),
    Metric("time/update_s", "update time", "s", "forward, backward, optimizer and the rest"),
    Metric("time/wait_s", "wait time", "s", "mean wait of a process for the slowest one"),
    Metric("time/thought_tokens_per_s", "throughput", "tokens/s", "thought tokens per second of the step", 1),
    Metric("time/positions_per_s", "positions per second", "1/s", "positions per second of the step", 1),
    Metric("time/windows_per_s", "windows per second", "1/s", "windows per second of the step", 1),
    # held-out text
    Metric("accuracy_think", "accuracy, thinking", "share", "the target is the most likely token after a thought", 1),
    Metric("accuracy_nothink", "accuracy, no thought", "share", "the target is the most likely token without one", 1),
    Metric("ce_think", "cross-entropy, thinking", "nats", "mean -log p of the target after a thought", -1),
    Metric("ce_nothink", "cross-entropy, no thought", "nats", "mean -log p of the target without one", -1),
    Metric("gain_over_base", "gain over the base", "nats", "base's cross-entropy without a thought minus ce_think", 1),
    Metric("gain_self", "gain over itself", "nats", "ce_nothink minus ce_think", 1),
    Metric("gain_over_teacher", "gain over the teacher", "nats", "teacher's ce_nothink minus ce_think (eq. 5)", 1),
    Metric("plain_gain_over_base", "plain gain over the base", "nats", "base's ce_nothink minus ce_nothink", 1),
    Metric("drift", "drift of plain prediction", "nats", "ce_nothink minus the base's", -1),
    Metric("marginal", "cross-entropy, mixture", "nats", "-log of the mean p over all thoughts (Prop. 2)", -1),
    Metric("thought_length", "thought length", "tokens", "mean sampled tokens of a thought"),
    Metric("closed", "closed thoughts", "share", "thoughts that ended on their own", 1),
    Metric("leakage", "thoughts with the target", "share", "thoughts that contain the text of the target"),
    Metric("checkable", "statements in a thought", "statements", "statements that can be checked"),
    Metric("truth", "right statements", "share", "checkable statements in thoughts that are right", 1),
    Metric("ce_empty", "cross-entropy, empty thought", "nats", "with the delimiters alone", -1),
    Metric("ce_random", "cross-entropy, random tokens", "nats", "with as many random tokens", -1),
    Metric("ce_shuffled", "cross-entropy, another's thought", "nats", "with another position's thought", -1),
    Metric("ce_generic", "cross-entropy, generic thought", "nats", "with one thought for all positions", -1),
    *(Metric(f"gain_{one}", f"gain of {what}", "nats", f"ce_nothink minus ce_{one}") for one, what in CONTROLS.items()),
    *(
        Metric(f"gain_over_{one}", f"gain over {what}", "nats", f"ce_{one} minus ce_think", 1)
        for one, what in CONTROLS.items()
    ),
    Metric(
        "kept_shuffled", "gain that shuffling keeps", "share", "gain_shuffled / gain_self; near 0 content matters", -1
    ),
    *(
        Metric(name, f"gain of top {share} %", "nats", "gain_self at the positions of highest entropy", 1)
        for share, name in THINKING_SHARES.items()
    ),
    Metric("positions", "positions", "count", "positions in the group"),
    Metric("documents", "documents", "count", "documents that they are of"),
    Metric("windows", "windows", "count", "windows of a single document, which its intervals are over"),
    # benchmark questions
    Metric("pass_at_1", "pass@1", "share", "correct answers among the sampled ones", 1),
    Metric("greedy", "greedy", "share", "questions with a correct greedy answer", 1),
    Metric("loglik_letter", "most likely letter", "share", "questions whose correct letter is the most likely one", 1),
    Metric("loglik_plain", "most likely choice", "share", "the same for the text of the choice", 1),
    Metric("loglik_normalised", "most likely per byte", "share", "the same, divided by the bytes of the text", 1),
    Metric("extracted", "extracted", "share", "answers in which any answer was found", 1),
    Metric("cut_off", "cut off", "share", "answers that reached questions.max_tokens", -1),
    Metric("answer_length", "answer length", "tokens", "mean sampled tokens of an answer"),
    Metric("questions", "questions", "count", "questions of the task"),
    Metric("tasks", "tasks", "count", "tasks in the mean"),
    # summary.json
    Metric("flops", "FLOPs", "FLOPs", "all steps, evaluation not included"),
    Metric("flops_rollout", "FLOPs of rollouts", "FLOPs", "sampling, scoring, teacher and proxy"),
    Metric("flops_update", "FLOPs of updates", "FLOPs", "reference, forward and backward"),
    Metric("tokens", "tokens of text", "tokens", "tokens of all windows"),
    Metric("t_flop_tokens", "T_flop", "tokens", "the paper's estimate of the compute, in tokens"),
    Metric("trained_parameters", "trained parameters", "count", "weights that the optimizer moves"),
    Metric("steps", "steps", "count", "steps of training"),
    Metric("skipped", "skipped windows", "count", "windows shorter than corpus.min_tokens"),
    Metric("seconds", "wall time", "s", "the whole run with its evaluations"),
    Metric("cpu_seconds", "CPU seconds", "s", "training, measuring and post-training"),
)
METRICS = {metric.name: metric for metric in _METRICS}


def known(kind: Kind, name: str) -> bool:
    """Whether a name is registered, or has the form `module:attribute`. Imports nothing."""
    return name in TABLES[kind] or _OUTSIDE.fullmatch(name) is not None


def entry(kind: Kind, name: str) -> Entry:
    """The entry of a registered name or of a `module:attribute`, whose module is imported.

    Raises:
        UserError: neither of them, or the module or its attribute does not exist or cannot be imported.
    """
    if name in TABLES[kind]:
        return TABLES[kind][name]
    if not known(kind, name):
        names = ", ".join(TABLES[kind])
        raise UserError(f"{OPTION[kind]} = {name!r}: must be {names} or module:attribute")
    value = _outside(kind, name)
    own = getattr(value, "entry", None)
    if not isinstance(own, Entry):
        lines = (inspect.getdoc(value) or "").splitlines()
        own = Entry(help=lines[0].rstrip(".") if lines else "")
    return replace(own, name=name, target=name, label=own.label or name)


def load(kind: Kind, name: str) -> Any:
    """The class or function of an entry, imported. Raises UserError as `entry` does."""
    if name not in TABLES[kind]:
        entry(kind, name)
        return _outside(kind, name)
    module, _, attribute = TABLES[kind][name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def label(kind: Kind, name: str) -> str:
    """What tables and cards call an entry. Imports nothing, so that runs made with code that is gone can be shown."""
    if name in TABLES[kind]:
        return TABLES[kind][name].label
    module, _, attribute = name.partition(":")
    own = getattr(getattr(sys.modules.get(module), attribute, None), "entry", None)
    return own.label or name if isinstance(own, Entry) else name


def fits(method: Entry, reward: Entry) -> bool:
    """Whether a method can be trained on a reward."""
    if method.rewards or not method.samples_thoughts:
        return reward.name in method.rewards
    return not reward.methods or method.name in reward.methods or method.name not in METHODS


def _outside(kind: Kind, name: str) -> Any:
    """What `module:attribute` names. The current folder is searched after all that is installed."""
    here, found = str(Path.cwd()), f"{OPTION[kind]} = {name!r}"
    if here not in sys.path:
        sys.path.append(here)
    module, _, attribute = name.partition(":")
    importlib.invalidate_caches()
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            what = f"no module {module!r} in the current folder or among the installed packages"
            raise UserError(f"{found}: {what}") from None
        text = " ".join(str(error).split())
        raise UserError(f"{found}: importing {module} failed with {type(error).__name__}: {text[:200]}") from error
    value = getattr(loaded, attribute, None)
    if not callable(value):
        raise UserError(f"{found}: {module} has no class or function {attribute!r}")
    return value
