"""From a file and the command line to a checked `Config`, and back.

A value comes from its default, then the TOML file, then the command line. All of it is checked before torch is
imported: an unknown key, a wrong type or a value out of range is one `UserError` that names the option, the value
and what is allowed.
"""

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from forethought.config import registry
from forethought.config.options import Config
from forethought.config.registry import UserError

T = TypeVar("T")

_SAME_RESULTS = (
    "run", "overwrite", "parallel.", "questions.", "evaluate.view", "model.device", "model.prefix", "model.decoding",
    "rollout.cache_gb", "rollout.timeout_s", "train.rollout_batch", "train.log_", "train.tracker",
    "train.checkpoint_every", "train.keep_checkpoints", "update.",
)  # fmt: skip
"""How the names of options begin that change where, how fast and in how much memory a run is computed, or its logs."""
BUDGET = ("train.steps", "train.tokens", "train.flops")


def load(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Defaults, then the TOML file (or the name of a shipped config), then `--section.option value` words.

    Raises:
        UserError: unknown or missing file, broken TOML, unknown option, wrong type, value out of range.
    """
    values = {} if path is None else read_toml(find(path))
    if "arms" in values:
        raise UserError(f"config {str(path)!r} is an experiment: forethought compare {path}")
    if "stage" in values:
        raise UserError(f"config {str(path)!r} is a stage of post-training: forethought posttrain {path}")
    return from_dict(merge(values, read_overrides(overrides or [])))


def merge(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts of options as one; `more` wins. Raises UserError."""
    merged = dict(values)
    for name, value in more.items():
        old = merged.get(name, {})
        if isinstance(value, dict) and not isinstance(old, dict):
            raise UserError(f"{name} = {old!r}: is no table of options")
        merged[name] = merge(old, value) if isinstance(value, dict) else value
    return merged


def from_dict(values: dict[str, Any], saved: bool = False) -> Config:
    """Check a nested dict and make it a Config. Raises UserError; `saved` runs may set what their method excludes."""
    try:
        config = TypeAdapter(Config).validate_json(as_json(values))
    except ValidationError as error:
        raise UserError(explain(error, [*option_names(), *to_dict(Config())])) from None
    for conflicts in (_conflicts_of_rewards, _conflicts_of_sizes, _conflicts_of_entries, _excluded):
        for conflict in () if saved and conflicts is _excluded else conflicts(config):
            raise UserError(conflict)
    return config


def as_json(values: dict[str, Any]) -> str:
    """Nested options as JSON, to be checked. Raises UserError for a value whose bytes were no UTF-8 text."""
    for option, value in flatten(values).items():
        try:
            json.dumps([option, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise UserError(f"{option} = {value!r}: is not UTF-8 text") from None
    return json.dumps(values, default=str)


def to_dict(config: Config) -> dict[str, Any]:
    """The nested dict of a config; `from_dict` takes it back."""
    return dataclasses.asdict(config)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their whole names: {"train": {"steps": 3}} is {"train.steps": 3}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def difference(saved: Config, wanted: Config) -> tuple[str, Any, Any] | None:
    """The first option on which two configs disagree and that can change results: its name and both values."""
    found = ((option, *values) for option, values in changes(saved, wanted).items())
    return next((one for one in found if not one[0].startswith(_SAME_RESULTS)), None)


def changed_on_resume(saved: Config, wanted: Config) -> dict[str, tuple[Any, Any]]:
    """The options that a resumed run changes, each with both values.

    They leave the results as they are, raise a budget, or name the new path of the same corpus (which is not checked
    here). Raises UserError for all others.
    """
    changed = changes(saved, wanted)
    for option, (before, now) in changed.items():
        says = f"{option} = {now!r}: the run to resume has {before!r}; resuming"
        if option in BUDGET and (now or math.inf) < (before or math.inf):
            raise UserError(f"{says} can only raise it")
        if option not in ("corpus.path", *BUDGET) and not option.startswith(_SAME_RESULTS):
            raise UserError(f"{says} cannot change this option")
    return changed


def changes(saved: Config, wanted: Config) -> dict[str, tuple[Any, Any]]:
    """The options on which two configs disagree, each with both values; but for the run folder."""
    old, new = _resolved(saved), _resolved(wanted)
    return {
        option: (old[option], value)
        for option, value in new.items()
        if old[option] != value and option not in ("run", "overwrite")
    }


def _resolved(config: Config) -> dict[str, Any]:
    method = config.method
    automatic = {"method.reward": method.reward_name, "method.position_policy": method.policy}
    return flatten(to_dict(config)) | automatic


def option_names() -> list[str]:
    """Every option's name, `section.option`."""
    return list(flatten(to_dict(Config())))


def shipped() -> Path:
    """The folder of configs that come with the package (beside it in a checkout, inside it in a wheel)."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "configs"


def find(path: str | Path) -> Path:
    """The file that a CONFIG argument names: a path, or the name of a shipped config such as `quickstart`."""
    path = Path(path)
    candidates = [path, shipped() / path.name, shipped() / f"{path.name}.toml"]
    for candidate in candidates if path.parent == Path() else candidates[:1]:
        if candidate.is_file():
            return candidate
    names = ", ".join(sorted(file.stem for file in shipped().glob("*.toml")))
    raise UserError(f"config {str(path)!r} is no file; shipped configs are {names}")


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds. Raises UserError where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"config {str(path)!r} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"config {str(path)!r} cannot be read: {error.strerror}") from None


def read_overrides(words: list[str], texts: Container[str] = ()) -> dict[str, Any]:
    """`--a.b 3` or `--a.b=3` as {"a": {"b": 3}}. Raises UserError.

    A value is text where the option takes text, as those of `texts` do, and where it is no TOML literal.
    """
    values: dict[str, Any] = {}
    words = list(words)
    while words:
        option = words.pop(0)
        if not option.startswith("--"):
            raise UserError(f"expected an option such as --method.group 8, got {option!r}")
        option, equals, value = option[2:].partition("=")
        if not equals:
            if not words:
                raise UserError(f"option --{option} needs a value")
            value = words.pop(0)
        option = option.replace("-", "_")
        nested: Any = value if option in texts else _literal(option, value)
        for name in reversed(option.split(".")):
            nested = {name: nested}
        values = merge(values, nested)
    return values


def own_options(kind: type[T], words: list[str]) -> tuple[T, dict[str, Any]]:
    """A command's own options, as a checked dataclass, and the nested options that are not among them.

    One that is true or false needs no value: `--simulate`. Raises UserError.
    """
    own = {one.name: one.type for one in dataclasses.fields(cast("Any", kind))}
    switches = {f"__{name}" for name, taken in own.items() if taken is bool}
    words = [f"{word}=True" if word.replace("-", "_") in switches else word for word in words]
    values = read_overrides(words, [name for name, taken in own.items() if taken is str])
    try:
        chosen = TypeAdapter(kind).validate_python({name: values.pop(name) for name in own if name in values})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{first['loc'][0]} {first['input']}: {first['msg']}") from None
    return chosen, values


def _literal(option: str, text: str) -> Any:
    """Text where the option takes text, else the TOML literal that the text spells, else the text itself."""
    if isinstance(flatten(to_dict(Config())).get(option), str):
        return text
    if text in ("True", "False"):
        return text == "True"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # not TOML, an integer of thousands of digits, or as many brackets
        return text


def explain(error: ValidationError, names: Sequence[str] = ()) -> str:
    """The first mistake in one line: an option that is none of `names`, or its value and what is allowed."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "unexpected_keyword_argument":
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; see forethought train --help" if names else ""
        return f"unknown option {name}{hint}"
    return f"{name} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _conflicts_of_rewards(config: Config) -> Iterator[str]:
    method, filtered = config.method, config.method.min_gain > -math.inf
    if method.unclosed == "drop" and (method.scale == "std" or filtered):
        yield "method.unclosed = 'drop': cannot be combined with method.scale std or method.min_gain"
    if method.unclosed == "penalize" and method.clamp_gain:
        yield "method.unclosed = 'penalize': cannot be combined with method.clamp_gain, which would undo the penalty"
    if method.samples_thoughts and method.group < 2 and method.baseline == "group":
        yield f"method.group = {method.group}: comparing thoughts takes at least 2 (or another method.baseline)"
    if method.baseline != "group" and method.scale == "std":
        yield f"method.baseline = {method.baseline!r}: method.scale std divides by a group's deviation, which may be 0"
    if method.teacher_every != 1 and not config.shift_invariant:
        yield (
            f"method.teacher_every = {method.teacher_every}: must be 1 with a baseline, clamp or filter that is not "
            "shift-invariant, because the teacher then shapes the update"
        )
    if method.warmup_steps and not method.prediction_weight:
        yield f"method.warmup_steps = {method.warmup_steps}: needs a method.prediction_weight above 0, which it trains"
    if method.distillation and not method.prediction_weight:
        yield f"method.distillation = {method.distillation}: needs a method.prediction_weight above 0, which weights it"
    if method.distillation and method.teacher_every != 1:
        yield f"method.distillation = {method.distillation}: needs the teacher at every step (method.teacher_every 1)"
    if not method.min_gain < math.inf:
        yield f"method.min_gain = {method.min_gain}: must be below infinity"


def _conflicts_of_sizes(config: Config) -> Iterator[str]:
    method, corpus, batch, shard = config.method, config.corpus, config.train.batch, config.parallel.shard
    if method.samples_thoughts and batch % method.positions != 0:
        yield f"train.batch = {batch}: must be a multiple of method.positions = {method.positions}"
    if method.min_thought_length > max(1, method.thought_length - 1):
        most = f"below method.thought_length = {method.thought_length}, or no thought could close"
        yield f"method.min_thought_length = {method.min_thought_length}: must be {most}"
    if method.allow_empty and method.min_thought_length > 1:
        yield f"method.min_thought_length = {method.min_thought_length}: method.allow_empty allows shorter thoughts"
    if method.prompt.count("{context}") != 1:
        yield f"method.prompt = {method.prompt!r}: must hold {{context}} exactly once"
    if corpus.min_tokens > corpus.window:
        yield f"corpus.min_tokens = {corpus.min_tokens}: must be at most corpus.window = {corpus.window}"
    if corpus.min_tokens <= method.horizon:
        yield f"corpus.min_tokens = {corpus.min_tokens}: must be above method.horizon = {method.horizon}"
    if config.update.offload and config.model.decoding == "cuda_graphs_compiled":
        yield "update.offload = True: would have model.decoding cuda_graphs_compiled compile again for every batch"
    if config.model.prefix != "shared" and (config.update.compile or config.update.attention == "triton"):
        what = "update.compile and update.attention triton are for thoughts over shared documents"
        yield f"model.prefix = {config.model.prefix!r}: {what}; use model.prefix shared"
    if config.lora.r and shard != "none":
        yield f"parallel.shard = {shard!r}: with lora.r = {config.lora.r} the trained weights are few; use 'none'"


def _conflicts_of_entries(config: Config) -> Iterator[str]:
    """A method with a reward, an engine or a proxy that does not fit it."""
    method, entry, engine = config.method, config.method.entry, registry.entry("engine", config.rollout.engine)
    if not method.samples_thoughts and method.reward != "auto":
        yield f"method.reward = {method.reward!r}: method.name {method.name} samples no thoughts to reward"
    if method.samples_thoughts and not registry.fits(entry, reward := registry.entry("reward", method.reward_name)):
        fitting = entry.rewards or [name for name, one in registry.REWARDS.items() if registry.fits(entry, one)]
        yield f"method.reward = {reward.name!r}: is not for method.name {method.name}; use {' or '.join(fitting)}"
    if entry.writes and not engine.writes:
        yield f"rollout.engine = {engine.name!r}: cannot write the predictions of method.name {method.name}; use native"
    if method.proxy and not (method.samples_thoughts and registry.entry("position_policy", method.policy).proxy):
        yield f"method.proxy = {method.proxy!r}: only method.position_policy entropy queries a proxy"


def _excluded(config: Config) -> Iterator[str]:
    """Options that an entry needs or excludes."""
    method, now, default = config.method, flatten(to_dict(config)), flatten(to_dict(Config()))
    named: dict[registry.Kind, str] = {
        "method": method.name,
        "reward": method.reward_name,
        "engine": config.rollout.engine,
        "position_policy": method.policy,
    }
    for kind, name in named.items():
        entry, says = registry.entry(kind, name), f"{registry.OPTION[kind]} = {name!r}"
        for option in entry.required:
            if now.get(option) == default.get(option):
                yield f"{says}: needs {option}"
        for option, reason in entry.excluded.items():
            if now.get(option) != default.get(option):
                yield f"{says}: {reason}, so {option} = {now[option]} must be {default[option]}"
