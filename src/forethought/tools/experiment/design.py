"""An experiment file (docs/comparing.md): arms with a common start and evaluation, seeds, sweeps, and claims.

With `post = ["sft-cups", "rlvr-cups"]`, every arm and the base are measured, take the same stages of post-training, and
are measured again, as the groups `post:all`, `post:answer`, ...
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from forethought.config import Config, UserError, as_json, explain, find, from_dict, load, merge, read_toml, to_dict
from forethought.config.registry import METRICS
from forethought.tools.posttrain.stage import Stage
from forethought.tools.posttrain.stage import read as read_stage
from forethought.tools.report.comparison import BASE, Published
from forethought.tools.report.comparison import Sweep as Curve

UNBOUNDED = 10**9
"""train.steps of an arm that ends with another arm's budget."""

_STRICT = ConfigDict(extra="forbid", strict=True)
_ArmName = Annotated[str, Field(pattern=r"^\w[\w.=+-]*$", max_length=80)]
_FIXED = ("model", "evaluate", "questions", "seed", "run", "overwrite")
"""Sections and options that an arm cannot set."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Arm:
    """One way to train from the start."""

    options: dict[str, dict[str, Any]] = Field(default_factory=dict)  # overrides of the experiment's options
    budget: dict[Literal["tokens", "flops"], _ArmName] = Field(default_factory=dict)
    """Train for as many corpus tokens or FLOPs as the named arm's run with the same seed."""
    seeds: list[int] | None = None  # only these; None: all of the experiment


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Sweep:
    """One option of an arm over several values: an arm NAME=VALUE for each value that the arm itself does not have."""

    arm: _ArmName
    option: Annotated[str, Field(pattern=r"^[a-z0-9_]+\.[a-z0-9_]+$")]
    values: Annotated[list[int | float | str], Field(min_length=2)]
    seeds: list[int] | None = None
    published: Published | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Claim:
    """An expected result, judged by intervals, in one of four ways."""

    arm: _ArmName
    metrics: list[str] = Field(default_factory=list)  # GROUP/METRIC, as in docs/metrics.md
    above: list[_ArmName] = Field(default_factory=list)
    """The interval of the paired difference to these arms lies above `margin`; unpaired, the intervals are apart."""
    against: str = ""
    """The other arms' metric in `above`, if different: such as accuracy without thoughts, for plain training."""
    not_above: list[_ArmName] = Field(default_factory=list)
    """The interval of the paired difference to these arms ends at or below `margin`."""
    margin: FiniteFloat = 0.0
    equals: list[_ArmName] = Field(default_factory=list)
    """The arm's trained weights are identical to those of these arms, with every seed."""
    at_most: FiniteFloat | None = None  # the arm's interval ends at or below this


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class _File:
    config: Annotated[str, Field(min_length=1)] = "quickstart"
    run: str = ""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(default_factory=lambda: [0, 1, 2])
    processes: Annotated[int, Field(ge=1)] = 1
    ask: bool = False
    options: dict[str, Any] = Field(default_factory=dict)
    post: list[str] = Field(default_factory=list)
    arms: Annotated[dict[_ArmName, Arm], Field(min_length=1)]
    sweeps: dict[_ArmName, Sweep] = Field(default_factory=dict)
    claims: list[Claim] = Field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One arm with one seed. `name` is also its folder."""

    arm: str
    seed: int
    config: Config
    needs: str | None  # the job whose budget it takes over

    @property
    def name(self) -> str:
        """ARM/seed-N."""
        return f"{self.arm}/seed-{self.seed}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A checked experiment. The options of every job are complete and valid."""

    name: str
    run: Path
    processes: int
    ask: bool  # whether every arm answers the questions of start.questions
    start: Config  # the common options; its model is the base
    arms: dict[str, Arm]  # in the order of the file, then those of sweeps
    named: tuple[str, ...]  # arms of the file
    jobs: tuple[Job, ...]
    curves: tuple[Curve, ...]  # whose points are (value, arm)
    claims: tuple[Claim, ...]
    post: tuple[Stage, ...] = ()  # post-training of every arm and the base, after they are measured

    def of(self, arm: str) -> list[Job]:
        """An arm's jobs, by seed."""
        return [job for job in self.jobs if job.arm == arm]


def label(curve: Curve, value: Any, arm: str) -> str:
    """The name in the table of a point of a sweep: NAME=VALUE, also where the arm has a name of its own."""
    return arm if arm.startswith(f"{curve.name}=") else f"{curve.name}={value}"


def read(path: str | Path, overrides: dict[str, Any]) -> Experiment:
    """Read an experiment file (a path, or the name of a shipped one).

    `overrides` may set config, run, seeds, processes and ask; its other options hold for every arm.

    Raises:
        UserError: unknown file, invalid TOML, an unknown key, invalid options, a budget, sweep or claim about an
            unknown arm.
    """
    file, where = find(path), f"experiment {str(path)!r}"
    values = read_toml(file)
    if "arms" not in values:
        raise UserError(f"{where}: names no arms, so it is no experiment file (docs/comparing.md)")
    own = {name: overrides[name] for name in ("config", "run", "seeds", "processes", "ask") if name in overrides}
    if "seeds" in own:
        own["seeds"] = _as_list(own["seeds"])
    rest = {name: value for name, value in overrides.items() if name not in own}
    try:
        given = TypeAdapter(_File).validate_json(as_json(values | own))
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error)}") from None
    options = merge(given.options, rest)
    if "seed" in options or "overwrite" in options:
        raise UserError(f"{where}: options cannot set seed (see seeds) or overwrite")
    if len(set(given.seeds)) < len(given.seeds):
        raise UserError(f"{where}: seeds = {given.seeds}: names a seed twice")
    name = file.stem + (f"-{Path(given.config).stem}" if "config" in own else "")
    run = Path(given.run or f"runs/{name}")
    start = from_dict(merge(merge(to_dict(load(given.config)), options), {"run": str(run / BASE)}))
    if start.model.init != "pretrained":
        raise UserError(f"{where}: arms take the same start, so model.init must be pretrained")
    if not start.evaluate.path:
        raise UserError(f"{where}: evaluate.path = '': set the held-out text that all arms are measured on")
    arms, curves = _expand(given, start)
    _check_budgets(arms)
    _check_claims(arms, given.claims)
    jobs = [_job(arm, seed, arms[arm], start, run) for arm in arms for seed in _seeds(arm, arms[arm].seeds, given)]
    return Experiment(
        name=name, run=run, processes=given.processes, ask=given.ask, start=start, arms=arms,
        named=tuple(given.arms), jobs=_ordered(jobs), curves=curves, claims=tuple(given.claims),
        post=tuple(map(read_stage, given.post)),
    )  # fmt: skip


def _as_list(value: Any) -> Any:
    """`3` and `0,1,2`, as typed on a command line, as lists; anything else unchanged."""
    if isinstance(value, str) and all(part.strip().isdecimal() for part in value.split(",")):
        return [int(part) for part in value.split(",")]
    return [value] if isinstance(value, int) else value


def _seeds(name: str, own: list[int] | None, given: _File) -> list[int]:
    """The experiment's seeds that an arm or a sweep uses."""
    seeds = given.seeds if own is None else [seed for seed in given.seeds if seed in own]
    if not seeds:
        raise UserError(f"{name}: its seeds, {own}, are none of the experiment's, {given.seeds}")
    return seeds


def _expand(given: _File, start: Config) -> tuple[dict[str, Arm], tuple[Curve, ...]]:
    """All arms, including those of sweeps, and each sweep's points."""
    arms, curves = dict(given.arms), []
    for name, sweep in given.sweeps.items():
        owner = given.arms.get(sweep.arm)
        if owner is None:
            raise UserError(f"sweeps.{name}.arm = {sweep.arm!r}: there is no such arm")
        section, _, option = sweep.option.partition(".")
        seeds = owner.seeds if sweep.seeds is None else sweep.seeds
        values = merge(to_dict(_config(sweep.arm, start, owner.options)), {section: {}})  # refuses what is no section
        own = values[section].get(option)
        points = []
        for value in sweep.values:
            point = f"{name}={value}".replace("/", "-")
            if point in arms:
                raise UserError(f"sweeps.{name}: two arms would have the name {point!r}")
            if value != own:
                more = merge(owner.options, {section: {option: value}})
                arms[point] = Arm(options=more, budget=owner.budget, seeds=seeds)
            points.append((value, sweep.arm if value == own else point))
        shared = _seeds(f"sweeps.{name}", seeds, given)
        curves.append(Curve(name=name, option=sweep.option, points=points, seeds=shared, published=sweep.published))
    return arms, tuple(curves)


def _check_budgets(arms: dict[str, Arm]) -> None:
    if BASE in arms:
        raise UserError(f"arms.{BASE}: the base is always included; choose another name")
    for name, arm in arms.items():
        for kind, other in arm.budget.items():
            if other not in arms or other == name or arms[other].budget:
                raise UserError(f"arms.{name}.budget.{kind} = {other!r}: must be another arm that has no budget itself")
        if len(arm.budget) > 1:
            raise UserError(f"arms.{name}.budget: takes tokens or flops, not both")


def _check_claims(arms: dict[str, Arm], claims: list[Claim]) -> None:
    for number, claim in enumerate(claims):
        where = f"claims.{number}"
        for other in [claim.arm, *claim.above, *claim.not_above, *claim.equals]:
            if other not in arms and other != BASE:
                raise UserError(f"{where}: there is no arm {other!r}")
        if BASE in (claim.arm, *claim.equals) and claim.equals:
            raise UserError(f"{where}: the base was not trained, so no arm equals it")
        kinds = [claim.above, claim.not_above, claim.equals, claim.at_most is not None]
        if sum(map(bool, kinds)) != 1 or bool(claim.equals) == bool(claim.metrics):
            raise UserError(f"{where}: takes one of above, not_above, equals, at_most; and metrics unless equals")
        if (claim.against and not claim.above) or (claim.margin and not (claim.above or claim.not_above)):
            raise UserError(f"{where}: against belongs to above; margin to above and not_above")
        for metric in filter(None, [*claim.metrics, claim.against]):
            if "/" not in metric or metric.rpartition("/")[2] not in METRICS:
                raise UserError(f"{where}: {metric!r} is no GROUP/METRIC of docs/metrics.md")


def _config(name: str, start: Config, options: dict[str, Any], fixed: dict[str, Any] | None = None) -> Config:
    """An arm's config. An arm cannot change what makes it comparable to the others."""
    for section in _FIXED:
        if section in options:
            raise UserError(f"arms.{name}: cannot set {section}, which all arms share")
    try:
        config = from_dict(merge(merge(to_dict(start), options), fixed or {}))
    except UserError as error:
        raise UserError(f"arms.{name}: {error}") from None
    for option in ("window", "min_tokens"):
        if getattr(config.corpus, option) != getattr(start.corpus, option):
            raise UserError(f"arms.{name}: cannot set corpus.{option}, which cuts the held-out text of all arms")
    return config


def _job(name: str, seed: int, arm: Arm, start: Config, run: Path) -> Job:
    """Its run does not evaluate: the experiment measures arms after training."""
    fixed: dict[str, Any] = {"seed": seed, "run": str(run / name / f"seed-{seed}"), "evaluate": {"path": ""}}
    if arm.budget and "steps" not in arm.options.get("train", {}):
        fixed["train"] = {"steps": UNBOUNDED}
    needs = next((f"{other}/seed-{seed}" for other in arm.budget.values()), None)
    return Job(arm=name, seed=seed, config=_config(name, start, arm.options, fixed), needs=needs)


def _ordered(jobs: list[Job]) -> tuple[Job, ...]:
    """By seed, so that a stopped experiment has complete seeds; jobs with a budget after the jobs they follow."""
    names = {job.name for job in jobs}
    for job in jobs:
        if job.needs is not None and job.needs not in names:
            raise UserError(f"arms.{job.arm}: its budget follows {job.needs}, which is not trained with that seed")
    return tuple(sorted(jobs, key=lambda job: (job.seed, job.needs is not None)))
