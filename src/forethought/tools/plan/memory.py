"""Bytes on one GPU by part, what fits, and what to change where a run does not.

The parts are those of this package's own engine and update: tests/tools/plan/test_plan_memory.py compares them with
measured peaks on a CPU. What only a GPU does (CUDA graphs, fused norms) is arithmetic.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from forethought.config import from_dict, merge, to_dict
from forethought.flops import MAX_LOGITS, PREPACK_MIN_WEIGHTS, SavedBytes, automatic_chunk, mamba_saved
from forethought.tools.plan.job import Job

SCANS = "Mamba scans without mamba_ssm"
_SAMPLED_TOKEN = 29  # bytes of a sampled token: noise, tokens and log-probabilities, and their copies
_SAMPLED_LOGIT = {4: 28, 2: 26}  # bytes of a logit while a token is sampled, by compute precision
_GRAPH_LOGIT = 48  # the same in CUDA graphs, which keep their buffers, for as many rows, half as many, and so on
_GRAPH_LOOK = 32  # tokens that CUDA graphs may run on before the host looks (forethought.rollout.cuda_graphs)
_SCAN_PEAK = 1.4  # temporary tensors of a scan add two fifths
_LORA_RANK = 16  # of the adapters that `adapters` proposes


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


def memory(job: Job) -> Bytes:
    """Bytes on the GPU with the most work."""
    return Bytes(held=_held(job), decode=_decode(job), score=_score(job), update=_update(job))


def fits(job: Job) -> bool:
    """Whether the peak fits the usable memory of the machine."""
    return memory(job).peak <= job.machine.usable


def chunk_tokens(job: Job) -> int:
    """Tokens in one forward and backward pass, as in `forethought.models.logprobs.chunk_tokens`."""
    shape, memory = job.shape, None if job.machine.name == "cpu" else job.machine.memory
    automatic = automatic_chunk(shape.layers, shape.hidden, shape.intermediate, job.compute_bytes, memory)
    return job.config.update.tokens_per_chunk or automatic


def chunk_windows(job: Job) -> int:
    """Windows that are read at once: as many as fit in a chunk, or one."""
    return min(max(1, chunk_tokens(job) // (job.max_prefix + 1)), job.local_windows)


def uses_cuda_graphs(job: Job) -> bool:
    """Whether thoughts are decoded in CUDA graphs: on a GPU, without Mamba (forethought.rollout.cuda_graphs)."""
    eager = job.config.model.decoding in ("eager", "cpp") or job.config.method.entry.writes
    return job.machine.name != "cpu" and not job.shape.mamba and job.shared and not eager


def saved_bytes(job: Job, rows: int, width: int) -> tuple[float, float]:
    """Bytes that a pass over `rows` rows of `width` tokens saves for its backward pass: without scans, of scans."""
    total, scans = job.shape.saved * width, SavedBytes()
    for mixer in job.shape.mamba:
        tokens, scanned = mamba_saved(mixer)
        total += tokens * width
        scans += scanned * (-(-width // mixer.chunk) * mixer.chunk)
    if job.compute_bytes == 4:
        return float(rows * total.fp32), float(rows * scans.fp32)
    return float(rows * (total.bf16 if job.machine.name == "cpu" else total.fused)), float(rows * scans.bf16)


def cache_numbers(job: Job) -> tuple[int, int]:
    """Numbers in the keys and values of one token, and in the Mamba states of one row, over all layers."""
    keys = sum(2 * one.kv_heads * one.head_dim for one in job.shape.attention)
    return keys, sum(one.inner * one.state + one.channels * one.kernel for one in job.shape.mamba)


def _held(job: Job) -> dict[str, float]:
    part, adapter = job.local_trainable, job.shape.adapter
    held = {
        "adapters, fp32" if adapter else "weights, fp32": 4.0 * part,
        "Adam moments, fp32": 8.0 * part,
        "teacher (EMA), fp32": 4.0 * part * job.teacher,
        "KL reference or proxy, fp32": 4.0 * job.trainable * job.frozen_start,
        "sampled tokens and noise": float(_SAMPLED_TOKEN * job.local_thoughts * job.max_new_tokens),
    }
    if job.compute_bytes == 2 or job.layout == "zero1" or adapter:
        held["compute weights"] = float(job.compute_bytes * (job.shape.parameters + adapter))
    if uses_cuda_graphs(job):
        held["CUDA-graph buffers"] = sum(_caches(job)) + float(_GRAPH_LOGIT * job.decode_rows * job.shape.vocab)
    return held


def _caches(job: Job) -> tuple[float, float]:
    """Bytes of the caches of the documents and of the thoughts that are decoded together."""
    rows, documents, positions = job.decode_rows, job.decode_windows, job.config.method.positions
    capacity = job.between + job.max_new_tokens + job.closing + job.config.method.horizon
    capacity += _GRAPH_LOOK if uses_cuda_graphs(job) else 0
    (keys, states), size = cache_numbers(job), job.compute_bytes
    copies = documents if job.shared else rows
    prefix = copies * (job.max_prefix + job.template) * keys * size + 4.0 * states * positions * documents * job.shared
    return prefix, rows * (capacity * keys * size + 4.0 * states)


def _decode(job: Job) -> dict[str, float]:
    shape, rows, documents = job.shape, job.decode_rows, job.decode_windows
    prefix, suffix = _caches(job)
    prefill = documents * (job.max_prefix + job.template) * _one_layer(job)
    if uses_cuda_graphs(job):  # documents are read into a cache of their own, then copied to the buffers
        return {"prefill": prefix + prefill}
    prefetched = job.local_windows > documents  # the next documents are read before the last ones are freed
    width = job.max_prefix + job.template + job.between + job.max_new_tokens
    scores = 16 * max((one.heads for one in shape.attention), default=0) * rows * width
    sampling = _SAMPLED_LOGIT[job.compute_bytes] * rows * shape.vocab + scores
    parts = {
        "documents' KV cache and states": (1 + prefetched) * prefix,
        "thoughts' KV cache and states": suffix,
        "prefill or sampling": float(max(prefill - suffix * (not prefetched), sampling)),
    }
    linear, model = shape.matmul_weights + shape.vocab * shape.hidden, job.config.model
    if job.machine.name == "cpu" and model.precision == "fp32" and model.decoding != "eager":
        if model.decoding == "cpp" or linear >= PREPACK_MIN_WEIGHTS:
            parts["prepacked weights"] = (2.0 if job.config.rollout.precision == "bf16" else 4.0) * linear
        if model.decoding == "cpp":  # of the newest documents only
            parts["prepacked KV cache"] = prefix
    return parts


def _score(job: Job) -> dict[str, float]:
    """The teacher reads as many windows at once as fit in a chunk, with the logits of the targets; a proxy with all."""
    if not job.teacher and not job.entropies:
        return {}
    windows = chunk_windows(job)
    targets = job.max_prefix if job.entropies else job.config.method.positions * job.config.method.horizon
    logits = min(windows * targets, 4096) * job.shape.vocab
    name = "teacher or proxy forward pass" if job.entropies else "teacher forward pass"
    parts = {name: float(windows * job.max_prefix * _one_layer(job) + 12 * logits)}
    if job.teacher and job.layout == "zero1":  # the teacher's weights replace them
        parts["policy weights, set aside"] = float(job.compute_bytes * job.shape.parameters)
    return parts


def _update(job: Job) -> dict[str, float]:
    """One chunk of thoughts, on top of documents that were read with gradients."""
    shape, method, size = job.shape, job.config.method, job.compute_bytes
    on_cpu, checkpointing = job.machine.name == "cpu", job.config.update.checkpointing
    prefix, tokens = job.max_prefix + job.template, chunk_tokens(job)
    keys, states = cache_numbers(job)
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
    return parts | {SCANS: scans}


def _layer_inputs(job: Job, tokens: int) -> float:
    """Bytes of the inputs of all layers, which is all that activation checkpointing keeps."""
    return float(job.compute_bytes * tokens * job.shape.hidden * job.shape.layers)


def _recomputed_layer(job: Job, rows: int, width: int) -> float:
    """Bytes saved by the largest layer when it is recomputed. Layers without Mamba are taken as equal."""
    shape = replace(job.shape, mamba=())
    attention = saved_bytes(replace(job, shape=shape), rows, width)[0]
    mamba = [
        sum(saved_bytes(replace(job, shape=replace(shape, mamba=(mixer,))), rows, width)) - attention
        for mixer in set(job.shape.mamba)
    ]
    return attention / job.shape.layers + _SCAN_PEAK * max(mamba, default=0.0)


def _one_layer(job: Job) -> float:
    """Bytes per token that a layer holds in a forward pass without gradients."""
    shape, half = job.shape, job.compute_bytes == 2
    inner = (4 if shape.adapter else 3) * shape.intermediate  # with an adapter's output
    plain = job.compute_bytes * (inner + 4 * shape.hidden) + 4 * shape.hidden * half
    mixers = [tokens + scanned for tokens, scanned in map(mamba_saved, shape.mamba)]
    return float(max([plain, *(_SCAN_PEAK * (one.bf16 if half else one.fp32) for one in mixers)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change, on top of those before it."""

    what: str
    costs: str
    saved: float  # bytes of the peak
    peak: float  # bytes, after this change and all before it


def advice(job: Job) -> list[Change]:
    """Changes that make a run fit, mildest first; empty where it fits. Changes that save nothing are left out."""
    changes: list[Change] = []
    for what, costs, candidates in _CHANGES:
        before, candidate = memory(job).peak, (None, job)
        if before <= job.machine.usable:
            break
        for candidate in candidates(job):
            if fits(candidate[1]):
                break
        value, changed = candidate
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

    rows = _largest(lambda n: fits(with_rows(n)))
    batch = _largest(lambda n: fits(job.with_option("train", batch=n * per_gpu)))
    return {"rollout_batch": rows * job.thoughts_per_window, "batch": batch * per_gpu} if rows and batch else None


def _largest(holds: Callable[[int], bool], limit: int = 2**20) -> int:
    """The largest n up to a limit for which a property holds, by bisection; 0 where it does not hold for 1."""
    if not holds(1):
        return 0
    low, high = 1, 2
    while high <= limit and holds(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


_Candidates = Iterable[tuple[object, Job]]  # values of a change, mildest first, each with the changed job


def _set(section: str, option: str, values: Callable[[Job], Iterable[object]]) -> Callable[[Job], _Candidates]:
    """Candidates that set an option of the config to each of some values."""
    return lambda job: ((value, job.with_option(section, **{option: value})) for value in values(job))


def _halved(value: int, least: int) -> Iterator[int]:
    while value > least:
        value = max(value // 2, least)
        yield value


def _fewer_rows(job: Job) -> list[int]:
    """The most rows that fit beside the smallest chunks, or one window's."""
    window = job.thoughts_per_window
    small = job.with_option("update", tokens_per_chunk=min(chunk_tokens(job), job.between + job.longest_row))
    most = _largest(lambda n: fits(small.with_option("train", rollout_batch=n * window)), 2**12)
    return [min(max(most, 1) * window, job.decode_rows)]


def _smaller_chunks(job: Job) -> Iterator[int]:
    """Down to one thought."""
    return _halved(chunk_tokens(job), job.between + job.longest_row)


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


_CHANGES: tuple[tuple[str, str, Callable[[Job], _Candidates]], ...] = (
    ("--train.rollout_batch {}", "slower decoding", _set("train", "rollout_batch", _fewer_rows)),
    ("--update.tokens_per_chunk {}", "a slower update", _set("update", "tokens_per_chunk", _smaller_chunks)),
    ("--layout zero1 on {} GPUs", "weights are sent once more a step", _sharded),
    (
        "--update.checkpointing {}", "layers are recomputed in the update",
        _set("update", "checkpointing", lambda job: [True]),
    ),
    ("--method.kl_weight {}", "no KL penalty", _set("method", "kl_weight", lambda job: [0])),
    (
        "--method.teacher_every {}", "the gain is not logged; the update stays the same",
        _set("method", "teacher_every", lambda job: [0] * job.config.shift_invariant),
    ),
    (
        "--gradients {}", "gradients are rounded (not an option of train yet)",
        lambda job: [("bf16", replace(job, gradient_bytes=2))],
    ),
    ("--gpus {} --layout zero1", "more GPUs", _more_gpus),
    (
        "--method.thought_length {}", "shorter thoughts",
        _set("method", "thought_length", lambda job: _halved(job.config.method.thought_length, 64)),
    ),
    ("--corpus.window {}", "shorter documents", _shorter_windows),
)  # fmt: skip
