"""Estimates a run's memory, FLOPs, time and cost before it starts, and how it scales. Imports no torch."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forethought.config import Config, UserError
from forethought.flops import Shape
from forethought.tools.plan.job import MACHINES, Job, Layout, Machine, job, shipped_shape
from forethought.tools.plan.memory import Bytes, Change, adapters, advice, chunk_tokens, fits, largest, memory
from forethought.tools.plan.timing import ASSUMPTIONS, Lengths, Scale, Step, lengths_of_run, lognormal, simulate, step

__all__ = ["MACHINES", "OPTIONS", "Machine", "Plan", "as_dict", "plan", "shipped_shape", "words_of", "write"]

OPTIONS = {
    "--gpus": "N: GPUs to train on (1)",
    "--gpu": f"NAME: {', '.join(MACHINES)} or cpu (h100)",
    "--nodes_of": "N: GPUs per node (8)",
    "--layout": "one, ddp or zero1: how the model is distributed over the GPUs (ddp on several)",
    "--steps": "N: train.steps",
    "--prefix": "TOKENS: before the last position of a document (P; half of corpus.window, with K > 1 all of it)",
    "--document": "TOKENS: read by the teacher of a document (its prefix)",
    "--length": "TOKENS: mean length of a thought (L; method.thought_length)",
    "--gradients": "fp32 or bf16 (fp32)",
    "--ceilings": "FILE: measurements of the machine: benchmarks/step.py --json FILE, or one object",
    "--price": "DOLLARS: per GPU hour",
    "--json": "FILE: write all figures there",
    "--simulate": "also simulate the step on 1 to 1,024 GPUs, with thoughts of unequal lengths",
    "--lengths": "RUN: sample these lengths from a run's thoughts.jsonl (a lognormal)",
}


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
        if option == "--steps":
            rest += ["--train.steps", value]
        elif option in OPTIONS:
            own[option[2:]] = value
        else:
            rest += [word, value] if equals or value else [word]
    return words[0], own, rest


def plan(config: Config, shape: Shape, options: dict[str, str] | None = None) -> Plan:
    """Plan a run of a config with a model of a shape; `options` as `words_of` returns them. Raises UserError."""
    options = options or {}
    one = job(config, shape, options)
    if "lengths" in options and "simulate" not in options:
        raise UserError("--lengths: is for --simulate")
    layouts: list[Layout] = ["one", "ddp"] if one.shape.adapter else ["one", "ddp", "zero1"]
    most = largest(one)
    faster = None if most is None else one.with_option("train", rollout_batch=most["rollout_batch"])
    result = Plan(
        job=one,
        memory={layout: memory(one, layout) for layout in layouts},
        step=step(one),
        changes=advice(one),
        adapters=adapters(one),
        largest=most,
        faster=None if faster is None else step(faster).seconds,
    )
    if "simulate" not in options:
        return result
    if "lengths" in options:
        lengths = lengths_of_run(options["lengths"], config.method.group)
    else:
        mean = one.length if "length" in options else None
        lengths = lognormal(config.method.thought_length, config.seed, mean)
    weak, strong = (tuple(simulate(one, lengths, config.seed, kind)) for kind in (True, False))
    return dataclasses.replace(result, lengths=lengths, weak=weak, strong=strong)


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


def write(result: Plan, file: str | None) -> None:
    """Write all figures as JSON, where a file is named. Raises UserError."""
    if file is None:
        return
    try:
        Path(file).write_text(json.dumps(as_dict(result), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file}: cannot be written: {error.strerror}") from None
