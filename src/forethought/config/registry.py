"""The registry of methods, rewards, engines, position policies and metrics. Importing it imports no torch.

What is outside the package is named `module:attribute`: a class or function that can be imported from the current
folder. It may describe itself with an attribute `entry = Entry(...)`.
"""

import importlib
import importlib.util
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


class RunError(RuntimeError):
    """A run that cannot continue (full disk, non-finite loss), in one line that says what is safe; exit status 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A method, reward, engine or position policy."""

    help: str
    """One line for `--help` and the report."""
    name: str = ""
    label: str = ""
    """What tables and model cards call it; empty: its name."""
    target: str = ""
    """`module:attribute`, imported when it is used."""
    paper: str = ""
    """arXiv identifier."""
    required: tuple[str, ...] = ()
    """Options that must be set with it."""
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Options that must stay at their defaults with it, each with the reason."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Methods: what `auto` means in `method.reward` and `method.position_policy`, where it differs from AUTOMATIC."""
    samples_thoughts: bool = True
    """Methods: whether training samples thoughts."""
    rewards: tuple[str, ...] = ()
    """Methods: the rewards that fit; empty: those that name the method, and all that name none."""
    methods: tuple[str, ...] = ()
    """Rewards: the methods that they fit; empty: all."""
    writes: bool = False
    """Methods: writes predictions after thoughts. Engines: can write them (`respond`)."""
    proxy: bool = False
    """Position policies: whether a proxy model's entropies are queried."""


def _table(*entries: Entry) -> dict[str, Entry]:
    return {one.name: replace(one, label=one.label or one.name) for one in entries}


METHODS = _table(
    Entry(
        name="rlp", target="forethought.algo.rlp:RLP", label="RLP, reinforcement learning pretraining",
        paper="2510.01265", help="thoughts are rewarded by how much they help to predict the next token",
    ),
    Entry(
        name="rpt", target="forethought.algo.rpt:RPT", label="RPT, reinforcement pre-training", paper="2506.08007",
        help="thoughts end in a written prediction, which is right or wrong", writes=True,
        defaults={"method.reward": "prefix_match", "method.position_policy": "entropy"},
        excluded={"method.clamp_gain": "has no gain to clamp", "method.min_gain": "has no gain to filter by"},
    ),
    Entry(
        name="cpt", target="forethought.algo.cpt:CPT", label="CPT, continued pretraining", samples_thoughts=False,
        help="next-token prediction without thoughts",
    ),
    Entry(
        name="mixed", target="forethought.algo.mixed:Mixed", label="mixed supervised training", paper="2608.23256",
        help="next-token prediction on text with and without thoughts of the start that gained",
        rewards=("information_gain",),
    ),
)  # fmt: skip
REWARDS = _table(
    Entry(
        name="information_gain", target="forethought.algo.rewards:information_gain", methods=("rlp", "mixed"),
        help="log-likelihood of the next tokens with the thought, minus the teacher's without (eq. 5)",
    ),
    Entry(
        name="prefix_match", target="forethought.algo.rewards:prefix_match_reward", methods=("rpt",),
        help="1 where the prediction is a prefix of the text that ends at a token's end, else 0",
    ),
    Entry(
        name="random", target="forethought.algo.rewards:random_reward", methods=("rlp", "rpt"),
        label="random (a control)", help="standard normal numbers: a control",
    ),
)  # fmt: skip
ENGINES = _table(
    Entry(
        name="native", target="forethought.rollout.native:native_engine", writes=True,
        help="the policy itself",
    ),
    Entry(
        name="vllm", target="forethought.rollout.vllm:start", label="vLLM",
        help="vLLM in the same process, given the new weights after every step",
        excluded={"method.top_p": "returns log-probabilities of the nucleus"},
    ),
)  # fmt: skip
POSITION_POLICIES = _table(
    Entry(name="uniform", target="forethought.data.positions:uniform", help="uniformly at random"),
    Entry(name="stride", target="forethought.data.positions:stride", help="evenly spaced from a random start"),
    Entry(
        name="marked", target="forethought.data.positions:marked",
        help="at a token that the corpus marks with probability method.marked_share, else uniform",
    ),
    Entry(
        name="entropy", target="forethought.data.positions:uncertain", proxy=True,
        help="where a proxy's next-token entropy is at least method.min_entropy",
    ),
)  # fmt: skip
TABLES: dict[Kind, dict[str, Entry]] = {
    "method": METHODS, "reward": REWARDS, "engine": ENGINES, "position_policy": POSITION_POLICIES,
}  # fmt: skip


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
        own = Entry(help=lines[0] if lines else "")
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
    return TABLES[kind][name].label if name in TABLES[kind] else name


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
    try:
        importlib.invalidate_caches()
        missing = module not in sys.modules and importlib.util.find_spec(module) is None
    except (ImportError, ValueError):  # a parent of it is missing, or is no package
        missing = True
    if missing:
        raise UserError(f"{found}: no module {module!r} in the current folder or among the installed packages")
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        text = " ".join(str(error).split())
        raise UserError(f"{found}: importing {module} failed with {type(error).__name__}: {text[:200]}") from error
    value = getattr(loaded, attribute, None)
    if not callable(value):
        raise UserError(f"{found}: {module} has no class or function {attribute!r}")
    return value
