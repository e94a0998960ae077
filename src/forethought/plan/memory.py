"""Bytes on one GPU by part: what is held throughout, and what decoding, scoring and the update add while they last.

The parts are those of this package's own engine and update, so they hold for what it does, not for what could be done:
tests/test_plan_memory.py compares them with measured peaks.
"""

from dataclasses import dataclass, replace

from forethought.plan.job import Job, Layout
from forethought.shape import Kept, mixer_kept

LOGITS = 2**26  # logits that the update holds at once (forethought.scoring)
CPU_CHUNK = 2**30  # bytes that update.tokens_per_chunk = 0 aims at on a CPU; on a GPU an eighth of its memory
FUSED = ("cpu",)  # machines on which attention over a shared prefix keeps no scores (forethought.prefix.attention)
SCANS = "Mamba's scans, without its kernels"
_THOUGHTS = 29  # bytes of a thought's token while it is sampled: noise, tokens and log-probabilities, and their copies
_CACHED = {"fp32": (4.0, 4.0), "bf16": (4.0, 3.0)}  # bytes of a number in a document's cache, in a thought's
_SAMPLING = {"fp32": 28, "bf16": 26}  # bytes of a logit from which a token is drawn, float64 sums included


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """Bytes by part. Totals are the held parts plus the largest phase."""

    held: dict[str, float]
    decode: dict[str, float]
    score: dict[str, float]
    update: dict[str, float]

    @property
    def phases(self) -> dict[str, float]:
        """What each phase adds to what is held."""
        return {name: sum(getattr(self, name).values()) for name in ("decode", "score", "update")}

    @property
    def peak(self) -> float:
        """The most at any moment."""
        return sum(self.held.values()) + max(self.phases.values())


def memory(job: Job, layout: Layout | None = None) -> Bytes:
    """Bytes on the GPU that has most to do; `layout` in place of the job's own."""
    layout = layout or job.layout
    if layout == "one":
        job = replace(job, gpus=1)
    return Bytes(held=_held(job, layout), decode=_decode(job), score=_score(job), update=_update(job, layout))


def chunk_tokens(job: Job) -> int:
    """Tokens in one forward and backward pass: the rule of `forethought.scoring.chunk_tokens`."""
    if job.config.update.tokens_per_chunk:
        return job.config.update.tokens_per_chunk
    shape = job.shape
    budget = CPU_CHUNK if job.machine.name == "cpu" else job.machine.memory // 8
    return int(min(max(budget // (shape.layers * (14 * shape.hidden + 5 * shape.intermediate) * 4), 256), 2**16))


def _held(job: Job, layout: Layout) -> dict[str, float]:
    count = job.shape.parameters
    part = count / job.gpus if layout == "fsdp2" else count
    held = {
        "weights, fp32": 4.0 * part,
        "Adam's two moments, fp32": 8.0 * part,
        "gradients": float(job.gradient * count),
        "teacher (EMA), fp32": 4.0 * part * job.teacher,
        "KL reference, fp32": 4.0 * part * (job.config.method.kl_weight > 0),
        "thoughts and their noise": float(_THOUGHTS * job.rows_here * job.limit),
    }
    if layout == "fsdp2":
        held["weights gathered for compute"] = float((2 if job.config.model.precision == "bf16" else 4) * count)
    return held


def _decode(job: Job) -> dict[str, float]:
    shape, rows, documents = job.shape, job.rows_at_once, job.windows_at_once
    precision = job.config.model.precision
    prefix, room = job.longest + job.template, job.behind + job.limit + job.closing + job.config.method.horizon
    whole, own = _CACHED[precision]
    keys, states = cache_numbers(job)
    more = 2 if job.windows_here > documents else 1  # while the next documents join
    copies = documents if job.shared else rows
    scores = max((one.heads for one in shape.attention), default=0) * rows * (prefix + room) * 16
    reading = documents * prefix * _one_layer(job)
    return {
        "documents' keys, values and states": more * copies * prefix * keys * whole
        + 4.0 * states * job.config.method.positions * documents * job.shared,
        "thoughts' keys, values and states": rows * (room * keys * own + 4.0 * states),
        "reading, sampling": float(max(reading, _SAMPLING[precision] * rows * shape.vocab + scores)),
    }


def _score(job: Job) -> dict[str, float]:
    """The teacher reads as many windows at once as fit a chunk; its logits are those of the targets."""
    if not job.teacher:
        return {}
    windows = min(max(1, chunk_tokens(job) // (job.longest + 1)), job.windows_here)
    logits = windows * job.config.method.positions * job.config.method.horizon * job.shape.vocab
    return {
        "reading windows": float(windows * job.longest * _one_layer(job) + 12 * min(logits, 4096 * job.shape.vocab))
    }


def _update(job: Job, layout: Layout) -> dict[str, float]:
    """While a chunk of thoughts stands over documents that were read with gradients."""
    shape, method, precision = job.shape, job.config.method, job.config.model.precision
    half = precision == "bf16"
    prefix, tokens = job.longest + job.template, chunk_tokens(job)
    keys, states = cache_numbers(job)
    documents = min(max(1, tokens // (job.longest + 1)), job.windows_here)
    width = job.behind + job.limit + (0 if job.shared else prefix)
    rows = min(max(1, tokens // width), documents * job.rows_of_window)
    logits = min(rows, max(1, LOGITS // (job.limit * shape.vocab))) * job.limit * shape.vocab
    backward = 4 * rows * width * (2 * shape.intermediate + 4 * shape.hidden)
    copies = 12 if half or method.temperature == 1 else 16  # bytes of a logit: as it is, allowed, scaled, normalised
    thought, scan = kept(job, rows, width)
    parts = {
        "thoughts' activations": thought + 8.0 * states * rows * job.shared,
        "logits, or gradients on their way": float(max(copies * logits, backward)),
    }
    used = 1 - 1 / shape.layers  # of a document's last layer only keys and states are used, the rest is forgotten
    if half and layout != "fsdp2":  # each pass keeps the bf16 copies that autocast makes of its weights, the head's too
        parts["weights' bf16 copies"] = 2.0 * (shape.multiplied * (1 + used * job.shared) + shape.hidden * shape.vocab)
    if job.shared:
        document, more = kept(job, documents, prefix)
        parts["documents' activations"], scan = used * document, scan + used * more
        several = rows < documents * job.rows_of_window
        cached = documents * (prefix * keys + method.positions * states)
        parts["documents' keys and their gradients"] = 4.0 * cached * several + 6.0 * documents * prefix * keys * half
        if job.machine.name not in FUSED:
            heads = sum(one.heads for one in shape.attention)
            parts["attention's scores (plain products)"] = float(
                (10 if half else 8) * heads * rows * width * (prefix + width)
            )
    return parts | {SCANS: scan}


def kept(job: Job, rows: int, width: int) -> tuple[float, float]:
    """Bytes that a pass over rows of so many tokens leaves behind for its backward pass: scans apart, and scans."""
    half = job.config.model.precision == "bf16"
    total, scans = job.shape.kept * width, Kept()
    for one in job.shape.mamba:
        tokens, scanned = mixer_kept(one)
        total += tokens * width
        scans += scanned * (-(-width // one.chunk) * one.chunk)
    return (float(rows * total.bf16), float(rows * scans.bf16)) if half else (rows * total.fp32, rows * scans.fp32)


def cache_numbers(job: Job) -> tuple[int, int]:
    """Keys and values of one token, states of one row: how many numbers, over all layers."""
    keys = sum(2 * one.kv_heads * one.head_dim for one in job.shape.attention)
    return keys, sum(one.inner * one.state + one.channels * one.kernel for one in job.shape.mamba)


def _one_layer(job: Job) -> float:
    """Bytes a token of what a layer holds while it reads without gradients; what passes in a scan adds two fifths."""
    shape, half = job.shape, job.config.model.precision == "bf16"
    plain = (8 if half else 12) * shape.intermediate + 16 * shape.hidden
    mixers = [tokens + scanned for tokens, scanned in map(mixer_kept, shape.mamba)]
    return float(max([plain, *(1.4 * (one.bf16 if half else one.fp32) for one in mixers)]))
