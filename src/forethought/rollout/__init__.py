"""Positions -> thoughts. An engine samples a group of thoughts at each position and reads the evidence off them."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forethought.data.positions import Positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Thoughts:
    """What was thought at each position, how likely that was, and what it made of the true tokens.

    Example: L = 4, close = 9. Sampled 5 6 9: mask 1 1 1 0, closed. Sampled 5 6 7 8: mask 1 1 1 1, not closed; the
    closing delimiter was then forced (and is not part of `tokens`).
    """

    tokens: Int[Tensor, "batch group thought"]  # sampled tokens, a sampled closing delimiter included
    mask: Bool[Tensor, "batch group thought"]  # True at sampled tokens; at least one each
    closed: Bool[Tensor, "batch group"]  # whether the thought closed itself
    logp: Float[Tensor, "batch group thought"]  # the sampler's log-probability at its temperature, nats; 0 where masked
    evidence: Float[Tensor, "batch group horizon"]  # log p(x_t+k | x_<t, c, ...) at temperature 1, nats (eq. 3)
    hit: Bool[Tensor, "batch group horizon"]  # whether the true token was the likeliest

    @property
    def lengths(self) -> Int[Tensor, "batch group"]:
        """|c|, in sampled tokens."""
        return self.mask.sum(dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """Thoughts, each with what the policy went on to write behind the closing delimiter.

    After a thought that was closed by force something was written as well; it is no answer to anything.
    """

    thoughts: Thoughts  # with the evidence of x_t alone
    written: Int[Tensor, "batch group prediction"]  # sampled tokens
    logp: Float[Tensor, "batch group prediction"]  # the sampler's log-probability at its temperature, nats


@runtime_checkable
class Engine(Protocol):
    """Samples thoughts. A new engine is one class with these two methods; `forethought.trainer.Trainer` makes it."""

    def sample(self, positions: Positions, noise: Float[Tensor, "batch group thought"]) -> Thoughts:
        """One thought for each position and group member; noise[..., u] is the uniform number that draws its token u.

        The same noise gives the same thoughts, however the positions are split into calls.
        """
        ...

    def sync(self) -> None:
        """Take over the policy's weights after an optimizer step."""
        ...


@runtime_checkable
class Writer(Engine, Protocol):
    """An engine that can go on writing behind a thought."""

    def respond(
        self,
        positions: Positions,
        noise: Float[Tensor, "batch group thought"],
        writing: Float[Tensor, "batch group prediction"],
    ) -> Responses:
        """The thoughts that `sample` gives for the same noise, and behind each the tokens that `writing` draws."""
        ...


def draw_noise(shape: tuple[int, int], generators: list[torch.Generator]) -> Float[Tensor, "batch group thought"]:
    """Uniform numbers, each position's from a generator of its own: independent of how a batch is split."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators])
