"""The same step over many GPUs, with thoughts of unequal lengths: who waits for whom, and what the links take."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from forethought.config import UserError
from forethought.flops import forward_flops
from forethought.tools.plan.job import Job
from forethought.tools.plan.seconds import decode_step, decode_steps, rate, step, sync

RANKS = tuple(2**k for k in range(11))
SIGMA, MEDIAN = 0.6, 0.25  # of the built-in lognormal of thought lengths; the median is a share of the longest
ROUNDS = 8  # steps that are drawn for each number of GPUs

ASSUMPTIONS = (
    "one GPU of a step has all thoughts of its documents, and waits for the slowest once a step",
    "documents are dealt by length, heaviest first; thoughts' lengths are not known then and not dealt again",
    "a GPU decodes with full batches until its thoughts run out, and at least as long as its longest thought",
    "prefixes are spread evenly from one token to the longest, unless --prefix says otherwise",
    "all GPUs are equally fast; reading text, checkpoints and evaluation take no time",
    "rings at the stated share of the links, one latency a hop, no overlap with computing",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Groups of thought lengths to draw from, in tokens."""

    groups: np.ndarray  # (group, thought)
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One number of GPUs; means over the rounds."""

    gpus: int
    positions: int  # a step, on all GPUs
    seconds: float  # a step
    work: float  # seconds that the mean GPU computes
    waits: float  # seconds that the mean GPU waits for the slowest
    sync: float  # seconds of the links
    efficiency: float  # positions a second and GPU, next to one GPU's


def lengths_of_run(run: str, group: int) -> Lengths:
    """The measured lengths in a run's thoughts.jsonl, position by position. Raises UserError."""
    file = Path(run) / "thoughts.jsonl" if Path(run).is_dir() else Path(run)
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        groups = [[int(thought["length"]) for thought in row["thoughts"]] for row in rows]
    except OSError as error:
        raise UserError(f"--lengths {run}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--lengths {run}: {file.name} holds no thoughts with lengths") from None
    flat = [length for some in groups for length in some]
    if not flat or min(flat) < 1:
        raise UserError(f"--lengths {run}: {file.name} holds no thoughts with lengths")
    if len({len(some) for some in groups}) == 1 and len(groups[0]) == group:
        return Lengths(groups=np.array(groups), source=f"{len(flat)} thoughts of {run}, drawn in their groups")
    return Lengths(groups=np.array(flat)[:, None], source=f"{len(flat)} thoughts of {run}, drawn one by one")


def lognormal(longest: int, seed: int, mean: float | None = None, count: int = 1 << 16) -> Lengths:
    """Lengths whose logarithm is normal, of a mean (None: of the median above), cut off at the longest."""
    median = max(1.0, MEDIAN * longest if mean is None else mean / math.exp(SIGMA**2 / 2))
    drawn = np.random.default_rng([seed, 1]).lognormal(math.log(median), SIGMA, count)
    source = f"lognormal: median {median:.0f}, sigma {SIGMA}, cut off at {longest}"
    return Lengths(groups=np.clip(np.rint(drawn), 1, longest).astype(int)[:, None], source=source)


def simulate(job: Job, lengths: Lengths, seed: int, grow: bool, ranks: tuple[int, ...] = RANKS) -> list[Scale]:
    """One row for each number of GPUs.

    `grow`: as many positions a GPU as the job's (weak scaling); else the step's positions divided among them (strong
    scaling), as long as each GPU has a document. Seeded: the same seed gives the same rows.
    """
    job = replace(job, length=float(np.minimum(lengths.groups, job.config.method.thought_length).mean()))
    costs, base, rows = _Costs.of(job), 0.0, []
    for gpus in ranks:
        windows = job.windows_here * gpus if grow else job.windows
        if windows < gpus:
            break
        generator = np.random.default_rng([seed, gpus])
        drawn = [_ranks_seconds(job, costs, lengths, gpus, windows, generator) for _ in range(ROUNDS)]
        work, slowest = float(np.mean(drawn)), float(np.mean([some.max() for some in drawn]))
        links = sync(job, gpus).seconds
        total = slowest + links + costs.fixed(job, gpus)
        positions = windows * job.config.method.positions
        speed = positions / total / gpus
        base = base or speed
        rows.append(
            Scale(
                gpus=gpus,
                positions=positions,
                seconds=total,
                work=work + costs.fixed(job, gpus),
                waits=slowest - work,
                sync=links,
                efficiency=speed / base,
            )
        )
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """Seconds of one GPU as sums over its thoughts and documents: FLOPs are quadratic in the lengths."""

    document: np.ndarray  # of 1, prefix, prefix^2: prefill, score, the update's first pass
    thought: np.ndarray  # of 1, length, length^2, length * prefix: the update
    streams: float  # optimizer and teacher where one GPU holds all parameters

    @classmethod
    def of(cls, job: Job) -> "_Costs":
        """Fitted through exact counts; sliding windows and scans make them nearly, not quite, quadratic."""
        shape, passes = job.shape, 3 * job.config.method.inner_steps
        each = (1 + job.teacher) / rate(job) + passes / rate(job, update=True)  # seconds a FLOP of reading a document
        top, longest = max(job.longest, 4), max(job.limit, 4)
        places = np.array([1, top // 2, top])
        reading = [forward_flops(shape, [(int(n), 0)], 0) * each for n in places]
        document = np.linalg.solve(np.stack([places**0, places, places**2], 1).astype(float), np.array(reading, float))
        grid = [(n, p) for n in (1, longest // 2, longest) for p in (1, top)]
        terms = np.array([[1, n, n * n, n * p] for n, p in grid], float)
        update = [passes * forward_flops(shape, [(n + job.behind, p)], n) for n, p in grid]
        thought = np.linalg.lstsq(terms, np.array(update, float), rcond=None)[0]
        streams = sum(one.seconds for one in step(job).phases if one.name in ("optimizer", "ema"))
        streams *= job.gpus if job.layout == "fsdp2" else 1
        return cls(document=document, thought=thought / rate(job, update=True), streams=streams)

    def fixed(self, job: Job, gpus: int) -> float:
        """Seconds of a GPU whatever it sampled."""
        return self.streams / (gpus if job.layout == "fsdp2" else 1)


def _ranks_seconds(
    job: Job, costs: _Costs, lengths: Lengths, gpus: int, windows: int, generator: np.random.Generator
) -> np.ndarray:
    """Seconds of each GPU in one step."""
    places, group = job.config.method.positions, job.config.method.group
    fixed = job.longest == job.prefix
    last = np.full(windows, job.prefix) if fixed else generator.integers(1, job.longest + 1, windows)
    owner = np.empty(windows, int)  # heaviest first, to and fro: equal numbers, about equal sums
    turn = np.arange(windows) % (2 * gpus)
    owner[np.argsort(-last, kind="stable")] = np.where(turn < gpus, turn, 2 * gpus - 1 - turn)
    picked = generator.integers(0, len(lengths.groups), (windows, places, group if lengths.groups.shape[1] == 1 else 1))
    n = lengths.groups[picked].reshape(windows, places, -1)
    n = np.minimum(n, job.config.method.thought_length)
    before = job.template + np.rint(last[:, None] * (np.arange(places) + 1) / places)[..., None]
    read = costs.document @ np.stack([np.ones(windows), job.template + last, (job.template + last) ** 2])
    update = np.tensordot(costs.thought, np.stack([n**0, n, n**2, n * before]), 1).sum(axis=(1, 2))
    seconds = np.bincount(owner, read + update, gpus)
    tokens = np.bincount(owner, n.sum(axis=(1, 2)) + job.written * n[0].size, gpus)
    longest = np.zeros(gpus)
    np.maximum.at(longest, owner, n.max(axis=(1, 2)) + job.written)
    steps = np.array([decode_steps(job, *one) for one in zip(tokens, longest, strict=True)])
    rows, which = np.unique(np.rint(tokens / steps), return_inverse=True)
    return seconds + steps * np.array([decode_step(job, float(count))[0] for count in rows])[which]
