"""Rewards of thoughts that are given by hand."""

from typing import Any

import torch

from forethought.algo.rewards import RewardInputs
from forethought.config import Method
from forethought.data.positions import at_positions, make_generator
from forethought.rollout import Thoughts
from helpers.models import WINDOWS, word_tokenizer

OPTIONS = Method()


def inputs(sampled: Thoughts, nothink: Any = None, options: Method = OPTIONS, **more: Any) -> RewardInputs:
    """What a reward is given; the positions of these rewards do not matter."""
    batch = len(sampled.closed)
    found: dict[str, Any] = {
        "thoughts": sampled,
        "positions": at_positions(WINDOWS[:1], [[1] * batch], 1),
        "tokenizer": word_tokenizer(),
        "no_think_logp": None if nothink is None else torch.as_tensor(nothink),
        "options": options,
        "generator": make_generator(3),
        "global_indices": range(batch),
    }
    return RewardInputs(**(found | more))
