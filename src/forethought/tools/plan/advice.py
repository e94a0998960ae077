"""What to change where a run does not fit, mildest first, each with what it saves; and the largest batch that fits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from forethought.config import from_dict, merge, to_dict
from forethought.tools.plan.job import Job, with_option
from forethought.tools.plan.memory import chunk_tokens, memory

_RANK = 16  # of adapters, a usual one


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change, on top of those before it."""

    what: str
    costs: str  # what one gives up
    saved: float  # bytes of the peak
    peak: float  # bytes, after this change and all before it


def advice(job: Job) -> list[Change]:
    """Changes one after the other until the run fits; empty where it does. Those that save nothing are left out."""
    changes: list[Change] = []
    for what, costs, change in _KNOWN:
        before = memory(job).peak
        if before <= job.machine.usable:
            break
        for text, changed in change(job):
            peak = memory(changed).peak
            if peak < before * 0.999:
                changes.append(Change(what=what.format(text), costs=costs, saved=before - peak, peak=peak))
                job, before = changed, peak
                break
    return changes


def adapters(job: Job) -> Change | None:
    """Training adapters alone, and what must change with it; None where the run fits, or does that already."""
    if job.shape.adapter or not job.shape.linears or fits(job):
        return None
    options = from_dict(merge(to_dict(job.config), {"lora": {"r": _RANK}, "parallel": {"shard": "none"}}))
    layout = "ddp" if job.layout == "fsdp2" else job.layout
    other = replace(job, config=options, shape=job.shape.adapted(options.lora), layout=layout)
    more, before = advice(other), memory(job).peak
    peak = more[-1].peak if more else memory(other).peak
    words = " ".join([f"--lora.r {_RANK}", *(change.what for change in more)])
    return Change(what=words, costs="adapters alone are trained", saved=before - peak, peak=peak)


def largest(job: Job) -> dict[str, int] | None:
    """The largest train.rollout_batch and train.batch (positions a step, all GPUs) that fit, each with the other as
    it is; None where not even the least of both fits.
    """
    rows, positions = job.rows_of_window, job.config.method.positions
    one_each = job.gpus * positions

    def with_rows(n: int) -> Job:
        batch = max(job.config.train.batch, n * one_each)  # else there would be no more windows to decode at once
        return with_option(job, "train", rollout_batch=n * rows, batch=batch)

    def with_positions(n: int) -> Job:
        return with_option(job, "train", batch=n * one_each)

    found = [_most(lambda n, make=make: fits(make(n))) for make in (with_rows, with_positions)]
    if not all(found):
        return None
    return {"rollout_batch": found[0] * rows, "batch": found[1] * one_each}


def fits(job: Job) -> bool:
    """Whether the peak stays within what the machine lets tensors take."""
    return memory(job).peak <= job.machine.usable


def _most(good: Callable[[int], bool], limit: int = 2**20) -> int:
    """The largest n up to a limit for which a property holds that large numbers lose; 0 where 1 lacks it."""
    if not good(1):
        return 0
    low, high = 1, 2
    while high <= limit and good(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


Options = Iterator[tuple[str, Job]]


def _fewer_rows(job: Job) -> Options:
    """The most rows that fit beside the smallest chunks, or one window's."""
    least = job.rows_of_window
    small = with_option(job, "update", tokens_per_chunk=min(chunk_tokens(job), job.behind + job.limit))
    most = _most(lambda n: fits(with_option(small, "train", rollout_batch=n * least)), 2**12)
    rows = min(max(most, 1) * least, job.rows_at_once)
    if rows < job.rows_at_once or rows < job.config.train.rollout_batch:
        yield str(rows), with_option(job, "train", rollout_batch=rows)


def _smaller_chunks(job: Job) -> Options:
    """The most tokens, in halves, that fit, or one thought's."""
    least = job.behind + job.limit
    tokens = chunk_tokens(job)
    while tokens > least and not fits(with_option(job, "update", tokens_per_chunk=tokens)):
        tokens = max(tokens // 2, least)
    if tokens < chunk_tokens(job):
        yield str(tokens), with_option(job, "update", tokens_per_chunk=tokens)


def _in_parts(job: Job) -> Options:
    if job.layout == "ddp" and not job.shape.adapter:
        yield str(job.gpus), replace(job, layout="fsdp2")


def _half_gradients(job: Job) -> Options:
    if job.gradient == 4:
        yield "", replace(job, gradient=2)


def _no_teacher(job: Job) -> Options:
    if job.teacher and job.config.shift_invariant:
        yield "", with_option(job, "method", teacher_every=0)


def _no_reference(job: Job) -> Options:
    if job.config.method.kl_weight:
        yield "", with_option(job, "method", kl_weight=0.0)


def _shorter_thoughts(job: Job) -> Options:
    length = job.config.method.thought_length
    while length > 64:
        length //= 2
        shorter = with_option(job, "method", thought_length=length)
        shorter = replace(shorter, length=min(job.length, float(length)))
        if fits(shorter) or length <= 64:
            yield str(length), shorter


def _shorter_windows(job: Job) -> Options:
    window = job.config.corpus.window
    while window > 128:
        window //= 2
        shorter = with_option(job, "corpus", window=window)
        longest = min(job.longest, window - job.config.method.horizon)
        prefix = min(job.prefix, longest)
        shorter = replace(shorter, longest=longest, prefix=prefix, document=min(job.document, window))
        if fits(shorter) or window <= 128:
            yield str(window), shorter


def _more_gpus(job: Job) -> Options:
    """Twice as many in parts, up to 1,024."""
    gpus = job.gpus if not job.shape.adapter else 1024  # each GPU has all of frozen weights
    while gpus < 1024:
        gpus *= 2
        more = replace(job, gpus=gpus, layout="fsdp2")
        if fits(more):
            yield str(gpus), more


def _checkpointed(job: Job) -> Options:
    if not job.config.update.checkpointing:
        yield "", with_option(job, "update", checkpointing=True)


_KNOWN: tuple[tuple[str, str, Callable[[Job], Options]], ...] = (
    ("--train.rollout_batch {}", "slower decoding", _fewer_rows),
    ("--update.tokens_per_chunk {}", "a slower update", _smaller_chunks),
    ("--layout fsdp2 on {} GPUs", "weights are sent once more a step", _in_parts),
    ("--update.checkpointing True", "layers are computed once more in the update", _checkpointed),
    ("--method.kl_weight 0", "no KL to the start", _no_reference),
    ("--method.teacher_every 0", "the gain is not logged; the update stays the same", _no_teacher),
    ("--gradients bf16", "gradients are rounded (not an option of train yet)", _half_gradients),
    ("--gpus {} --layout fsdp2", "more GPUs", _more_gpus),
    ("--method.thought_length {}", "shorter thoughts", _shorter_thoughts),
    ("--corpus.window {}", "shorter documents", _shorter_windows),
)
