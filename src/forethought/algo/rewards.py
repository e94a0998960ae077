"""Evidence or prediction -> reward. A new reward of evidence is one function here, named in REWARDS."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from forethought.config import Method
from forethought.rollout import Thoughts


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """r = value - shift. The shift is one number for a whole group, so it cancels out of a group-relative update.

    Keeping the two apart lets it cancel exactly, and not only up to rounding.
    """

    value: Float[Tensor, "batch group"]  # what differs between the thoughts of a position
    shift: Float[Tensor, " batch"] | None  # what does not; None where the teacher was not asked

    @property
    def total(self) -> Float[Tensor, "batch group"] | None:
        """The reward itself; None where the shift is not known."""
        return None if self.shift is None else self.value - self.shift[:, None]


Reward = Callable[
    [Thoughts, Float[Tensor, "batch horizon"] | None, Method, torch.Generator, Sequence[int] | None], Rewards
]
"""The last argument: which positions of the step these are, where several processes share it; None: all of them."""


def information_gain(
    thoughts: Thoughts,
    nothink: Float[Tensor, "batch horizon"] | None,
    options: Method,
    generator: torch.Generator,
    numbers: Sequence[int] | None = None,
) -> Rewards:
    """The paper's reward (eq. 5): r(c) = log p_theta(x_t | x_<t, c) - log p_phi(x_t | x_<t), in nats.

    With a horizon of several tokens both terms are sums discounted by gamma^k.
    """
    value = discounted(thoughts.evidence, options.discount)
    return Rewards(value=value, shift=None if nothink is None else discounted(nothink, options.discount))


def random_control(
    thoughts: Thoughts,
    nothink: Float[Tensor, "batch horizon"] | None,
    options: Method,
    generator: torch.Generator,
    numbers: Sequence[int] | None = None,
) -> Rewards:
    """The control: standard normal numbers. Whatever a run gains with these is not the method."""
    batch, group = thoughts.closed.shape
    numbers = range(batch) if numbers is None else numbers
    # One draw for all would depend on their number. Positions of other processes are drawn too, and left out.
    rows = [torch.randn(group, generator=generator) for _ in range(max(numbers, default=-1) + 1)]
    value = torch.stack([rows[number] for number in numbers]).to(thoughts.evidence.device)
    return Rewards(value=value, shift=torch.zeros_like(value[:, 0]))


REWARDS: dict[str, Reward] = {"information_gain": information_gain, "random": random_control}


def prefix_match(prediction: Sequence[bytes], truth: Iterable[bytes]) -> bool:
    """RPT's reward (arXiv:2506.08007): whether a prediction begins the true text and ends where one of its tokens does.

    Both are the bytes of tokens one after the other: [b" under"] is right before [b" un", b"der", b" red"], [b" u"]
    ends inside a token, and what has no bytes predicts nothing.
    """
    wanted = b"".join(prediction)
    found, tokens = b"", iter(truth)
    while len(found) < len(wanted):
        token = next(tokens, None)
        if token is None:
            return False
        found += token
    return bool(wanted) and found == wanted


def discounted(evidence: Float[Tensor, "*rows horizon"], discount: float) -> Float[Tensor, "*rows"]:
    """sum_k gamma^k log p(x_t+k | ...); the evidence itself at horizon 1."""
    weights = discount ** torch.arange(evidence.shape[-1], device=evidence.device)
    return (evidence * weights).sum(dim=-1)
