"""FLOPs, tokens and expected seconds of a step by phase, from what a machine reaches. All of it is an estimate."""

from dataclasses import dataclass, replace

from forethought.flops import Flops, decode_flops, rlp_step, t_flop
from forethought.tools.plan.job import Job
from forethought.tools.plan.memory import ELEMENT, cache_numbers, captured, chunk_tokens

KERNELS = {"fp32": 57, "bf16": 39}  # of one layer of Qwen3's in one decoded token; bf16 with fused norms
ENDS = 80  # kernels of a decoded token outside the layers: embedding, head, sampling, bookkeeping
_OPTIMIZER = 40  # bytes a parameter: Adam reads 16 and writes 12, clipping reads 8 and writes 4
_EMA = 12  # bytes a parameter: two fp32 numbers read, one written
_COPY = 6  # bytes a parameter: fp32 read, bf16 written


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of a step."""

    name: str
    flops: float  # on all GPUs
    seconds: float  # on the GPU that has most to do
    bound: str  # what limits it: matmul, memory, kernels, links, or nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step."""

    phases: tuple[Phase, ...]
    text: int  # tokens of text, all GPUs
    thought: int  # tokens of thoughts
    t_flop: int  # the paper's measure, for all steps of the run

    @property
    def flops(self) -> float:
        """On all GPUs."""
        return sum(one.flops for one in self.phases)

    @property
    def seconds(self) -> float:
        """On the GPU that has most to do."""
        return sum(one.seconds for one in self.phases)


def step(job: Job) -> Step:
    """A typical step, its windows dealt evenly."""
    method, train = job.config.method, job.config.train
    one = rlp_step(job.shape, job.window_work())
    text = job.windows * job.document
    return Step(
        phases=(
            _reading(job, "prefill", one.prefill, -(-job.windows_here // job.windows_at_once)),
            decoding(job, one),
            _scoring(job, one),
            _updating(job, one),
            _streaming(job, "optimizer", _OPTIMIZER),
            _streaming(job, "ema", _EMA * job.teacher * (not method.freeze_teacher)),
            _streaming(job, "bf16 copy", _COPY * (job.config.model.precision == "bf16")),
            sync(job),
        ),
        text=text,
        thought=round(job.windows * job.rows_of_window * job.length),
        t_flop=t_flop(method.group, method.thought_length, train.batch, train.steps, train.steps * text),
    )


def decoding(job: Job, one: Flops) -> Phase:
    """Decoding: bound by memory or by FLOPs, whichever takes longer, and never faster than kernels can be started."""
    steps = decode_steps(job, job.rows_here * (job.length + job.written), job.length + job.written)
    seconds, bound = decode_step(job, job.rows_here * (job.length + job.written) / max(steps, 1))
    return Phase(name="decode", flops=float(one.decode * job.windows), seconds=steps * seconds, bound=bound)


def decode_steps(job: Job, tokens: float, longest: float) -> float:
    """Steps for so many tokens, where finished thoughts make room for others; no fewer than the longest thought."""
    return max(longest, tokens / job.rows_at_once)


def decode_step(job: Job, rows: int | float) -> tuple[float, str]:
    """Seconds of one step of so many rows in the middle of their thoughts, and what bounds them."""
    shape, precision = job.shape, job.config.model.precision
    keys, states = cache_numbers(job)
    half_way = job.behind + (job.length + job.written) / 2
    prefix = job.prefix + job.template
    number = ELEMENT[precision]
    documents = rows / job.rows_of_window if job.shared else rows
    weights = number * (shape.multiplied + shape.hidden * shape.vocab)
    moved = weights + number * keys * (documents * prefix + rows * half_way) + 8.0 * states * rows
    flops = rows * decode_flops(shape, [(1, round(prefix + half_way))])
    machine = job.machine
    times = {
        "memory": moved / machine.copy / machine.decode_share,
        "matmul": flops / machine.matmul(precision) / machine.decode_share,
        "kernels": (shape.layers * KERNELS[precision] + ENDS) * (machine.replay if captured(job) else machine.launch),
    }
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


def rate(job: Job, update: bool = False) -> float:
    """FLOP/s of phases that read many tokens at once."""
    share = job.machine.update_share if update else job.machine.read_share
    return share * job.machine.matmul(job.config.model.precision)


def ring(job: Job, nbytes: int | float, passes: int, gpus: int | None = None) -> float:
    """Seconds of a ring over the GPUs: an all-reduce passes the bytes around twice, a gather or a scatter once.

    Within a node the ring goes over its links; across nodes all GPUs of a node send at once, each over its own card.
    """
    gpus = gpus or job.gpus
    if gpus == 1 or not nbytes:
        return 0.0
    machine = job.machine
    link = machine.inside if gpus <= job.per_node else min(machine.inside, job.per_node * machine.across)
    link *= machine.link_share
    return passes * (gpus - 1) * (nbytes / gpus / link + machine.latency)


def sync(job: Job, gpus: int | None = None) -> Phase:
    """Gradients added up once a step; under FSDP2 in parts, and the weights gathered once. No overlap is assumed."""
    gradients = job.gradient * job.trained
    if job.layout == "fsdp2":
        weights = ELEMENT[job.config.model.precision] * job.shape.parameters
        seconds = ring(job, gradients, 1, gpus) + ring(job, weights, 1, gpus)
    else:
        seconds = ring(job, gradients, 2, gpus)
    return Phase(name="sync", flops=0.0, seconds=seconds, bound="links" if seconds else "")


def _scoring(job: Job, one: Flops) -> Phase:
    """The teacher's weights are copied to where the policy's compute in bf16, and back."""
    passes = -(-job.windows_here // max(1, chunk_tokens(job) // (job.longest + 1)))
    found = _reading(job, "score", one.teacher + one.score + one.proxy, passes)
    swap = _streaming(job, "", 2 * _COPY * job.teacher * (job.config.model.precision == "bf16"))
    return replace(found, seconds=found.seconds + swap.seconds)


def _updating(job: Job, one: Flops) -> Phase:
    """Checkpointing reads once more, where the step's FLOPs count three such passes, or two with frozen weights."""
    found = _reading(job, "update", one.training, 3 * _update_passes(job))
    counted = 2 if job.shape.adapter else 3
    return replace(found, seconds=found.seconds * (1 + job.config.update.checkpointing / counted))


def _reading(job: Job, name: str, window_flops: int, passes: int) -> Phase:
    """Phases of few large products; `passes` through the layers, each of which starts its kernels."""
    flops = float(window_flops * job.windows)
    by_flops = window_flops * job.windows_here / rate(job, name == "update")
    launches = KERNELS[job.config.model.precision] * job.shape.layers * passes * job.machine.launch
    slowest = max(by_flops, launches if flops else 0.0)
    return Phase(
        name=name,
        flops=flops,
        seconds=slowest,
        bound="" if not flops else "matmul" if slowest == by_flops else "kernels",
    )


def _streaming(job: Job, name: str, per_parameter: int) -> Phase:
    count = job.trained / (job.gpus if job.layout == "fsdp2" else 1)
    seconds = per_parameter * count / job.machine.copy
    seconds *= job.config.method.inner_steps if name == "optimizer" else 1
    return Phase(name=name, flops=0.0, seconds=seconds, bound="memory" if seconds else "")


def _update_passes(job: Job) -> int:
    """Forward passes: each piece's documents, and its thoughts chunk by chunk."""
    tokens = chunk_tokens(job)
    documents = min(max(1, tokens // (job.longest + 1)), job.windows_here)
    width = job.behind + round(job.length) + job.written + (0 if job.shared else job.prefix + job.template)
    chunks = -(-documents * job.rows_of_window // max(1, tokens // width))
    return -(-job.windows_here // documents) * (chunks + job.shared)
