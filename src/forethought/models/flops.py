"""FLOPs of a step, counted from the tokens that it read: arithmetic on a `Shape`, exact to the multiply-add.

A multiply-add is 2 FLOPs. Counted are matrix products (projections, MLPs, experts, the vocabulary head where a row asks
for it), attention's scores and values, and Mamba-2's convolution and scan; a backward pass is twice its forward pass.
Not counted: elementwise work, norms, softmax, the optimizer, the teacher's average, padding, anything computed a second
time to save memory, and evaluation. A frozen weight (`Shape.adapter`) takes no gradient of its own: its
backward pass counts once. docs/flops.md has the formulas.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from forethought.models.shape import Mamba, Shape

Row = tuple[int, int]  # tokens that one row reads, and those before them whose keys and states it already has
Sharing = Literal["document", "rollout", "none"]
"""How often a prefix is computed.

- document: once for all positions of its window, in the rollout and again, forward and backward, in the update
- rollout: once a position in the rollout, once a thought in the update
- none: once a thought in both, as trainers do that know only rows
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs of one step, or of several added up, by phase."""

    prefill: int = 0  # contexts, up to and with the opening delimiter
    decode: int = 0  # thoughts, a token at a time
    score: int = 0  # what is read behind a thought for its evidence, or (`Work.reread`) everything again for it
    teacher: int = 0  # log p without a thought, by the teacher
    proxy: int = 0  # entropies that pick positions
    reference: int = 0  # forward passes of the update: old log-probabilities, the KL reference
    update: int = 0  # forward and backward

    def __add__(self, more: "Flops") -> "Flops":
        return Flops(**{one.name: getattr(self, one.name) + getattr(more, one.name) for one in fields(self)})

    @property
    def rollout(self) -> int:
        """What `collect` takes: all that carries no gradient but the update's own reference passes."""
        return self.prefill + self.decode + self.score + self.teacher + self.proxy

    @property
    def training(self) -> int:
        """What the update takes."""
        return self.reference + self.update

    @property
    def total(self) -> int:
        """Everything."""
        return self.rollout + self.training


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The tokens of one step of RLP or RPT.

    Example: one window of 9 tokens, a position at t = 4, a template of 2 tokens ahead and 1 behind, a delimiter of one
    token, two thoughts, of which the second was cut off: windows (9,), owners (0,), prefixes (6,), opening 2,
    thoughts ((3, 5),), tails ((0, 1),).
    """

    windows: tuple[int, ...]  # tokens of each window that the teacher reads: up to its last target
    owners: tuple[int, ...]  # the window of each position
    prefixes: tuple[int, ...]  # of each position: tokens ahead of it that the window's other positions may share
    opening: int  # tokens between a prefix and a thought: rest of the template, opening delimiter
    thoughts: tuple[tuple[int, ...], ...]  # of each position: sampled tokens of each thought
    tails: tuple[tuple[int, ...], ...]  # of each position and thought: tokens read behind it, see Flops.score
    sharing: Sharing = "document"
    reread: bool = False  # whether the policy reads all again for the evidence, as behind vLLM
    horizon: int = 1  # targets of each position
    teacher: bool = True  # whether the teacher was asked
    kl: bool = False  # whether a KL reference was
    inner_steps: int = 1
    written: tuple[tuple[int, ...], ...] = ()  # of each thought: tokens of its prediction, which learn too (RPT)
    proxy: int = 0  # FLOPs of the proxy, whose shape is its own
    supervised: tuple[int, ...] = ()  # rows of so many tokens for next-token training (Mixed, with inner_steps 0)


def pairs(tokens: int, past: int, window: int | None = None) -> int:
    """Keys that a row's tokens see, summed: token i of n sees min(past + i, window), itself included."""
    growing = tokens if window is None else min(tokens, max(window - past, 0))
    return growing * past + growing * (growing + 1) // 2 + (tokens - growing) * (window or 0)


def forward_flops(shape: Shape, rows: Iterable[Row], head_rows: int, causal: bool = True) -> int:
    """FLOPs of reading rows in parallel, with logits at `head_rows` of their tokens.

    `causal` counts the pairs that attention and the scan need: the triangle below the diagonal, within the window.
    False counts what plain tensor code multiplies, masked or not: all queries with all keys, whole chunks, a group's B
    and C again for each of its heads. torch's counter sees that.
    """
    rows = list(rows)
    total = _linear_flops(shape, sum(tokens for tokens, _ in rows), head_rows)
    for one, layers in Counter(shape.attention).items():
        seen = sum(pairs(n, past, one.window) if causal else n * (past + n) for n, past in rows)
        total += layers * 4 * one.heads * one.head_dim * seen
    scan = _scan if causal else _padded_scan
    for one, layers in Counter(shape.mamba).items():
        total += layers * sum(scan(one, tokens) for tokens, _ in rows)
    return total


def backward_flops(shape: Shape, rows: Sequence[Row], head_rows: int, causal: bool = True) -> int:
    """FLOPs of the backward pass: twice those of `forward_flops`, less the gradients of frozen weights."""
    forward = forward_flops(shape, rows, head_rows, causal)
    if not shape.adapter:
        return 2 * forward
    tokens = sum(count for count, _ in rows)
    convolved = sum(
        2 * one.kernel * one.channels * (count + (0 if causal else one.kernel - 1))
        for one in shape.mamba
        for count, _ in rows
    )
    return 2 * forward - (_linear_flops(shape, tokens, head_rows) - 2 * tokens * shape.adapter + convolved)


def decode_flops(shape: Shape, rows: Iterable[Row]) -> int:
    """FLOPs of reading rows token by token, each token with its logits: keys are cached, Mamba steps its state."""
    rows = list(rows)
    count = sum(tokens for tokens, _ in rows)
    total = _linear_flops(shape, count, count)
    for one, layers in Counter(shape.attention).items():
        total += layers * 4 * one.heads * one.head_dim * sum(pairs(n, past, one.window) for n, past in rows)
    for one, layers in Counter(shape.mamba).items():
        total += layers * count * (4 * one.inner * one.state + 2 * one.kernel * one.channels)
    return total


def step_flops(shape: Shape, work: Work | tuple[int, ...]) -> Flops:
    """FLOPs of a training step: of work with thoughts, or of next-token training on rows of so many tokens."""
    return rlp_step(shape, work) if isinstance(work, Work) else cpt_step(shape, work)


def rlp_step(shape: Shape, work: Work, causal: bool = True) -> Flops:
    """FLOPs of one step of RLP (Algorithm 1) or RPT; `causal` as in `forward_flops`."""
    contexts = [prefix + work.opening for prefix in work.prefixes]
    thoughts = [(n, at) for lengths, at in zip(work.thoughts, contexts, strict=True) for n in lengths]
    tails = [n for position in work.tails for n in position]
    shared = _shared_rows(work)
    prefill = {
        "document": shared + [(work.opening, at - work.opening) for _, at in thoughts],
        "rollout": [(context, 0) for context in contexts],
        "none": [(context, 0) for _, context in thoughts],
    }[work.sharing]
    written = [n for position in work.written for n in position] or [0] * len(thoughts)
    responses = [(n + more, at) for (n, at), more in zip(thoughts, written, strict=True)]
    learned = [(n + at, 0) for n, at in responses]
    if work.sharing == "document":
        learned = shared + [(n + work.opening, at - work.opening) for n, at in responses]
    first = len(contexts) if work.sharing == "rollout" else len(thoughts)
    scored = sum(n for n, _ in responses)
    once = forward_flops(shape, learned, scored, causal)
    passes = work.kl + (work.inner_steps > 1)
    teacher = forward_flops(shape, [(n, 0) for n in work.windows], work.horizon * len(contexts), causal)
    return Flops(
        prefill=forward_flops(shape, prefill, first, causal),
        decode=decode_flops(shape, thoughts),
        score=_score(shape, work, [(tail, n, at) for tail, (n, at) in zip(tails, thoughts, strict=True)], causal),
        teacher=teacher if work.teacher else 0,
        proxy=work.proxy,
        reference=passes * once,
        update=work.inner_steps * (once + backward_flops(shape, learned, scored, causal))
        + cpt_step(shape, work.supervised, causal).update,
    )


def cpt_step(shape: Shape, rows: Sequence[int], causal: bool = True) -> Flops:
    """FLOPs of a step of next-token training (eq. 1) on rows of so many tokens, all but each row's first predicted."""
    read, scored = [(n, 0) for n in rows], sum(n - 1 for n in rows)
    return Flops(update=forward_flops(shape, read, scored, causal) + backward_flops(shape, read, scored, causal))


def equal_flops_steps(shape: Shape, flops: int, rows: Sequence[int]) -> int:
    """Steps of next-token training on such rows whose FLOPs come closest to `flops`; at least 1."""
    return max(1, round(flops / cpt_step(shape, rows).total))


def t_flop(n: int, l_seq: int, bs: int, iters: int, t_inp: int) -> int:
    """The paper's estimate of RLP's compute, in tokens: T_flop = n * l_seq * bs * iters + T_inp.

    `n` thoughts a position, sequences of `l_seq` tokens, `bs` positions a step, `iters` steps, `t_inp` tokens of text.
    """
    return n * l_seq * bs * iters + t_inp


def _score(shape: Shape, work: Work, thoughts: Sequence[tuple[int, int, int]], causal: bool) -> int:
    """For the evidence of thoughts: (tokens read behind it, its own, those ahead of it)."""
    if not work.reread:
        return decode_flops(shape, [(tail, at + n) for tail, n, at in thoughts])
    rows = [(at + n + tail + 1, 0) for tail, n, at in thoughts]
    if work.sharing == "document":
        own = [(work.opening + n + tail + 1, at - work.opening) for tail, n, at in thoughts]
        rows = _shared_rows(work) + own
    return forward_flops(shape, rows, work.horizon * len(thoughts), causal)


def _linear_flops(shape: Shape, tokens: int, head_rows: int) -> int:
    return 2 * (tokens * shape.multiplied + head_rows * shape.hidden * shape.vocab)


def _shared_rows(work: Work) -> list[Row]:
    """Each window's longest prefix."""
    longest: dict[int, int] = {}
    for owner, prefix in zip(work.owners, work.prefixes, strict=True):
        longest[owner] = max(prefix, longest.get(owner, 0))
    return [(prefix, 0) for prefix in longest.values()]


def _scan(one: Mamba, tokens: int) -> int:
    """Convolution and chunked scan of one row: pairs within a chunk, every token into and out of the state."""
    chunks, rest = divmod(tokens, one.chunk)
    within = (chunks * pairs(one.chunk, 0) + pairs(rest, 0)) * 2 * (one.groups * one.state + one.inner)
    across = (4 * tokens + 2 * (chunks + bool(rest))) * one.inner * one.state
    return within + across + 2 * one.kernel * one.channels * tokens


def _padded_scan(one: Mamba, tokens: int) -> int:
    """The same as transformers' plain code multiplies it: whole chunks, each head by itself, all chunks with all."""
    chunks = -(-tokens // one.chunk)
    within = chunks * one.chunk**2 * 2 * (one.heads * one.state + one.inner)
    across = (4 * chunks * one.chunk + 2 * (chunks + 1) ** 2) * one.inner * one.state
    return within + across + 2 * one.kernel * one.channels * (tokens + one.kernel - 1)
