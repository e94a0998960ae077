"""A run's memory, FLOPs, time and cost before anything runs, and how it would scale. Estimates, without torch."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forethought.config import Config, UserError
from forethought.flops import Shape
from forethought.tools.plan.advice import Change, adapters, advice, fits, largest
from forethought.tools.plan.job import Job, Layout, job, shipped_shape, with_option
from forethought.tools.plan.machines import MACHINES, Machine
from forethought.tools.plan.memory import Bytes, chunk_tokens, memory
from forethought.tools.plan.seconds import Step, step
from forethought.tools.plan.simulate import ASSUMPTIONS, Lengths, Scale, lengths_of_run, lognormal, simulate

__all__ = ["MACHINES", "OPTIONS", "Machine", "Plan", "as_dict", "plan", "shipped_shape", "words_of", "write"]

LAYOUTS: tuple[Layout, ...] = ("one", "ddp", "fsdp2")
OPTIONS = {
    "--gpus": "N: GPUs to train on (1)",
    "--gpu": f"NAME: {', '.join(MACHINES)} or cpu (h100)",
    "--nodes_of": "N: GPUs of one node (8)",
    "--layout": "one, ddp or fsdp2: how the network lies on them (ddp on several)",
    "--steps": "N: train.steps",
    "--prefix": "TOKENS: ahead of the last position of a document (P; half of corpus.window, with K > 1 all of it)",
    "--document": "TOKENS: what is read of a document (its prefix)",
    "--length": "TOKENS: a thought's mean length (L; method.thought_length)",
    "--gradients": "fp32 or bf16 (fp32)",
    "--ceilings": "FILE: what was measured of the machine, by benchmarks/step.py --json FILE or as one object",
    "--price": "DOLLARS: for a GPU hour",
    "--json": "FILE: write all figures there",
    "--simulate": "also the step over 1 to 1,024 GPUs, with thoughts of unequal lengths",
    "--lengths": "RUN: draw them from a run's thoughts.jsonl (a lognormal)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would take."""

    job: Job
    memory: Bytes  # in the job's own layout
    layouts: dict[str, Bytes]  # in every layout
    step: Step
    changes: list[Change]  # what to change so that it fits
    adapters: Change | None  # or, where it does not fit: adapters alone, and nothing else changed
    largest: dict[str, int] | None
    faster: float | None  # seconds of a step at the largest rollout_batch that fits
    lengths: Lengths | None = None
    growing: tuple[Scale, ...] = ()  # as many positions on each GPU
    divided: tuple[Scale, ...] = ()  # the step's positions divided among the GPUs

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


def words_of(words: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
    """Config, the command's own options (without dashes), and words that override the config. Raises UserError."""
    if not words or words[0].startswith("--"):
        raise UserError("plan takes a config file, or the name of a shipped one such as qwen3-1.7b")
    own: dict[str, str] = {}
    rest: list[str] = []
    queue = list(words[1:])
    while queue:
        word, equals, value = queue.pop(0).partition("=")
        option = word.replace("-", "_").replace("__", "--", 1)
        if option == "--simulate":
            own["simulate"] = "yes"
            continue
        if not equals and queue and option.startswith("--"):
            value = queue.pop(0)
        elif not equals and option in OPTIONS:
            raise UserError(f"option {word} needs a value")
        if option not in OPTIONS:
            rest += [word, value] if equals or value else [word]
        elif option == "--steps":
            rest += ["--train.steps", value]
        else:
            own[option[2:]] = value
    return words[0], own, rest


def plan(config: Config, shape: Shape, options: dict[str, str] | None = None) -> Plan:
    """Plan a run of a config on a network of a shape; `options` as `words_of` returns them. Raises UserError."""
    options = options or {}
    one = job(config, shape, options)
    if "lengths" in options and "simulate" not in options:
        raise UserError("--lengths: is for --simulate")
    most = largest(one)
    result = Plan(
        job=one,
        memory=memory(one),
        layouts={layout: memory(one, layout) for layout in LAYOUTS[: 2 if one.shape.adapter else 3]},
        step=step(one),
        changes=advice(one),
        adapters=adapters(one),
        largest=most,
        faster=None if most is None else step(with_option(one, "train", rollout_batch=most["rollout_batch"])).seconds,
    )
    if "simulate" not in options:
        return result
    group = config.method.group
    lengths = lengths_of_run(options["lengths"], group) if "lengths" in options else None
    mean = one.length if "length" in options else None
    lengths = lengths or lognormal(config.method.thought_length, config.seed, mean)
    both = [tuple(simulate(one, lengths, config.seed, grow)) for grow in (True, False)]
    return dataclasses.replace(result, lengths=lengths, growing=both[0], divided=both[1])


def as_dict(result: Plan) -> dict[str, Any]:
    """All figures, for a JSON file: bytes, FLOPs, seconds, tokens."""
    one, config = result.job, result.job.config
    found: dict[str, Any] = {
        "estimates": True,
        "model": config.model.path,
        "precision": config.model.precision,
        "parameters": one.shape.parameters,
        "trained": one.trained,
        "gpus": one.gpus,
        "layout": one.layout,
        "P": one.prefix,
        "L": one.length,
        "G": config.method.group,
        "K": config.method.positions,
        "batch": config.train.batch,
        "rollout_batch": config.train.rollout_batch,
        "tokens_per_chunk": chunk_tokens(one),
        "steps": config.train.steps,
        "machine": dataclasses.asdict(one.machine),
        "memory": {name: _bytes(some) for name, some in result.layouts.items()},
        "usable": one.machine.usable,
        "fits": result.fits,
        "changes": [dataclasses.asdict(change) for change in result.changes],
        "adapters": None if result.adapters is None else dataclasses.asdict(result.adapters),
        "largest": result.largest,
        "step": {
            "seconds": result.step.seconds,
            "flops": result.step.flops,
            "text_tokens": result.step.text,
            "thought_tokens": result.step.thought,
            "phases": {phase.name: dataclasses.asdict(phase) for phase in result.step.phases},
        },
        "total": _total(result),
    }
    if result.lengths is not None:
        found["simulation"] = {
            "lengths": result.lengths.source,
            "assumptions": list(ASSUMPTIONS),
            "growing": [dataclasses.asdict(row) for row in result.growing],
            "divided": [dataclasses.asdict(row) for row in result.divided],
        }
    return found


def write(result: Plan, file: str | None) -> None:
    """Write all figures as JSON, where a file is named. Raises UserError."""
    if file is None:
        return
    try:
        Path(file).write_text(json.dumps(as_dict(result), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file}: cannot be written: {error.strerror}") from None


def _total(result: Plan) -> dict[str, Any]:
    """Of all steps."""
    steps = result.job.config.train.steps
    return {
        "flops": result.step.flops * steps,
        "text_tokens": result.step.text * steps,
        "thought_tokens": result.step.thought * steps,
        "t_flop_tokens": result.step.t_flop,
        "hours": result.hours,
        "gpu_hours": result.hours * result.job.gpus,
        "dollars": result.dollars if result.job.machine.price else None,
    }


def _bytes(some: Bytes) -> dict[str, Any]:
    return {**dataclasses.asdict(some), "peak": some.peak}
