"""All thoughts of a tiny vocabulary, for expectations that are exact."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from forethought.algo.objective import group_advantages
from forethought.algo.policy_gradient import Microbatch
from forethought.data.positions import ThoughtFormat
from forethought.models.logprobs import ThoughtBatch
from helpers.models import (
    closed_by_force,
    config,
    plain_thought,
    qwen3,
    rlp,
    update,
)

OPEN, CLOSE = 3, 4
FORM = ThoughtFormat(before=(), after=(), open=(OPEN,), close=(CLOSE,), bos=None, pad=0)
VOCAB = 5


@dataclass(frozen=True)
class Enumerated:
    thought: list[int]
    closed: list[int]  # with the closing delimiter, sampled or forced
    logp: torch.Tensor  # of each sampled token, with its gradient

    @property
    def probability(self) -> torch.Tensor:
        return self.logp.sum().exp()


def tiny(seed: int = 0) -> Any:
    return qwen3(vocab=VOCAB, seed=seed, width=16).double()


def every_thought(model: Any, prompt: list[int], form: ThoughtFormat, limit: int, temperature: float = 1.0):
    """All thoughts under the sampler's rules: not closed too early, ended by the delimiter, cut off at the limit."""
    shortest, early = form.closing.shortest, form.closing.early.tolist()
    found, open_ends = [], [[]]
    while open_ends:
        thought = open_ends.pop()
        if thought and (len(thought) == limit or closed_by_force(thought, form) is thought):
            logp = plain_thought(model, prompt, thought, temperature, early, shortest)
            found.append(Enumerated(thought, closed_by_force(thought, form), logp))
        else:
            open_ends += [[*thought, token] for token in range(VOCAB) if len(thought) >= shortest or token not in early]
    return found


def microbatch(context: list[int], thoughts: list[list[int]], advantage: torch.Tensor, scale: float) -> Microbatch:
    width, rows = max(map(len, thoughts)), len(thoughts)
    tokens = torch.tensor([thought + [0] * (width - len(thought)) for thought in thoughts])
    mask = torch.arange(width) < torch.tensor([len(thought) for thought in thoughts])[:, None]
    place = torch.zeros(rows, dtype=torch.long)
    return Microbatch(
        batch=ThoughtBatch(
            documents=[context], prefix_lengths=[[len(context)]], position_index=place, tokens=tokens, mask=mask
        ),
        logp_sampler=torch.zeros(rows, width),
        logp_old=None,
        logp_reference=None,
        advantage=advantage,
        kept=torch.ones(rows, dtype=torch.bool),
        scale=scale,
    )


def expected_group_gradient(model: Any, context: list[int], thoughts: list[Enumerated], scores: torch.Tensor):
    """Gradient that RLP.forward_backward adds, averaged exactly over all groups of two that can be sampled.

    At a ratio of 1 a row's loss is linear in its advantage: a thought's row takes its advantages in all pairs at once,
    each times the pair's probability.
    """
    index = torch.tensor(list(product(range(len(thoughts)), repeat=2)))
    chance = torch.stack([one.probability.detach() for one in thoughts])[index].prod(dim=1)
    assert float(chance.sum()) == pytest.approx(1, abs=1e-6)
    weighted = group_advantages(scores[index]) * chance[:, None]
    advantages = torch.zeros_like(scores).index_add(0, index.flatten(), weighted.flatten())
    method = rlp(model, config(temperature=1.0, group=2), FORM)
    rows = [one.thought for one in thoughts]
    return update(method, [microbatch(context, rows, advantages, scale=1 / 2)])
