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
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from forethought.config.options import Config, Method, Name, UserError


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
    """Nested dicts of options as one; `more` wins."""
    merged = dict(values)
    for name, value in more.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def from_dict(values: dict[str, Any]) -> Config:
    """Check a nested dict and make it a Config. Raises UserError."""
    try:
        config = TypeAdapter(Config).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise UserError(_explain(error)) from None
    _check_together(config)
    return config


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
    """The first option that two configs disagree on: its name and both values.

    Where the run lies, and how processes share the work, makes no difference.
    """
    old = flatten(to_dict(saved))
    for option, value in flatten(to_dict(wanted)).items():
        if option not in ("run", "overwrite") and not option.startswith("parallel.") and old[option] != value:
            return option, old[option], value
    return None


def option_names() -> list[str]:
    """Every option's name, `section.option`."""
    names = []
    for field in dataclasses.fields(Config):
        section = field.type if dataclasses.is_dataclass(field.type) else None
        names += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(section)] if section else [field.name]
    return names


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
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {str(path)!r} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"config {str(path)!r} cannot be read: {error.strerror}") from None


def read_overrides(words: list[str]) -> dict[str, Any]:
    """`--a.b 3` or `--a.b=3` as {"a": {"b": 3}}; a value that is no TOML literal is text. Raises UserError."""
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
        nested: Any = _literal(option, value)
        for name in reversed(option.split(".")):
            nested = {name: nested}
        values = merge(values, nested)
    return values


def _literal(option: str, text: str) -> Any:
    """Text where the option takes text, else the TOML literal that the text spells, else the text itself."""
    section, _, name = option.rpartition(".")
    owner = {field.name: field.type for field in dataclasses.fields(Config)}.get(section, Config)
    types = {field.name: field.type for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else {}
    if types.get(name) in (str, Name):
        return text
    if text in ("True", "False"):
        return text == "True"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        near = difflib.get_close_matches(
            name, [*option_names(), *(field.name for field in dataclasses.fields(Config))], n=1
        )
        return f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "; see forethought train --help")
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{name} = {first['input']!r}: {message}"


def _check_together(config: Config) -> None:
    """The rules that take more than one option."""
    method, train = config.method, config.train
    rules = [
        (
            method.unclosed == "drop" and (method.scale == "std" or method.min_gain > -math.inf),
            "method.unclosed = 'drop': cannot be combined with method.scale std or method.min_gain",
        ),
        (
            method.unclosed == "penalise" and method.clamp_gain,
            "method.unclosed = 'penalise': cannot be combined with method.clamp_gain, which would undo the penalty",
        ),
        (
            method.group < 2 and method.baseline == "group" and method.thinks,
            f"method.group = {method.group}: comparing thoughts takes at least 2 (or another method.baseline)",
        ),
        (
            method.scale == "std" and method.group < 2,
            f"method.group = {method.group}: method.scale std takes a group of at least 2",
        ),
        (
            method.teacher_every != 1 and not config.shift_invariant,
            f"method.teacher_every = {method.teacher_every}: must be 1 with a baseline, clamp or filter that is not "
            "shift-invariant, because the teacher then shapes the update",
        ),
        (
            method.thinks and train.batch % method.positions != 0,
            f"train.batch = {train.batch}: must be a multiple of method.positions = {method.positions}",
        ),
        (
            method.prompt.count("{context}") != 1,
            f"method.prompt = {method.prompt!r}: must hold {{context}} exactly once",
        ),
        (
            config.corpus.min_tokens > config.corpus.window,
            f"corpus.min_tokens = {config.corpus.min_tokens}: must be at most corpus.window = {config.corpus.window}",
        ),
        (
            config.corpus.min_tokens <= method.horizon,
            f"corpus.min_tokens = {config.corpus.min_tokens}: must be above method.horizon = {method.horizon}",
        ),
        (not method.min_gain < math.inf, f"method.min_gain = {method.min_gain}: must be below infinity"),
    ]
    for broken, message in [*rules, *_rules_of_predictions(method), *_rules_of_extras(config)]:
        if broken:
            raise UserError(message)


def _rules_of_predictions(method: Method) -> list[tuple[bool, str]]:
    """Those of RPT, and of the proxy that picks positions."""
    return [
        (
            method.name == "rpt" and (method.clamp_gain or method.min_gain > -math.inf),
            "method.name = 'rpt': has no gain, so method.clamp_gain and method.min_gain are not for it",
        ),
        (
            method.name == "mixed" and method.reward != "information_gain",
            f"method.reward = {method.reward!r}: method.name mixed chooses thoughts by their gain",
        ),
        (
            method.proxy != "" and (method.policy != "entropy" or not method.thinks),
            f"method.proxy = {method.proxy!r}: only method.position_policy entropy asks a proxy",
        ),
    ]


def _rules_of_extras(config: Config) -> list[tuple[bool, str]]:
    """What vLLM and adapters cannot do."""
    method, asked = config.method, config.rollout.engine == "vllm"
    return [
        (
            asked and method.name == "rpt",
            "rollout.engine = 'vllm': samples thoughts only, and method.name rpt writes predictions; use native",
        ),
        (
            asked and method.top_p < 1,
            f"rollout.engine = 'vllm': its log-probabilities would be the nucleus's, so method.top_p = {method.top_p} "
            "must be 1",
        ),
        (
            config.lora.r > 0 and config.parallel.shard == "fsdp2",
            f"parallel.shard = 'fsdp2': with lora.r = {config.lora.r} what is trained is small, and whole in each "
            "process; use 'none'",
        ),
    ]
