"""Bytes on one GPU by part, and the sizes of batches that fit: arithmetic on a config and a model's shape, no torch.

The parts are those of this package's own engine and update: tests/tools/plan/test_plan_memory.py compares them with
measured peaks on a CPU. What only a GPU does (CUDA graphs, fused norms) is arithmetic.
"""

import math
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from forethought.config import Config, registry
from forethought.flops import MAX_LOGITS, PREPACK_MIN_WEIGHTS, SavedBytes, Shape, automatic_chunk, mamba_saved

Layout = Literal["one", "ddp", "zero1"]
"""How the model is distributed over the GPUs.

- one: one process
- ddp: a full replica on each GPU; gradients are all-reduced once a step
- zero1: fp32 weights, optimizer state and teacher are sharded; each GPU keeps full gradients until the step's one
  reduce-scatter, and full compute weights, all-gathered once a step
"""
GIB = 2**30
MOST_DOCUMENTS = 32
"""Documents in the buffers of CUDA graphs, or as many as a step's thoughts fill."""
SCANS = "Mamba scans without mamba_ssm"
_PREPACKED, _COMPUTE, _GRAPH_BUFFERS = "prepacked weights", "compute weights", "CUDA-graph buffers"
_SAMPLED_TOKEN = 29  # bytes of a sampled token: noise, tokens and log-probabilities, and their copies
_SAMPLED_LOGIT = {4: 28, 2: 26}  # bytes of a logit while a token is sampled, by compute precision
_GRAPH_LOGIT = 48  # the same in CUDA graphs, which keep their buffers, for as many rows, half as many, and so on
_GRAPH_LOOK = 32  # tokens that CUDA graphs may run on before the host looks (forethought.rollout.cuda_graphs)
_SCAN_PEAK = 1.4  # temporary tensors of a scan add two fifths
_CHARACTERS = 4  # of a prompt, per token
_UNDERESTIMATE = 1.06  # peaks on one H100 over those computed here, at most (benchmarks/plan.py)
_CPU_DECODE = 2 * GIB  # of what decodes at once on a CPU where train.rollout_batch is 0
_PIECE = 256  # update.tokens_per_chunk is chosen in such steps, from one of them
_MOST_TOKENS = 2**16  # up to so many


J = TypeVar("J", bound="Setup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU or the CPU."""

    name: str
    memory: float  # bytes

    @property
    def usable(self) -> float:
        """Bytes available to tensors: 6 % headroom for fragmentation, and 1 GiB of a GPU for context and libraries."""
        return 0.94 * self.memory - (0 if self.name == "cpu" else GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A run on one kind of device: all that its memory depends on. Lengths are in tokens."""

    config: Config
    shape: Shape
    machine: Device
    gpus: int = 1
    layout: Layout = "one"
    max_prefix: int  # prefix of the longest document
    opening: int = 1
    closing: int = 1
    gradient_bytes: int = 4  # per parameter

    @property
    def template(self) -> int:
        """Tokens of the template before a context, at four characters per token: no tokenizer is loaded."""
        return math.ceil(len(self.config.method.prompt.partition("{context}")[0]) / _CHARACTERS)

    @property
    def between(self) -> int:
        """Tokens between a prefix and a thought: the rest of the template, the opening delimiter."""
        return math.ceil(len(self.config.method.prompt.partition("{context}")[2]) / _CHARACTERS) + self.opening

    @property
    def bridge_length(self) -> int:
        """Tokens between a thought and the text: the closing delimiter and what method.repeat_context repeats."""
        return self.closing + self.config.method.repeat_context

    @property
    def prediction(self) -> int:
        """Tokens of the prediction written after each thought (RPT)."""
        return self.config.method.prediction_length if self.config.method.entry.writes else 0

    @property
    def max_new_tokens(self) -> int:
        """The longest thought with its prediction."""
        return self.config.method.thought_length + self.prediction

    @property
    def longest_row(self) -> int:
        """Tokens that the update reads after the opening delimiter, at most: with a prediction term, to the targets."""
        after = self.bridge_length + self.config.method.horizon if self.config.method.prediction_weight else 0
        return self.max_new_tokens + after

    @property
    def trainable(self) -> int:
        """Parameters with gradients: all of them, or those of adapters."""
        return self.shape.adapter or self.shape.parameters

    @property
    def local_trainable(self) -> float:
        """Of these, those whose fp32 weights and moments are on each GPU."""
        return self.trainable / (self.gpus if self.layout == "zero1" else 1)

    @property
    def teacher(self) -> bool:
        """Whether there is a teacher."""
        return self.config.method.entry.teacher and self.config.method.teacher_every > 0

    @property
    def entropies(self) -> bool:
        """Whether the policy or its frozen start chooses positions by entropy; other proxies' shapes are unknown."""
        entry = registry.entry("position_policy", self.config.method.policy)
        return entry.proxy and self.config.method.proxy in ("", "policy")

    @property
    def offloads(self) -> bool:
        """Whether what is idle while thoughts are sampled is in host memory then."""
        return self.config.update.offload and self.machine.name != "cpu"

    @property
    def shared(self) -> bool:
        """Whether a document is read once for all its thoughts."""
        return self.config.model.prefix == "shared"

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in compute precision: a weight, a cached key."""
        return 2 if self.config.model.precision == "bf16" else 4

    @property
    def windows(self) -> int:
        """Windows of a step, on all GPUs."""
        return self.config.train.batch // self.config.method.positions

    @property
    def local_windows(self) -> int:
        """Windows of a step on the GPU with the most."""
        return math.ceil(self.windows / self.gpus)

    @property
    def thoughts_per_window(self) -> int:
        """Thoughts of all positions of a window."""
        return self.config.method.positions * self.config.method.group

    @property
    def local_thoughts(self) -> int:
        """Thoughts of a step on the GPU with the most."""
        return self.local_windows * self.thoughts_per_window

    @property
    def decode_windows(self) -> int:
        """Windows whose thoughts are decoded together."""
        return min(max(1, self.config.train.rows // self.thoughts_per_window), self.local_windows)

    @property
    def decode_documents(self) -> int:
        """Documents in memory at once, in training or in an evaluation, which has fewer thoughts in each."""
        held_out, rows = self.config.evaluate, self.config.train.rows
        at_once = min(max(1, rows // held_out.thoughts), held_out.documents) if held_out.path else 0
        if uses_cuda_graphs(self):
            at_once = min(at_once, MOST_DOCUMENTS)
        return max(self.decode_windows, at_once)

    @property
    def decode_rows(self) -> int:
        """Thoughts that are decoded together."""
        return self.decode_windows * self.thoughts_per_window

    def with_option(self: J, section: str, **changes: object) -> J:
        """The same with some options of a section of its config changed."""
        part = replace(getattr(self.config, section), **changes)
        return replace(self, config=replace(self.config, **{section: part}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """Bytes by part. The peak is the sum of the held parts and of the largest phase."""

    held: dict[str, float]
    decode: dict[str, float]
    score: dict[str, float]
    update: dict[str, float]

    @property
    def phases(self) -> dict[str, float]:
        """Bytes that each phase adds to the held parts."""
        return {name: sum(getattr(self, name).values()) for name in ("decode", "score", "update")}

    @property
    def peak(self) -> float:
        """The most at any time."""
        return sum(self.held.values()) + max(self.phases.values())


def memory(job: Setup) -> Bytes:
    """Bytes on the GPU with the most work. With update.offload, what is idle while decoding counts only after it."""
    held, idle = _held(job), offloaded(job)
    buffers = {_GRAPH_BUFFERS: held[_GRAPH_BUFFERS]} if job.offloads and _GRAPH_BUFFERS in held else {}
    held = {part: size for part, size in held.items() if part not in idle and part not in buffers}
    return Bytes(held=held, decode=buffers | _decode(job), score=idle | _score(job), update=idle | _update(job))


def offloaded(job: Setup) -> dict[str, float]:
    """What update.offload moves to host memory while thoughts are sampled (forethought.models.offload)."""
    held, kinds = _held(job), ["Adam", "teacher"] if job.offloads else []
    if kinds and _COMPUTE in held:
        kinds += ["weights", "adapters"]
    if kinds and job.config.method.kl_weight:  # a proxy without it is not moved
        kinds += ["KL"]
    return {part: size for part, size in held.items() if part.startswith(tuple(kinds)) and size}


def fits(job: Setup) -> bool:
    """Whether the peak fits the usable memory of the machine."""
    return memory(job).peak <= job.machine.usable


def chunk_tokens(job: Setup) -> int:
    """Tokens in one forward and backward pass, as in `forethought.models.logprobs.chunk_tokens`."""
    shape, memory = job.shape, None if job.machine.name == "cpu" else job.machine.memory
    automatic = automatic_chunk(shape.layers, shape.hidden, shape.intermediate, job.compute_bytes, memory)
    return job.config.update.tokens_per_chunk or automatic


def chunk_windows(job: Setup) -> int:
    """Windows that are read at once: as many as fit in a chunk, or one."""
    return min(max(1, chunk_tokens(job) // (job.max_prefix + 1)), job.local_windows)


def uses_cuda_graphs(job: Setup) -> bool:
    """Whether thoughts are decoded in CUDA graphs: on a GPU; Mamba and experts if asked to (cuda_graphs.py)."""
    decoding = job.config.model.decoding
    eager = decoding in ("eager", "cpp") or job.config.method.entry.writes
    asked = decoding == "cuda_graphs" or not (job.shape.mamba or job.shape.experts)
    return job.machine.name != "cpu" and asked and job.shared and not eager


def saved_bytes(job: Setup, rows: int, width: int) -> tuple[float, float]:
    """Bytes that a pass over `rows` rows of `width` tokens saves for its backward pass: without scans, of scans."""
    total, scans = job.shape.saved * width, SavedBytes()
    for mixer in job.shape.mamba:
        tokens, scanned = mamba_saved(mixer)
        total += tokens * width
        scans += scanned * (-(-width // mixer.chunk) * mixer.chunk)
    if job.compute_bytes == 4:
        return float(rows * total.fp32), float(rows * scans.fp32)
    return float(rows * (total.bf16 if job.machine.name == "cpu" else total.fused)), float(rows * scans.bf16)


def cache_numbers(shape: Shape) -> tuple[int, int]:
    """Numbers in the keys and values of one token, and in the Mamba states of one row, over all layers.

    Of layers with a sliding window too, whose oldest tokens transformers drops.
    """
    keys = sum(2 * one.kv_heads * one.head_dim for one in shape.attention)
    return keys, sum(one.inner * one.state + one.channels * one.kernel for one in shape.mamba)


def _held(job: Setup) -> dict[str, float]:
    part, adapter, method = job.local_trainable, job.shape.adapter, job.config.method
    frozen = method.kl_weight > 0 or (job.entropies and not method.proxy)  # one copy of the start for both
    held = {
        "adapters, fp32" if adapter else "weights, fp32": 4.0 * part,
        "Adam moments, fp32": 8.0 * part,
        "teacher (EMA), fp32": 4.0 * part * job.teacher,
        "KL reference or proxy, fp32": 4.0 * job.trainable * frozen,
        "sampled tokens and noise": float(_SAMPLED_TOKEN * job.local_thoughts * job.max_new_tokens),
    }
    if job.compute_bytes == 2 or job.layout == "zero1" or adapter:
        held[_COMPUTE] = float(job.compute_bytes * (job.shape.parameters + adapter))
    if uses_cuda_graphs(job):
        held[_GRAPH_BUFFERS] = sum(_caches(job)) + float(_GRAPH_LOGIT * job.decode_rows * job.shape.vocab)
    return held


def _caches(job: Setup) -> tuple[float, float]:
    """Bytes of the caches of the documents and of the thoughts that are decoded together."""
    rows, documents, positions = job.decode_rows, job.decode_documents, job.config.method.positions
    capacity = job.between + job.max_new_tokens + job.bridge_length + job.config.method.horizon
    capacity += _GRAPH_LOOK if uses_cuda_graphs(job) else 0
    (keys, states), size = cache_numbers(job.shape), 4 if _decodes_in_cpp(job) else job.compute_bytes
    copies = documents if job.shared else rows
    prefix = copies * (job.max_prefix + job.template) * keys * size + 4.0 * states * positions * documents * job.shared
    return prefix, rows * (capacity * keys * size + 4.0 * states)


def _decode(job: Setup) -> dict[str, float]:
    shape, rows, documents = job.shape, job.decode_rows, job.decode_documents
    prefix, suffix = _caches(job)
    prefill = documents * (job.max_prefix + job.template) * _one_layer(job)
    if uses_cuda_graphs(job):  # documents are read into a cache of their own, then copied to the buffers
        return {"prefill": prefix + prefill + 4.0 * rows * cache_numbers(job.shape)[1]}  # a capture copies the states
    prefetched = job.local_windows > job.decode_windows  # the next documents are read before the last ones are freed
    width = job.max_prefix + job.template + job.between + job.max_new_tokens
    scores = 16 * max((one.heads for one in shape.attention), default=0) * rows * width
    sampling = _SAMPLED_LOGIT[job.compute_bytes] * rows * shape.vocab + scores
    parts = {
        "documents' KV cache and states": (1 + prefetched) * prefix,
        "thoughts' KV cache and states": suffix,
        "prefill or sampling": float(max(prefill - suffix * (not prefetched), sampling)),
    }
    linear, model = shape.matmul_weights + shape.vocab * shape.hidden, job.config.model
    large = model.precision == "fp32" and model.decoding != "eager" and linear >= PREPACK_MIN_WEIGHTS
    if _decodes_in_cpp(job) or (job.machine.name == "cpu" and large):
        parts[_PREPACKED] = (2.0 if job.config.samples_in_bf16 else 4.0) * linear
    if _decodes_in_cpp(job):  # of the newest documents only
        parts["prepacked KV cache"] = prefix
    return parts


def _decodes_in_cpp(job: Setup) -> bool:
    """Whether C++ was requested; `auto` also takes it where the model's family and a compiler allow."""
    config = job.config
    return job.machine.name == "cpu" and (config.model.decoding == "cpp" or config.rollout.precision == "bf16")


def _score(job: Setup) -> dict[str, float]:
    """The teacher reads as many windows at once as fit in a chunk, with the logits of the targets; a proxy with all."""
    if not job.teacher and not job.entropies:
        return {}
    windows = chunk_windows(job)
    targets = job.max_prefix if job.entropies else job.config.method.positions * job.config.method.horizon
    logits = min(windows * targets, 4096) * job.shape.vocab
    name = "teacher or proxy forward pass" if job.entropies else "teacher forward pass"
    parts = {name: float(windows * job.max_prefix * _one_layer(job) + 12 * logits)}
    if soft := _soft_targets(job):
        parts["soft targets"] = 2 * soft  # in pieces and whole
    if job.teacher and job.layout == "zero1":  # the teacher's weights replace them
        parts["policy weights, set aside"] = float(job.compute_bytes * job.shape.parameters)
    return parts


def _update(job: Setup) -> dict[str, float]:
    """One chunk of thoughts, on top of documents that were read with gradients."""
    shape, method, size = job.shape, job.config.method, job.compute_bytes
    on_cpu, checkpointing = job.machine.name == "cpu", job.config.update.checkpointing
    prefix, tokens = job.max_prefix + job.template, chunk_tokens(job)
    keys, states = cache_numbers(job.shape)
    documents, width = chunk_windows(job), job.between + job.longest_row + (0 if job.shared else prefix)
    rows = min(max(1, tokens // width), documents * job.thoughts_per_window)
    at_once = min(rows, max(1, MAX_LOGITS["cpu" if on_cpu else "cuda"] // (job.longest_row * shape.vocab)))
    # a logit: raw, masked, scaled by the temperature, normalized
    logits = (12 if size == 2 or method.temperature == 1 else 16) * at_once * job.longest_row * shape.vocab
    backward = 4.0 * rows * width * (2 * shape.intermediate + 4 * shape.hidden)
    thoughts, scans = saved_bytes(job, rows, width)
    if checkpointing:
        recomputed = max(_recomputed_layer(job, rows, width), _recomputed_layer(job, documents, prefix) * job.shared)
        backward += recomputed
        thoughts, scans = _layer_inputs(job, rows * width), 0.0
    parts = {
        "gradients": float(job.gradient_bytes * job.trainable),
        "thoughts' activations": thoughts + 8.0 * states * rows * job.shared,
        "logits or backward buffers": float(max(logits, backward)),
    }
    if job.shared:
        used = 1 - 1 / shape.layers  # of the last layer only keys, values and states are used
        document, scanned = saved_bytes(job, documents, prefix)
        if checkpointing:
            document, scanned = _layer_inputs(job, documents * prefix) + size * documents * prefix * keys, 0.0
        parts["documents' activations"], scans = used * document, scans + used * scanned
        if rows < documents * job.thoughts_per_window:  # several chunks accumulate them
            cached = documents * (prefix * keys + method.positions * states)
            parts["gradients of documents' caches"] = float(size * cached)
        if not on_cpu:  # fused kernels take 16-bit numbers and no sliding windows
            heads = sum(one.heads for one in shape.attention if size == 4 or one.window)
            scores = heads * rows * width * (prefix + width)
            parts["attention scores (no fused kernel)"] = float((10 if size == 2 else 8) * scores)
    if soft := _soft_targets(job):
        parts["soft targets"] = soft
    return parts | {SCANS: scans}


def _soft_targets(job: Setup) -> float:
    """Bytes of the targets of method.distillation: a distribution over the vocabulary for each one of a step."""
    method = job.config.method
    targets = job.local_windows * method.positions * method.horizon
    return 4.0 * targets * job.shape.vocab * (method.distillation > 0)


def _layer_inputs(job: Setup, tokens: int) -> float:
    """Bytes of the inputs of all layers, which is all that activation checkpointing keeps."""
    return float(job.compute_bytes * tokens * job.shape.hidden * job.shape.layers)


def _recomputed_layer(job: Setup, rows: int, width: int) -> float:
    """Bytes saved by the largest layer when it is recomputed. Layers without Mamba are taken as equal."""
    shape = replace(job.shape, mamba=())
    attention = saved_bytes(replace(job, shape=shape), rows, width)[0]
    mamba = [
        sum(saved_bytes(replace(job, shape=replace(shape, mamba=(mixer,))), rows, width)) - attention
        for mixer in set(job.shape.mamba)
    ]
    return attention / job.shape.layers + _SCAN_PEAK * max(mamba, default=0.0)


def _one_layer(job: Setup) -> float:
    """Bytes per token that a layer holds in a forward pass without gradients."""
    shape, half = job.shape, job.compute_bytes == 2
    inner = (4 if shape.adapter else 3) * shape.intermediate  # with an adapter's output
    plain = job.compute_bytes * (inner + 4 * shape.hidden) + 4 * shape.hidden * half
    mixers = [tokens + scanned for tokens, scanned in map(mamba_saved, shape.mamba)]
    return float(max([plain, *(_SCAN_PEAK * (one.bf16 if half else one.fp32) for one in mixers)]))


def sized(job: J) -> J:
    """The job with sizes in place of 0 in train.rollout_batch and update.tokens_per_chunk.

    On a GPU what fits: first thoughts, at most a step's, then tokens of a chunk. On a CPU what fits a fixed number of
    bytes, so that the same run has the same sizes again.
    """
    rows, tokens = job.config.train.rollout_batch, job.config.update.tokens_per_chunk
    window, on_gpu = job.thoughts_per_window, job.machine.name != "cpu"

    def at(windows: int, tokens: int) -> J:
        one = job.with_option("update", tokens_per_chunk=tokens)
        return one.with_option("train", rollout_batch=rows or windows * window)

    def holds(windows: int, tokens: int) -> bool:
        one = at(windows, tokens)
        if on_gpu:
            return _UNDERESTIMATE * memory(one).peak <= job.machine.usable
        return sum(size for part, size in _decode(one).items() if part != _PREPACKED) <= _CPU_DECODE

    chunk = chunk_tokens(job)
    while on_gpu and not tokens and chunk > _PIECE and not holds(1, chunk):
        chunk = max(chunk // 2, _PIECE)
    most = max(job.local_windows, job.config.train.rows // window, 1)
    windows = largest_that(lambda count: holds(count, chunk), most) or 1
    if on_gpu and not tokens:
        chunk = _PIECE * largest_that(lambda count: holds(windows, _PIECE * count), _MOST_TOKENS // _PIECE) or chunk
    return at(windows, chunk)


def largest_that(holds: Callable[[int], bool], limit: int = 2**20) -> int:
    """The largest n up to a limit for which a property holds, by bisection; 0 where it does not hold for 1."""
    return bisect(range(1, limit + 1), False, key=lambda n: not holds(n))
