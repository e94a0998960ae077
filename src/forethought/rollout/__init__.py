"""Positions -> thoughts. An engine samples a group of thoughts at each position and returns their evidence."""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forethought.config import Config, UserError, registry
from forethought.data.positions import Positions, ThoughtFormat
from forethought.models.logprobs import ScoringOptions, ThoughtBatch, chunk_tokens, target_logp
from forethought.prefix import enable


@dataclass(frozen=True, slots=True, kw_only=True)
class Thoughts:
    """Sampled thoughts, their log-probabilities, and the log-probabilities of the true tokens after them (evidence).

    Example: L = 4, close = 9. Sampled 5 6 9: mask 1 1 1 0, closed. Sampled 5 6 7 8: mask 1 1 1 1, not closed; the
    closing delimiter was then forced (and is not part of `tokens`). What was read of a thought and after it is always
    `ThoughtFormat.content` of its tokens and `ThoughtFormat.bridge`.
    """

    tokens: Int[Tensor, "batch group thought"]  # sampled tokens, a sampled closing delimiter included
    mask: Bool[Tensor, "batch group thought"]  # True at sampled tokens; at least one each
    closed: Bool[Tensor, "batch group"]  # whether the thought closed itself
    logp: Float[Tensor, "batch group thought"]  # the sampler's log-probability at its temperature, nats; 0 where masked
    evidence: Float[Tensor, "batch group horizon"]  # log p(x_t+k | x_<t, c, ...) at temperature 1, nats (eq. 3)
    hit: Bool[Tensor, "batch group horizon"]  # whether the true token was the likeliest one
    written: Int[Tensor, "batch group prediction"] | None = None  # RPT: tokens sampled after the closing delimiter
    written_logp: Float[Tensor, "batch group prediction"] | None = None  # as `logp`

    @property
    def lengths(self) -> Int[Tensor, "batch group"]:
        """|c|, in sampled tokens."""
        return self.mask.sum(dim=-1)


@runtime_checkable
class Engine(Protocol):
    """Samples thoughts, built by the registry's entry as Engine(model, form, config).

    A new engine is a class with these two methods and one entry, or `--rollout.engine my_file:MyEngine`.
    """

    def sample(
        self,
        positions: Positions,
        noise: Float[Tensor, "batch group thought"],
        writing: Float[Tensor, "batch group prediction"] | None = None,
    ) -> Thoughts:
        """One thought for each position and group member; noise[..., u] is the uniform number that draws its token u.

        The same noise gives the same thoughts, however the positions are split into calls. RPT alone gives `writing`:
        the numbers that draw the tokens after each closing delimiter, sampled or forced. Evidence is then of x_t alone.
        """
        ...

    def sync(self) -> None:
        """Load the policy's weights after an optimizer step."""
        ...


def thought_tokens(thoughts: Thoughts, form: ThoughtFormat) -> list[list[list[int]]]:
    """The tokens of each thought, by position and group member, without a sampled closing delimiter."""
    columns = zip(thoughts.tokens.tolist(), thoughts.lengths.tolist(), thoughts.closed.tolist(), strict=True)
    return [
        [form.content(tokens[:length], closed) for tokens, length, closed in zip(*group, strict=True)]
        for group in columns
    ]


@torch.no_grad()
def rescored(thoughts: Thoughts, positions: Positions, policy: Any, form: ThoughtFormat, config: Config) -> Thoughts:
    """The same thoughts with the policy's own evidence, where the sampler is not quite the policy."""
    tokens, contents = chunk_tokens(policy, config.update.tokens_per_chunk), thought_tokens(thoughts, form)
    options = ScoringOptions(temperature=1.0, tokens=tokens, shared=config.model.prefix == "shared")
    start, parts = 0, []
    for chunk in positions.chunks_of_tokens(tokens):
        some = slice(start, start := start + len(chunk))
        batch = ThoughtBatch.from_positions(form, chunk, thoughts.tokens[some], thoughts.mask[some])
        batch = batch.with_targets(form, chunk, contents[some])
        parts.append(target_logp(policy, form, batch, positions.horizon, options))
    evidence, hit = (torch.cat(some).view(*thoughts.closed.shape, -1) for some in zip(*parts, strict=True))
    return replace(thoughts, evidence=evidence, hit=hit)


def engine(model: Any, form: ThoughtFormat, config: Config, name: str = "") -> Any:
    """The `Engine` of a config, or the one of this name. Raises UserError as `check_prefixes`."""
    check_prefixes(model, config)
    return registry.load("engine", name or config.rollout.engine)(model, form, config)


def check_prefixes(model: Any, config: Config) -> None:
    """Prepare a model for model.prefix and probe it. Raises UserError for a model that cannot be read in that way."""
    from forethought.rollout.decoder import probe_copies

    name, copies = type(model).__name__, config.model.prefix == "replicated"
    try:
        (probe_copies if copies else enable)(model)
    except ValueError as error:
        if copies:
            raise UserError(f"model.prefix = 'replicated': {name} cannot be trained ({error})") from error
        try:
            probe_copies(model)
        except ValueError as other:
            reasons = f"{error}; with replicated prefixes {other}"
            raise UserError(f"model.path: {name} cannot be trained ({reasons})") from error
        raise UserError(
            f"model.prefix = 'shared': {name} cannot read a document once for all its thoughts ({error}); set "
            "model.prefix to 'replicated'"
        ) from error


def draw_noise(shape: tuple[int, int], generators: list[torch.Generator]) -> Float[Tensor, "batch group thought"]:
    """Uniform numbers, each position's from its own generator: independent of how a batch is split."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators])
