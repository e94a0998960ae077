"""Bytes on one GPU by part: what is held throughout, and what decoding, scoring and the update add while they last.

The parts are those of this package's own engine and update, so they hold for what it does, not for what could be done:
tests/test_plan_memory.py compares them with measured peaks on a CPU. What only a GPU does (captured steps, fused norms)
is arithmetic.
"""

from dataclasses import dataclass, replace

from forethought.flops import Kept, mixer_kept
from forethought.tools.plan.job import Job, Layout

LOGITS = {"cpu": 2**26, "cuda": 2**28}  # logits that the update holds at once (forethought.models.logprobs)
CPU_CHUNK = 2**30  # bytes that update.tokens_per_chunk = 0 aims at on a CPU; on a GPU an eighth of its memory
SCANS = "Mamba's scans, without its kernels"
ELEMENT = {"fp32": 4, "bf16": 2}  # bytes of a number in compute precision, so of a weight and of a cached key
_THOUGHTS = 29  # bytes of a thought's token while it is sampled: noise, tokens and log-probabilities, and their copies
_SAMPLING = {"fp32": 28, "bf16": 26}  # bytes of a logit from which a token is drawn, float64 sums included
_CAPTURED = 48  # the same in captured steps, which keep what they need, for as many rows, half as many, and so on
ORDERED = (
    1_000_000  # weights of linear layers from which a CPU decodes over ordered copies (forethought.models.prepacked)
)
_LOOK = 32  # tokens that a captured step may run on before the host looks (forethought.rollout.cuda_graphs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """Bytes by part. The peak is the held parts and the largest phase."""

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
    job = replace(job, layout=layout, gpus=1 if layout == "one" else job.gpus)
    return Bytes(held=_held(job), decode=_decode(job), score=_score(job), update=_update(job))


def chunk_tokens(job: Job) -> int:
    """Tokens in one forward and backward pass: the rule of `forethought.models.logprobs.chunk_tokens`."""
    if job.config.update.tokens_per_chunk:
        return job.config.update.tokens_per_chunk
    shape = job.shape
    budget = CPU_CHUNK if job.machine.name == "cpu" else job.machine.memory // 8
    vectors = shape.layers * (14 * shape.hidden + 5 * shape.intermediate)
    return int(min(max(budget // (vectors * ELEMENT[job.config.model.precision]), 256), 2**16))


def captured(job: Job) -> bool:
    """Whether thoughts decode by captured steps: on a GPU, attention layers only (forethought.rollout.cuda_graphs)."""
    plain = job.config.model.decoding in ("eager", "cpp") or job.config.method.entry.writes
    return job.machine.name != "cpu" and not job.shape.mamba and job.shared and not plain


def _held(job: Job) -> dict[str, float]:
    precision = job.config.model.precision
    part = job.trained / job.gpus if job.layout == "fsdp2" else job.trained
    adapter = job.shape.adapter
    held = {
        "adapters, fp32" if adapter else "weights, fp32": 4.0 * part,
        "Adam's two moments, fp32": 8.0 * part,
        "teacher (EMA), fp32": 4.0 * part * job.teacher,
        "KL reference, fp32": 4.0 * part * (job.config.method.kl_weight > 0),
        "thoughts and their noise": float(_THOUGHTS * job.rows_here * job.limit),
    }
    if precision == "bf16" or job.layout == "fsdp2" or adapter:
        held["weights that compute"] = float(ELEMENT[precision] * (job.shape.parameters + adapter))
    if captured(job):
        held["decoding's buffers"] = sum(_caches(job)) + float(_CAPTURED * job.rows_at_once * job.shape.vocab)
    return held


def _caches(job: Job) -> tuple[float, float]:
    """Keys, values and states of the documents that decode at once, and of their thoughts."""
    rows, documents, places = job.rows_at_once, job.windows_at_once, job.config.method.positions
    room = job.behind + job.limit + job.closing + job.config.method.horizon + (_LOOK if captured(job) else 0)
    (keys, states), number = cache_numbers(job), ELEMENT[job.config.model.precision]
    copies = documents if job.shared else rows
    prefix = copies * (job.longest + job.template) * keys * number + 4.0 * states * places * documents * job.shared
    return prefix, rows * (room * keys * number + 4.0 * states)


def _decode(job: Job) -> dict[str, float]:
    shape, rows, documents = job.shape, job.rows_at_once, job.windows_at_once
    prefix, own = _caches(job)
    reading = documents * (job.longest + job.template) * _one_layer(job)
    if captured(job):  # documents are read into a cache of their own, then put into the buffers
        return {"documents being read": prefix + reading}
    several = job.windows_here > documents  # the next documents are read while those before are still there
    width = job.longest + job.template + job.behind + job.limit
    scores = 16 * max((one.heads for one in shape.attention), default=0) * rows * width
    sampling = _SAMPLING[job.config.model.precision] * rows * shape.vocab + scores
    parts = {
        "documents' keys, values and states": (1 + several) * prefix,
        "thoughts' keys, values and states": own,
        "reading, sampling": float(max(reading - own * (not several), sampling)),
    }
    linear, model = shape.multiplied + shape.vocab * shape.hidden, job.config.model
    if job.machine.name == "cpu" and model.precision == "fp32" and model.decoding != "eager":
        compiled = model.decoding == "cpp"
        if compiled or linear >= ORDERED:
            parts["weights in order"] = 4.0 * linear
        if compiled:  # of the newest documents only
            parts["documents in order"] = prefix
    return parts


def _score(job: Job) -> dict[str, float]:
    """The teacher reads as many windows at once as fit a chunk; its logits are those of the targets."""
    if not job.teacher:
        return {}
    windows = min(max(1, chunk_tokens(job) // (job.longest + 1)), job.windows_here)
    logits = min(windows * job.config.method.positions * job.config.method.horizon, 4096) * job.shape.vocab
    parts = {"reading windows": float(windows * job.longest * _one_layer(job) + 12 * logits)}
    if job.layout == "fsdp2":  # it stands in the place of the weights that compute
        parts["the policy's weights, aside"] = float(ELEMENT[job.config.model.precision] * job.shape.parameters)
    return parts


def _update(job: Job) -> dict[str, float]:
    """While a chunk of thoughts stands over documents that were read with gradients."""
    shape, method, precision = job.shape, job.config.method, job.config.model.precision
    half, on_cpu = precision == "bf16", job.machine.name == "cpu"
    prefix, tokens = job.longest + job.template, chunk_tokens(job)
    keys, states = cache_numbers(job)
    documents = min(max(1, tokens // (job.longest + 1)), job.windows_here)
    width = job.behind + job.limit + (0 if job.shared else prefix)
    rows = min(max(1, tokens // width), documents * job.rows_of_window)
    at_once = LOGITS["cpu" if on_cpu else "cuda"]
    logits = min(rows, max(1, at_once // (job.limit * shape.vocab))) * job.limit * shape.vocab
    backward = 4 * rows * width * (2 * shape.intermediate + 4 * shape.hidden)
    copies = 12 if half or method.temperature == 1 else 16  # bytes of a logit: as it is, allowed, scaled, normalised
    thought, scan = kept(job, rows, width)
    if job.config.update.checkpointing:
        thought, scan = _inputs(job, rows * width), 0.0
    parts = {
        "gradients": float(job.gradient * job.trained),
        "thoughts' activations": thought + 8.0 * states * rows * job.shared,
        "logits, or gradients on their way": float(max(copies * logits, backward)),
    }
    if job.shared:
        used = 1 - 1 / shape.layers  # of a document's last layer only keys and states are used, the rest is forgotten
        document, more = kept(job, documents, prefix)
        if job.config.update.checkpointing:
            document, more = _inputs(job, documents * prefix) + ELEMENT[precision] * documents * prefix * keys, 0.0
        parts["documents' activations"], scan = used * document, scan + used * more
        if rows < documents * job.rows_of_window:  # from the first chunk on
            cached = documents * (prefix * keys + method.positions * states)
            parts["gradients of documents' keys"] = float(ELEMENT[precision] * cached)
        if not on_cpu:  # fused kernels take 16-bit numbers, and no windows
            heads = sum(one.heads for one in shape.attention if not half or one.window)
            pairs = rows * width * (prefix + width)
            parts["attention's scores (no fused kernel)"] = float((10 if half else 8) * heads * pairs)
    if job.config.update.checkpointing:
        again = max(_again(job, rows, width), _again(job, documents, prefix) * job.shared)
        parts["logits, or gradients on their way"] = float(max(copies * logits, backward + again))
    return parts | {SCANS: scan}


def _inputs(job: Job, tokens: int) -> float:
    """Bytes of what goes into each layer, all that checkpointing keeps."""
    return float(ELEMENT[job.config.model.precision] * tokens * job.shape.hidden * job.shape.layers)


def _again(job: Job, rows: int, width: int) -> float:
    """Bytes that the largest layer leaves behind when it is computed again; layers without Mamba are taken as equal.

    What passes in a scan adds two fifths, as in reading.
    """
    one, mixers = replace(job.shape, mamba=()), set(job.shape.mamba)
    plain = kept(replace(job, shape=one), rows, width)[0]
    mixed = [sum(kept(replace(job, shape=replace(one, mamba=(mixer,))), rows, width)) - plain for mixer in mixers]
    return plain / job.shape.layers + 1.4 * max(mixed, default=0.0)


def kept(job: Job, rows: int, width: int) -> tuple[float, float]:
    """Bytes that a pass over rows of so many tokens leaves behind for its backward pass: scans apart, and scans."""
    half = job.config.model.precision == "bf16"
    total, scans = job.shape.kept * width, Kept()
    for one in job.shape.mamba:
        tokens, scanned = mixer_kept(one)
        total += tokens * width
        scans += scanned * (-(-width // one.chunk) * one.chunk)
    if not half:
        return float(rows * total.fp32), float(rows * scans.fp32)
    return float(rows * (total.bf16 if job.machine.name == "cpu" else total.fused)), float(rows * scans.bf16)


def cache_numbers(job: Job) -> tuple[int, int]:
    """Keys and values of one token, states of one row: how many numbers, over all layers."""
    keys = sum(2 * one.kv_heads * one.head_dim for one in job.shape.attention)
    return keys, sum(one.inner * one.state + one.channels * one.kernel for one in job.shape.mamba)


def _one_layer(job: Job) -> float:
    """Bytes a token of what a layer holds while it reads without gradients; what passes in a scan adds two fifths."""
    shape, half = job.shape, job.config.model.precision == "bf16"
    inner = (4 if shape.adapter else 3) * shape.intermediate  # an adapter's output
    plain = ELEMENT[job.config.model.precision] * (inner + 4 * shape.hidden) + 4 * shape.hidden * half
    mixers = [tokens + scanned for tokens, scanned in map(mixer_kept, shape.mamba)]
    return float(max([plain, *(1.4 * (one.bf16 if half else one.fp32) for one in mixers)]))
