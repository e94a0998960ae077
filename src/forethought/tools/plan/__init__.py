"""Estimates a run's memory, FLOPs, time and cost before it starts, and how it scales. Imports no torch."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from forethought.config import Config, UserError
from forethought.flops import Shape
from forethought.tools.plan.job import MACHINES, Job, Layout, Machine, Options, job, shipped_shape
from forethought.tools.plan.memory import Bytes, Change, adapters, advice, chunk_tokens, fits, largest, memory
from forethought.tools.plan.timing import ASSUMPTIONS, Lengths, Scale, Step, lengths_of_run, lognormal, simulate, step

__all__ = [
    "MACHINES", "Machine", "Options", "Plan", "as_dict", "plan", "shipped_shape", "write",
]  # fmt: skip


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
        return self.step.seconds * self.job.config.train.steps / 3600

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
    one, config, step, steps = result.job, result.job.config, result.step, result.job.config.train.steps
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
        "usable": one.machine.usable,
        "fits": result.fits,
        "changes": [asdict(change) for change in result.changes],
        "adapters": result.adapters and asdict(result.adapters),
        "largest": result.largest,
        "step": {
            "seconds": step.seconds, "flops": step.flops, "text_tokens": step.text, "thought_tokens": step.thought,
            "phases": {phase.name: asdict(phase) for phase in step.phases},
        },
        "total": {
            "flops": step.flops * steps,
            "text_tokens": step.text * steps,
            "thought_tokens": step.thought * steps,
            "t_flop_tokens": step.t_flop,
            "hours": result.hours,
            "gpu_hours": result.hours * one.gpus,
            "dollars": result.dollars if one.machine.price else None,
        },
    }  # fmt: skip
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
