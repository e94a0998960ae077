"""Thoughts from an engine that takes prompts and stops at a token: which requests to make, and what came of them.

Pure but for `draw`, which does the sampling. Such an engine can do two things that matter here: end a sample behind a
given token, and masks that token as the first one. Both together give exactly the thoughts of `rollout.decoding`:
a thought ends behind the closing delimiter, which may be several tokens, and does not begin with its first one.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from forethought.data.positions import ThoughtFormat, pad_rows
from forethought.rollout import Thoughts


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and the samples that are wanted behind it."""

    prompt: list[int]
    samples: int
    limit: int  # longest sample, in tokens
    stop: int  # a sample ends behind this token
    open_end: bool  # whether `stop` may be the first token
    seed: int  # of the first sample; the others' follow from it


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was sampled, the token that ended it included."""

    tokens: list[int]
    logp: list[float]  # of each token, by the engine, at its temperature, nats

    def __add__(self, more: "Sample") -> "Sample":
        return Sample(tokens=self.tokens + more.tokens, logp=self.logp + more.logp)


Draw = Callable[[list[Request]], list[list[Sample]]]  # the samples of each request


def think(
    prompts: Sequence[list[int]], noise: Float[Tensor, "batch group thought"], close: Sequence[int], draw: Draw
) -> list[Sample]:
    """A group of thoughts behind each prompt, position by position; the noise decides on the seeds alone.

    The first request runs up to the first token of the closing delimiter. Where the delimiter goes on, each thought is
    continued by requests of its own, up to its last token, until it has the whole of it or is full.
    """
    group, limit = noise.shape[1:]
    first = [
        Request(prompt=list(prompt), samples=group, limit=limit, stop=close[0], open_end=False, seed=seed(own))
        for prompt, own in zip(prompts, noise, strict=True)
    ]
    rows = [sample for found in draw(first) for sample in found]
    own, turn = noise.flatten(0, 1), 0
    while going := [i for i, row in enumerate(rows) if not closed(row, close) and len(row.tokens) < limit]:
        turn += 1
        more = [
            Request(
                prompt=[*prompts[i // group], *rows[i].tokens],
                samples=1,
                limit=limit - len(rows[i].tokens),
                stop=close[-1],
                open_end=True,
                seed=seed(own[i], turn),
            )
            for i in going
        ]
        for i, (sample,) in zip(going, draw(more), strict=True):
            rows[i] = rows[i] + sample
    return rows


def seed(noise: Float[Tensor, "..."], turn: int = 0) -> int:
    """A seed below 2^62 out of uniform numbers, which are a function of (run's seed, step, position, member)."""
    digest = hashlib.blake2b(noise.contiguous().numpy().tobytes() + bytes([turn % 256]), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def closed(row: Sample, close: Sequence[int]) -> bool:
    """Whether a thought ends with the closing delimiter, with something ahead of it."""
    return len(row.tokens) > len(close) and row.tokens[-len(close) :] == list(close)


def read_back(rows: Sequence[Sample], close: Sequence[int], targets: Sequence[list[int]]) -> list[list[int]]:
    """What the policy reads again for the evidence: each thought, its delimiter (forced or not), its targets."""
    group = len(rows) // len(targets)
    return [[*row.tokens, *(() if closed(row, close) else close), *targets[i // group]] for i, row in enumerate(rows)]


def as_thoughts(
    rows: Sequence[Sample],
    form: ThoughtFormat,
    evidence: Float[Tensor, "batch group horizon"],
    hit: Bool[Tensor, "batch group horizon"],
) -> Thoughts:
    """Samples and their evidence in the shape that methods take, on the evidence's device."""
    shape, device = evidence.shape[:2], evidence.device
    tokens, mask = pad_rows([row.tokens for row in rows], form.pad, left=False)
    logp = torch.zeros(mask.shape).masked_scatter(mask, torch.tensor([x for row in rows for x in row.logp]))
    return Thoughts(
        tokens=tokens.view(*shape, -1).to(device),
        mask=mask.view(*shape, -1).to(device),
        closed=torch.tensor([closed(row, form.close) for row in rows], device=device).view(shape),
        logp=logp.view(*shape, -1).to(device),
        evidence=evidence,
        hit=hit,
    )
