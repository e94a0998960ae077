"""The EMA teacher: a slowly moving copy of the policy that scores the text without thinking."""

import copy
from typing import Any

import torch

from forethought.models.sharding import local


class Teacher:
    """phi <- tau * phi + (1 - tau) * theta after every optimizer step; phi = theta at the start.

    Kept in float32: in bf16 (1 - 0.999) * delta rounds to nothing for almost every weight, and the teacher never
    moves. Its score is the same for all thoughts of one position, so it cancels out of a group-relative update: it
    gives the reward its meaning (the information gain that is logged), not its gradient.
    """

    def __init__(self, policy: Any, decay: float):
        self.model = copy.deepcopy(policy).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, policy: Any) -> None:
        """Move towards the policy by 1 - tau, each process the rows that it keeps."""
        ours, theirs = ([local(parameter) for parameter in one.parameters()] for one in (self.model, policy))
        torch._foreach_lerp_(ours, theirs, 1 - self.decay)
