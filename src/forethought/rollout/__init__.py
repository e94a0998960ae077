"""Positions -> thoughts. An engine samples a group of thoughts at each position and returns their evidence."""

import importlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forethought.config import Config, UserError
from forethought.data.positions import Positions, ThoughtFormat
from forethought.models.flops import Work
from forethought.prefix import enable


@dataclass(frozen=True, slots=True, kw_only=True)
class Thoughts:
    """Sampled thoughts, their log-probabilities, and the log-probabilities of the true tokens after them (evidence).

    Example: L = 4, close = 9. Sampled 5 6 9: mask 1 1 1 0, closed. Sampled 5 6 7 8: mask 1 1 1 1, not closed; the
    closing delimiter was then forced (and is not part of `tokens`).
    """

    tokens: Int[Tensor, "batch group thought"]  # sampled tokens, a sampled closing delimiter included
    mask: Bool[Tensor, "batch group thought"]  # True at sampled tokens; at least one each
    closed: Bool[Tensor, "batch group"]  # whether the thought closed itself
    logp: Float[Tensor, "batch group thought"]  # the sampler's log-probability at its temperature, nats; 0 where masked
    evidence: Float[Tensor, "batch group horizon"]  # log p(x_t+k | x_<t, c, ...) at temperature 1, nats (eq. 3)
    hit: Bool[Tensor, "batch group horizon"]  # whether the true token was the likeliest one

    @property
    def lengths(self) -> Int[Tensor, "batch group"]:
        """|c|, in sampled tokens."""
        return self.mask.sum(dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """Thoughts, and what the policy continued to write after each closing delimiter, forced ones included."""

    thoughts: Thoughts  # with the evidence of x_t alone
    written: Int[Tensor, "batch group prediction"]  # sampled tokens
    logp: Float[Tensor, "batch group prediction"]  # the sampler's log-probability at its temperature, nats


@runtime_checkable
class Engine(Protocol):
    """Samples thoughts. A new engine is a class with these two methods and a function that `engine` calls."""

    def sample(self, positions: Positions, noise: Float[Tensor, "batch group thought"]) -> Thoughts:
        """One thought for each position and group member; noise[..., u] is the uniform number that draws its token u.

        The same noise gives the same thoughts, however the positions are split into calls.
        """
        ...

    def sync(self) -> None:
        """Load the policy's weights after an optimizer step."""
        ...


@runtime_checkable
class Writer(Engine, Protocol):
    """An engine that can continue to write after a thought."""

    def respond(
        self,
        positions: Positions,
        noise: Float[Tensor, "batch group thought"],
        writing: Float[Tensor, "batch group prediction"],
    ) -> Responses:
        """The thoughts that `sample` returns for the same noise, each followed by the tokens that `writing` draws."""
        ...


_ENGINES = {"native": "forethought.rollout.native:native_engine", "vllm": "forethought.rollout.vllm:start"}


def engine(model: Any, form: ThoughtFormat, config: Config) -> Any:
    """The `Engine` of a config (for RPT a `Writer`). Raises UserError where the model does not support it."""
    share_prefixes(model, config)
    module, _, function = _ENGINES[config.rollout.engine].partition(":")
    return getattr(importlib.import_module(module), function)(model, form, config)


def share_prefixes(model: Any, config: Config) -> None:
    """Enable shared prefixes if the config asks for them. Raises UserError for a model that does not support them."""
    if config.model.prefix != "shared":
        return
    try:
        enable(model)
    except ValueError as error:
        raise UserError(
            f"model.prefix = 'shared': {type(model).__name__} cannot read a document once for all its thoughts "
            f"({error}); set model.prefix to 'replicated'"
        ) from error


def draw_noise(shape: tuple[int, int], generators: list[torch.Generator]) -> Float[Tensor, "batch group thought"]:
    """Uniform numbers, each position's from its own generator: independent of how a batch is split."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators])


def work_of(positions: Positions, thoughts: Thoughts, form: ThoughtFormat, config: Config, teacher: bool) -> Work:
    """The tokens of a step, for `forethought.models.flops`. `thoughts` are those of all positions, in order."""
    options, read = config.method, dict.fromkeys(positions.window.tolist(), 0)
    for window, at in zip(positions.window.tolist(), positions.at.tolist(), strict=True):
        read[window] = max(read[window], at + positions.horizon - 1)
    lengths, closed = thoughts.lengths.tolist(), thoughts.closed.tolist()
    return Work(
        windows=tuple(read.values()),
        owners=tuple(positions.window.tolist()),
        prefixes=tuple(len(form.before) + at for at in positions.at.tolist()),
        opening=len(form.after) + len(form.open),
        thoughts=tuple(map(tuple, lengths)),
        tails=tuple(
            tuple((0 if done else len(form.close)) + positions.horizon - 1 for done in group) for group in closed
        ),
        sharing="document" if config.model.prefix == "shared" else "rollout",
        reread=config.rollout.engine == "vllm",
        horizon=positions.horizon,
        teacher=teacher,
        kl=options.kl_weight > 0,
        inner_steps=options.inner_steps,
    )
