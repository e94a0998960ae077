"""FLOPs, tokens and estimated seconds of a step by phase, and how they scale over GPUs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from forethought.config import UserError
from forethought.flops import Flops, decode_flops, forward_flops, rlp_step, t_flop
from forethought.memory import cache_numbers, chunk_tokens, chunk_windows, offloaded, uses_cuda_graphs
from forethought.run.folder import read_jsonl
from forethought.tools.plan.job import Job

KERNELS = {"fp32": 57, "bf16": 39}  # per layer of Qwen3 and decoded token; bf16 with fused norms
OTHER_KERNELS = 80  # per decoded token outside the layers: embedding, head, sampling, bookkeeping
_OPTIMIZER = 40  # bytes per parameter: Adam reads 16 and writes 12, clipping reads 8 and writes 4
_EMA = 12  # bytes per parameter: two fp32 numbers read, one written
_COPY = 6  # bytes per parameter: fp32 read, bf16 written

RANKS = tuple(2**k for k in range(11))
SIGMA, MEDIAN = 0.6, 0.25  # of the built-in lognormal of thought lengths; the median is a share of the maximum
ROUNDS = 8  # simulated steps for each number of GPUs
ASSUMPTIONS = (
    "each GPU samples all thoughts of its documents, and waits for the slowest GPU once a step",
    "documents are balanced by length, longest first; lengths of thoughts are unknown then, and are not rebalanced",
    "a GPU decodes full batches until its thoughts run out, for at least as many steps as its longest thought",
    "prefixes are uniform from one token to the longest, unless --prefix is given",
    "all GPUs are equally fast; reading text, checkpoints and evaluation take no time",
    "rings at the stated share of the interconnect, one latency per hop, no overlap with computation",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of a step."""

    name: str
    flops: float  # on all GPUs
    seconds: float  # on the GPU with the most work
    bound: str  # what limits it: matmul, memory, kernels, links, or nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step."""

    phases: tuple[Phase, ...]
    text: int  # tokens of text, on all GPUs
    thought: int  # tokens of thoughts
    t_flop: int  # the paper's measure, of one step

    @property
    def flops(self) -> float:
        """On all GPUs."""
        return sum(phase.flops for phase in self.phases)

    @property
    def seconds(self) -> float:
        """On the GPU with the most work."""
        return sum(phase.seconds for phase in self.phases)


def step(job: Job) -> Step:
    """A typical step, with its windows evenly distributed."""
    method, train = job.config.method, job.config.train
    flops = rlp_step(job.shape, job.window_work())
    text = job.windows * job.document
    return Step(
        phases=(
            _forward(job, "prefill", flops.prefill, -(-job.local_windows // job.decode_windows)),
            _decoding(job, flops),
            _scoring(job, flops),
            _updating(job, flops),
            _streaming(job, "optimizer", _OPTIMIZER * method.inner_steps),
            _streaming(job, "ema", _EMA * job.teacher * (not method.freeze_teacher)),
            _streaming(job, "bf16 copy", _COPY * (job.compute_bytes == 2)),
            sync(job),
            _phase("offload", 2 * sum(offloaded(job).values()) / job.machine.host, "links"),  # no overlap is assumed
        ),
        text=text,
        thought=round(job.windows * job.thoughts_per_window * job.length),
        t_flop=t_flop(method.group, method.thought_length, train.batch, 1, text),
    )


def decode_steps(job: Job, tokens: float, longest: float) -> float:
    """Steps to decode so many tokens, with finished thoughts replaced by others; at least the longest thought."""
    return max(longest, tokens / job.decode_rows)


def decode_step(job: Job, rows: int | float) -> tuple[float, str]:
    """Seconds of one step of so many rows in the middle of their thoughts, and what bounds them.

    Bound by memory or by FLOPs, whichever takes longer, and by the rate at which kernels can be launched.
    """
    shape, machine, precision = job.shape, job.machine, job.config.model.precision
    keys, states = cache_numbers(job.shape)
    half_way = job.between + (job.length + job.prediction) / 2
    prefix, size = job.prefix + job.template, job.compute_bytes
    documents = rows / job.thoughts_per_window if job.shared else rows
    weights = size * (shape.matmul_weights + shape.hidden * shape.vocab)
    moved = weights + size * keys * (documents * prefix + rows * half_way) + 8.0 * states * rows
    flops = rows * decode_flops(shape, [(1, round(prefix + half_way))])
    launch = machine.replay if uses_cuda_graphs(job) else machine.launch
    times = {
        "memory": moved / machine.copy / machine.decode_share,
        "matmul": flops / machine.matmul(precision) / machine.decode_share,
        "kernels": (shape.layers * KERNELS[precision] + OTHER_KERNELS) * launch,
    }
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


def ring(job: Job, nbytes: int | float, passes: int) -> float:
    """Seconds of a ring over the GPUs: an all-reduce takes two passes, an all-gather or a reduce-scatter one.

    Within a node the ring uses its links; across nodes all GPUs of a node send at once, each over its own card.
    """
    gpus, machine, link = job.gpus, job.machine, job.machine.inside
    if gpus == 1 or not nbytes:
        return 0.0
    if gpus > job.gpus_per_node:
        link = min(link, job.gpus_per_node * machine.across)
    return passes * (gpus - 1) * (nbytes / gpus / (link * machine.link_share) + machine.latency)


def sync(job: Job) -> Phase:
    """All-reduced gradients; with zero1 reduce-scattered, and the weights all-gathered. No overlap is assumed."""
    gradients, weights = job.gradient_bytes * job.trainable, job.compute_bytes * job.shape.parameters
    seconds = ring(job, gradients, 1) + ring(job, weights, 1) if job.layout == "zero1" else ring(job, gradients, 2)
    return _phase("sync", seconds, "links")


def _phase(name: str, seconds: float, bound: str, flops: int = 0) -> Phase:
    return Phase(name=name, flops=float(flops), seconds=seconds, bound=bound if seconds else "")


def _rate(job: Job, update: bool = False) -> float:
    """FLOP/s of phases that process many tokens in parallel."""
    share = job.machine.update_share if update else job.machine.read_share
    return share * job.machine.matmul(job.config.model.precision)


def _decoding(job: Job, flops: Flops) -> Phase:
    longest = job.length + job.prediction
    tokens = job.local_thoughts * longest
    steps = decode_steps(job, tokens, longest)
    seconds, bound = decode_step(job, tokens / steps)
    return _phase("decode", steps * seconds, bound, flops.decode * job.windows)


def _scoring(job: Job, flops: Flops) -> Phase:
    """In bf16 the teacher's weights replace the policy's in the compute copy, and are swapped back."""
    passes = -(-job.local_windows // chunk_windows(job))
    forward = _forward(job, "score", flops.teacher + flops.score + flops.proxy, passes)
    swap = _streaming(job, "", 2 * _COPY * job.teacher * (job.compute_bytes == 2))
    return replace(forward, seconds=forward.seconds + swap.seconds)


def _updating(job: Job, flops: Flops) -> Phase:
    """The documents of each microbatch, and its thoughts chunk by chunk.

    Checkpointing adds a forward pass to the three that the FLOPs count, or to two with frozen weights.
    """
    documents = chunk_windows(job)
    after = job.longest_row - job.config.method.thought_length
    width = job.between + round(job.length) + after + (0 if job.shared else job.prefix + job.template)
    chunks = -(-documents * job.thoughts_per_window // max(1, chunk_tokens(job) // width))
    passes = -(-job.local_windows // documents) * (chunks + job.shared)
    forward = _forward(job, "update", flops.training, 3 * passes)
    counted = 2 if job.shape.adapter else 3
    return replace(forward, seconds=forward.seconds * (1 + job.config.update.checkpointing / counted))


def _forward(job: Job, name: str, window_flops: int, passes: int) -> Phase:
    """A phase of few large products, in `passes` through the layers, each of which launches its kernels."""
    by_flops = window_flops * job.local_windows / _rate(job, name == "update")
    launches = KERNELS[job.config.model.precision] * job.shape.layers * passes * job.machine.launch
    seconds = max(by_flops, launches) if window_flops else 0.0
    return _phase(name, seconds, "matmul" if seconds == by_flops else "kernels", window_flops * job.windows)


def _streaming(job: Job, name: str, bytes_per_parameter: int) -> Phase:
    return _phase(name, bytes_per_parameter * job.local_trainable / job.machine.copy, "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths of thoughts to sample from, in tokens."""

    groups: np.ndarray  # (group, thought)
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The step on one number of GPUs; means over the rounds."""

    gpus: int
    positions: int  # of a step, on all GPUs
    seconds: float  # of a step
    work: float  # seconds that the mean GPU computes
    waits: float  # seconds that the mean GPU waits for the slowest
    sync: float  # seconds of communication
    efficiency: float  # positions per second and GPU, relative to one GPU


def lengths_of_run(run: str, group: int) -> Lengths:
    """The lengths in a run's thoughts.jsonl, position by position. Raises UserError."""
    file = Path(run) / "thoughts.jsonl" if Path(run).is_dir() else Path(run)
    try:
        rows = [row for _, row in read_jsonl(file, allow_truncated=True)]  # of a run that goes on, too
    except OSError as error:
        raise UserError(f"--lengths {run}: cannot be read: {error.strerror}") from None
    try:
        groups = [[int(thought["length"]) for thought in row["thoughts"]] for row in rows]
    except (ValueError, KeyError, TypeError):
        groups = []
    flat = [length for lengths in groups for length in lengths]
    if min(flat, default=0) < 1:
        raise UserError(f"--lengths {run}: {file.name} holds no thoughts with lengths")
    if {len(lengths) for lengths in groups} == {group}:
        return Lengths(groups=np.array(groups), source=f"{len(flat)} thoughts of {run}, sampled by group")
    return Lengths(groups=np.array(flat)[:, None], source=f"{len(flat)} thoughts of {run}, sampled one by one")


def lognormal(longest: int, seed: int, mean: float | None = None, count: int = 1 << 16) -> Lengths:
    """Lognormal lengths of the given mean (None: with the median MEDIAN * longest), truncated at `longest`."""
    median = max(1.0, MEDIAN * longest if mean is None else mean / math.exp(SIGMA**2 / 2))
    drawn = np.random.default_rng([seed, 1]).lognormal(math.log(median), SIGMA, count)
    source = f"lognormal: median {median:.0f}, sigma {SIGMA}, truncated at {longest}"
    return Lengths(groups=np.clip(np.rint(drawn), 1, longest).astype(int)[:, None], source=source)


def simulate(job: Job, lengths: Lengths, seed: int, weak: bool, ranks: tuple[int, ...] = RANKS) -> list[Scale]:
    """One row for each number of GPUs; the same seed gives the same rows.

    `weak` scaling keeps the positions per GPU; strong scaling divides the step's positions, while each GPU has a
    document.
    """
    job = replace(job, length=float(np.minimum(lengths.groups, job.config.method.thought_length).mean()))
    costs, base, rows = _fitted_costs(job), 0.0, []
    for gpus in ranks:
        windows = job.local_windows * gpus if weak else job.windows
        if windows < gpus:
            break
        generator = np.random.default_rng([seed, gpus])
        drawn = [_rank_seconds(job, costs, lengths, gpus, windows, generator) for _ in range(ROUNDS)]
        work, slowest = float(np.mean(drawn)), float(np.mean([seconds.max() for seconds in drawn]))
        phases = {phase.name: phase.seconds for phase in step(replace(job, gpus=gpus)).phases}
        fixed, links = phases["optimizer"] + phases["ema"] + phases["offload"], phases["sync"]
        total, positions = slowest + links + fixed, windows * job.config.method.positions
        speed = positions / total / gpus
        base = base or speed
        rows.append(
            Scale(
                gpus=gpus, positions=positions, seconds=total, work=work + fixed, waits=slowest - work, sync=links,
                efficiency=speed / base,
            )
        )  # fmt: skip
    return rows


_Cost = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (tokens that are read, tokens before them) -> seconds


def _fitted_costs(job: Job) -> tuple[_Cost, _Cost]:
    """Seconds of one GPU for a document in prefill, scoring and update, and for a thought in the update.

    Quadratics through exact counts; with sliding windows and scans FLOPs are nearly, not quite, quadratic.
    """
    passes = 3 * job.config.method.inner_steps
    update, top, longest = passes / _rate(job, update=True), max(job.max_prefix, 4), max(job.max_new_tokens, 4)
    reading, after = (1 + job.teacher) / _rate(job) + update, job.longest_row - job.max_new_tokens

    def fitted(seconds: Callable[[int, int], float], tokens: int, before: tuple[int, ...]) -> _Cost:
        grid = np.array([(n, p) for n in (1, tokens // 2, tokens) for p in before])
        exact = [seconds(int(n), int(p)) for n, p in grid]
        factors = np.linalg.lstsq(_quadratic(*grid.T), np.array(exact), rcond=None)[0]
        return lambda n, p: _quadratic(n, p) @ factors

    return (
        fitted(lambda n, p: reading * forward_flops(job.shape, [(n, p)], 0), top, (0,)),
        fitted(lambda n, p: update * forward_flops(job.shape, [(n + after + job.between, p)], n), longest, (1, top)),
    )


def _quadratic(n: np.ndarray, before: np.ndarray) -> np.ndarray:
    return np.stack(np.broadcast_arrays(1.0, n, n * n, n * before), -1)


def _rank_seconds(
    job: Job, costs: tuple[_Cost, _Cost], lengths: Lengths, gpus: int, windows: int, generator: np.random.Generator
) -> np.ndarray:
    """Seconds of each GPU in one step."""
    positions, group = job.config.method.positions, job.config.method.group
    fixed = job.max_prefix == job.prefix
    last = np.full(windows, job.prefix) if fixed else generator.integers(1, job.max_prefix + 1, windows)
    owner = np.empty(windows, int)  # longest first, back and forth: equal counts, similar sums
    turn = np.arange(windows) % (2 * gpus)
    owner[np.argsort(-last, kind="stable")] = np.where(turn < gpus, turn, 2 * gpus - 1 - turn)
    drawn = (windows, positions, group if lengths.groups.shape[1] == 1 else 1)
    n = lengths.groups[generator.integers(0, len(lengths.groups), drawn)].reshape(windows, positions, -1)
    n = np.minimum(n, job.config.method.thought_length)
    before = job.template + np.rint(last[:, None] * (np.arange(positions) + 1) / positions)[..., None]
    read, update = costs
    seconds = np.bincount(owner, read(job.template + last, np.zeros(1)) + update(n, before).sum(axis=(1, 2)), gpus)
    tokens = np.bincount(owner, n.sum(axis=(1, 2)) + job.prediction * n[0].size, gpus)
    longest = np.zeros(gpus)
    np.maximum.at(longest, owner, n.max(axis=(1, 2)) + job.prediction)
    steps = np.array([decode_steps(job, *rank) for rank in zip(tokens, longest, strict=True)])
    rows, which = np.unique(np.rint(tokens / steps), return_inverse=True)
    return seconds + steps * np.array([decode_step(job, float(count))[0] for count in rows])[which]
