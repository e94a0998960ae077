"""Estimates a run's memory, FLOPs, time and cost before it starts, and how it scales. Imports no torch."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from forethought.config import Config, UserError, from_dict, merge, to_dict
from forethought.flops import Shape
from forethought.memory import Bytes, Layout, chunk_tokens, fits, largest_that, memory, offloaded
from forethought.tools.plan.job import Job, Options, job
from forethought.tools.plan.job import shipped_shape as shipped_shape
from forethought.tools.plan.timing import ASSUMPTIONS, Lengths, Scale, Step, lengths_of_run, lognormal, simulate, step

_LORA_RANK = 16  # of the adapters that `adapters` proposes


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change, on top of those before it."""

    what: str
    costs: str
    saved: float  # bytes of the peak
    peak: float  # bytes, after this change and all before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The estimates of a run."""

    job: Job
    memory: dict[str, Bytes]  # in every layout
    step: Step
    changes: list[Change]  # that make it fit
    adapters: Change | None  # where it does not fit: training adapters instead
    largest: dict[str, int] | None
    faster: float | None  # seconds of a step at the largest rollout_batch that fits
    lengths: Lengths | None = None
    weak: tuple[Scale, ...] = ()  # the same positions per GPU
    strong: tuple[Scale, ...] = ()  # the step's positions divided among the GPUs

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return fits(self.job)

    @property
    def hours(self) -> float:
        """Of all steps, without evaluation."""
        return self.step.seconds * self.steps / 3600

    @property
    def steps(self) -> int:
        """Of the run: train.steps, or as many as its budget of tokens or FLOPs lasts."""
        train, step = self.job.config.train, self.step
        budgets = ((train.tokens, step.text), (train.flops, step.flops))
        return min([train.steps, *(math.ceil(budget / each) for budget, each in budgets if budget)])

    @property
    def dollars(self) -> float:
        """Of all GPUs; 0 where no price is known."""
        return self.hours * self.job.gpus * self.job.machine.price


def plan(config: Config, shape: Shape, options: Options | None = None) -> Plan:
    """Plan a run of a config with a model of a shape. Raises UserError."""
    options = options or Options()
    one = job(config, shape, options)
    if options.lengths and not options.simulate:
        raise UserError("--lengths: is for --simulate")
    layouts: list[Layout] = ["ddp"] if one.shape.adapter else ["ddp", "zero1"]
    jobs = [replace(one, layout="one", gpus=1), *(replace(one, layout=name) for name in layouts)]
    most = largest(one)
    result = Plan(
        job=one,
        memory={each.layout: memory(each) for each in jobs},
        step=step(one),
        changes=advice(one),
        adapters=adapters(one),
        largest=most,
        faster=step(one.with_option("train", rollout_batch=most["rollout_batch"])).seconds if most else None,
    )
    if not options.simulate:
        return result
    if options.lengths:
        lengths = lengths_of_run(options.lengths, config.method.group)
    else:
        lengths = lognormal(config.method.thought_length, config.seed, options.length)
    weak, strong = (tuple(simulate(one, lengths, config.seed, kind)) for kind in (True, False))
    return replace(result, lengths=lengths, weak=weak, strong=strong)


def as_dict(result: Plan) -> dict[str, Any]:
    """All figures, for a JSON file: bytes, FLOPs, seconds, tokens."""
    one, config, step, steps = result.job, result.job.config, result.step, result.steps
    counts = {"flops": step.flops, "text_tokens": step.text, "thought_tokens": step.thought}
    found = {
        "estimates": True,
        "model": config.model.path,
        "precision": config.model.precision,
        "parameters": one.shape.parameters,
        "trained": one.trainable,
        "gpus": one.gpus,
        "layout": one.layout,
        "P": one.prefix,
        "L": one.length,
        "G": config.method.group,
        "K": config.method.positions,
        "batch": config.train.batch,
        "rollout_batch": config.train.rollout_batch,
        "tokens_per_chunk": chunk_tokens(one),
        "steps": steps,
        "machine": asdict(one.machine),
        "memory": {name: {**asdict(parts), "peak": parts.peak} for name, parts in result.memory.items()},
        "host_memory": sum(offloaded(one).values()),
        "usable": one.machine.usable,
        "fits": result.fits,
        "changes": [asdict(change) for change in result.changes],
        "adapters": result.adapters and asdict(result.adapters),
        "largest": result.largest,
        "step": {"seconds": step.seconds, **counts, "phases": {phase.name: asdict(phase) for phase in step.phases}},
        "total": {
            **{name: count * steps for name, count in counts.items()},
            "t_flop_tokens": step.t_flop * steps,
            "hours": result.hours,
            "gpu_hours": result.hours * one.gpus,
            "dollars": result.dollars if one.machine.price else None,
        },
    }
    if result.lengths is not None:
        found["simulation"] = {
            "lengths": result.lengths.source,
            "assumptions": list(ASSUMPTIONS),
            "growing": [asdict(row) for row in result.weak],
            "divided": [asdict(row) for row in result.strong],
        }
    return found


def write(result: Plan, file: str) -> None:
    """Write all figures as JSON, where a file is named. Raises UserError."""
    try:
        if file:
            Path(file).write_text(json.dumps(as_dict(result), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file}: cannot be written: {error.strerror}") from None


def advice(job: Job) -> list[Change]:
    """Changes that make a run fit, mildest first; empty where it fits. Changes that save nothing are left out."""
    changes: list[Change] = []
    for what, costs, candidates in _CHANGES:
        before = memory(job).peak
        if before <= job.machine.usable:
            break
        known = [*candidates(job)] or [(None, job)]
        value, changed = next((one for one in known if fits(one[1])), known[-1])
        peak = memory(changed).peak
        if peak < before * 0.999:
            changes.append(Change(what=what.format(value), costs=costs, saved=before - peak, peak=peak))
            job = changed
    return changes


def adapters(job: Job) -> Change | None:
    """Training adapters only, and what else must change with it; None where the run fits or has adapters already."""
    if job.shape.adapter or not job.shape.linears or fits(job):
        return None
    options = from_dict(merge(to_dict(job.config), {"lora": {"r": _LORA_RANK}, "parallel": {"shard": "none"}}))
    layout = "ddp" if job.layout == "zero1" else job.layout
    other = replace(job, config=options, shape=job.shape.adapted(options.lora), layout=layout)
    more = advice(other)
    peak = more[-1].peak if more else memory(other).peak
    what = " ".join([f"--lora.r {_LORA_RANK}", *(change.what for change in more)])
    return Change(what=what, costs="only adapters are trained", saved=memory(job).peak - peak, peak=peak)


def largest(job: Job) -> dict[str, int] | None:
    """The largest train.rollout_batch and train.batch (positions of a step, all GPUs) that fit, one at a time.

    None where not even the smallest of both fits.
    """
    per_gpu = job.gpus * job.config.method.positions

    def with_rows(n: int) -> Job:
        batch = max(job.config.train.batch, n * per_gpu)  # enough windows to decode together
        return job.with_option("train", rollout_batch=n * job.thoughts_per_window, batch=batch)

    rows = largest_that(lambda n: fits(with_rows(n)))
    batch = largest_that(lambda n: fits(job.with_option("train", batch=n * per_gpu)))
    return {"rollout_batch": rows * job.thoughts_per_window, "batch": batch * per_gpu} if rows and batch else None


_Candidates = Iterable[tuple[object, Job]]  # values of a change, mildest first, each with the changed job


def _set(section: str, option: str, values: Callable[[Job], Iterable[object]]) -> Callable[[Job], _Candidates]:
    """Candidates that set an option of the config to each of some values."""
    return lambda job: ((value, job.with_option(section, **{option: value})) for value in values(job))


def _without_teacher(job: Job) -> list[int]:
    return [0] * (job.config.shift_invariant and not job.config.method.distillation)


def _shorter_thoughts(job: Job) -> Iterator[int]:
    return _halved(job.config.method.thought_length, max(64, 2 * job.config.method.min_thought_length))


def _halved(value: int, least: int) -> Iterator[int]:
    while value > least:
        value = max(value // 2, least)
        yield value


def _fewer_rows(job: Job) -> list[int]:
    """The most rows that fit beside the smallest chunks, or one window's."""
    window = job.thoughts_per_window
    small = job.with_option("update", tokens_per_chunk=min(chunk_tokens(job), job.between + job.longest_row))
    most = largest_that(lambda n: fits(small.with_option("train", rollout_batch=n * window)), 2**12)
    return [min(max(most, 1) * window, job.decode_rows)]


def _shorter_windows(job: Job) -> _Candidates:
    for window in _halved(job.config.corpus.window, 128):
        longest = min(job.max_prefix, window - job.config.method.horizon)
        yield window, replace(job.with_option("corpus", window=window), max_prefix=longest)


def _sharded(job: Job) -> _Candidates:
    """Adapters do not profit, since each GPU has all frozen weights."""
    return [(job.gpus, replace(job, layout="zero1"))] if job.layout == "ddp" and not job.shape.adapter else []


def _more_gpus(job: Job) -> _Candidates:
    """Sharded, twice as many until it fits; none where 1,024 do not."""
    more = (replace(job, gpus=job.gpus * 2**k, layout="zero1") for k in range(1, 11))
    return ((one.gpus, one) for one in more if one.gpus < 2048 and not job.shape.adapter and fits(one))


def _can_offload(job: Job) -> list[bool]:
    refused = "update.offload" in job.config.method.entry.excluded
    return [True] * (not refused and job.config.model.decoding != "cuda_graphs_compiled")


_CHANGES: tuple[tuple[str, str, Callable[[Job], _Candidates]], ...] = (
    ("--train.rollout_batch {}", "slower decoding", _set("train", "rollout_batch", _fewer_rows)),
    (
        "--update.tokens_per_chunk {}", "a slower update",  # down to one thought
        _set("update", "tokens_per_chunk", lambda job: _halved(chunk_tokens(job), job.between + job.longest_row)),
    ),
    ("--update.offload {}", "idle state leaves and returns every step", _set("update", "offload", _can_offload)),
    ("--layout zero1 on {} GPUs", "weights are sent once more a step", _sharded),
    (
        "--update.checkpointing {}", "layers are recomputed in the update",
        _set("update", "checkpointing", lambda job: [True]),
    ),
    ("--method.kl_weight {}", "no KL penalty", _set("method", "kl_weight", lambda job: [0])),
    (
        "--method.teacher_every {}", "the gain is not logged; the update stays the same",
        _set("method", "teacher_every", _without_teacher),
    ),
    (
        "--gradients {}", "gradients are rounded (not an option of train yet)",
        lambda job: [("bf16", replace(job, gradient_bytes=2))],
    ),
    ("--gpus {} --layout zero1", "more GPUs", _more_gpus),
    (
        "--method.thought_length {}", "shorter thoughts",
        _set("method", "thought_length", _shorter_thoughts),
    ),
    ("--corpus.window {}", "shorter documents", _shorter_windows),
)  # fmt: skip
