"""What every method that thinks has in common: compare what thoughts earned, learn from their tokens, tell of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forethought.algo.base import Sums, add
from forethought.algo.objective import (
    batch_advantages,
    clipped_share,
    clipped_surrogate,
    group_advantages,
    importance_weight,
    kl_to_reference,
    scale_by_std,
)
from forethought.algo.rewards import Rewards
from forethought.config import Config, Method
from forethought.data.positions import Positions, ThoughtFormat
from forethought.models.compute_copy import Network
from forethought.models.logprobs import ScoringOptions, ThoughtBatch, chunk_tokens, forward_backward, thought_logp
from forethought.rollout import Thoughts, content
from forethought.run import distributed

FLAT = 1e-3  # nats; a group whose rewards spread less than this has nothing to teach


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the policy sampled and is to learn from: thoughts, and in RPT what it wrote behind them."""

    tokens: Int[Tensor, "batch group thought"]  # padded on the right
    mask: Bool[Tensor, "batch group thought"]  # True at sampled tokens; at least one each
    logp: Float[Tensor, "batch group thought"]  # the sampler's, at its temperature, nats; 0 where masked


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """The thoughts of some documents with what the loss needs, one row a thought. Nothing here carries a gradient."""

    continuations: ThoughtBatch  # documents, places, sampled tokens and their mask
    logp_sampler: Float[Tensor, "row thought"]  # at the sampling temperature, nats; 0 where masked
    logp_old: Float[Tensor, "row thought"] | None  # the trainer's, before the first inner step; None: the current one
    logp_reference: Float[Tensor, "row thought"] | None  # the frozen start's, where there is a KL to it
    advantage: Float[Tensor, " row"]  # nats
    share: float  # 1 / thoughts of the whole step: losses of all pieces add up to the mean


class Learner:
    """Line 13: the clipped surrogate on sampled tokens (eq. 8), plus KL to `reference` where there is one."""

    def __init__(self, network: Network, form: ThoughtFormat, config: Config, reference: Any):
        self.network, self.form, self.config, self.reference = network, form, config, reference
        self.policy = network.compute
        self.reading = ScoringOptions(
            temperature=config.method.temperature,
            tokens=chunk_tokens(self.policy, config.update.tokens_per_chunk),
            shared=config.model.prefix == "shared",
            checkpointing=config.update.checkpointing,
        )

    def pieces(
        self, positions: Positions, sampled: Sampled, advantages: Float[Tensor, "batch group"], whole: int
    ) -> list[Experience]:
        """The thoughts, whole documents together, as many as update.tokens_per_chunk lets one read.

        `whole` is how many positions the step has in all processes.
        """
        reading, group = self.reading, advantages.shape[1]
        longest = max(len(window.tokens) for window in positions.windows)
        pieces, start = [], 0
        for chunk in positions.chunks(max(1, self.config.method.positions * (reading.tokens // longest))):
            end = start + len(chunk)
            some = slice(start, end)
            continuations = ThoughtBatch.of(self.form, chunk, sampled.tokens[some], sampled.mask[some])
            piece = Experience(
                continuations=continuations,
                logp_sampler=sampled.logp[some].flatten(0, 1),
                logp_old=None,
                logp_reference=None,
                advantage=advantages[some].flatten(),
                share=1 / (whole * group),
            )
            if self.config.method.inner_steps > 1:
                piece = replace(piece, logp_old=thought_logp(self.policy, self.form, continuations, reading))
            if self.reference is not None:
                with self.network.swapped_weights(self.reference) as reference:
                    logp = thought_logp(reference, self.form, continuations, reading)
                piece = replace(piece, logp_reference=logp)
            pieces.append(piece)
            start = end
        return pieces

    def backward(self, piece: Experience) -> tuple[float, Sums]:
        """Add the piece's gradients: its loss and its figures."""
        total, sums = 0.0, Sums()

        def loss(logp: Float[Tensor, "row thought"], rows: Int[Tensor, " row"]) -> Float[Tensor, ""]:
            nonlocal total
            value, more = self._surrogate(piece, logp, rows)
            total += float(value.detach())
            add(sums, more)
            return value

        forward_backward(self.policy, self.form, piece.continuations, self.reading, loss)
        return total, sums

    def _surrogate(self, piece: Experience, logp: Tensor, rows: Tensor) -> tuple[Float[Tensor, ""], Sums]:
        """The loss of some thoughts of a piece, from their log-probabilities under the policy."""
        options = self.config.method
        width = logp.shape[1]
        mask, advantage = piece.continuations.mask[rows, :width], piece.advantage[rows]
        old = logp.detach() if piece.logp_old is None else piece.logp_old[rows, :width]
        ratio = (logp - old).exp()
        clip = (options.clip_low, options.clip_high)
        tokens = float(mask.sum())
        sums: Sums = {}
        weight = None
        if cap := self.config.rollout.importance_cap:
            weight = importance_weight(old, piece.logp_sampler[rows, :width], cap)
            sums["objective/importance"] = (float(weight[mask].sum()), tokens)
        losses = clipped_surrogate(ratio, advantage, mask, clip, weight)
        if piece.logp_reference is not None:
            kl = kl_to_reference(logp, piece.logp_reference[rows, :width], mask)
            losses = losses + options.kl_weight * kl
            sums["objective/kl"] = (float(kl.detach().sum()), len(kl))
        with torch.no_grad():
            gap = (logp - piece.logp_sampler[rows, :width]).abs()
            sums |= {
                "objective/ratio": (float(ratio[mask].sum()), tokens),
                "objective/clipped": (float(clipped_share(ratio, advantage, mask, clip).sum()), tokens),
                "objective/mismatch": (float(gap[mask].sum()), tokens),
            }
        return losses.sum() * piece.share, sums


def own(everywhere: Positions, form: ThoughtFormat, options: Method) -> tuple[Positions, list[int]]:
    """The positions of a step that this process works on, whole documents, and their numbers in the step.

    Documents are dealt by what they take at most: their tokens up to the last place, and the thoughts at all places.
    """
    thoughts = options.group * (form.overhead + options.thought_length)
    weights = [0] * len(everywhere.windows)
    for window in everywhere.window.tolist():
        weights[window] += thoughts
    texts, _ = form.documents(everywhere)
    for window, text in zip(dict.fromkeys(everywhere.window.tolist()), texts, strict=True):
        weights[window] += len(text)
    return everywhere.of_windows(distributed.shard_indices(weights))


def compare(
    rewards: Rewards, closed: Bool[Tensor, "batch group"], config: Config
) -> tuple[Float[Tensor, "batch group"], Bool[Tensor, "batch group"]]:
    """Compare (eq. 7): advantages, and which thoughts were kept.

    A shift-invariant comparison never sees the teacher, so that it cancels to the bit.
    """
    options = config.method
    kept = torch.ones_like(rewards.value, dtype=torch.bool)
    if options.unclosed == "drop":
        kept = closed
    compared = rewards.value if config.shift_invariant else rewards.total
    assert compared is not None
    if options.clamp_gain:
        compared = compared.clamp(min=0)
    if not config.shift_invariant:
        kept = kept & (compared.amax(dim=1, keepdim=True) >= options.min_gain)
    if options.baseline == "group":
        advantages = group_advantages(compared, None if bool(kept.all()) else kept)
    elif options.baseline == "batch":
        advantages = batch_advantages(compared, kept, lambda here: sum(distributed.gather(here)))
    else:
        advantages = compared.masked_fill(~kept, 0)
    return scale_by_std(advantages, compared) if options.scale == "std" else advantages, kept


def apply_unclosed_penalty(rewards: Rewards, closed: Bool[Tensor, "batch group"], config: Config) -> Rewards:
    """The rewards, less for unclosed thoughts where that was asked for."""
    options = config.method
    if options.unclosed != "penalize":
        return rewards
    return replace(rewards, value=rewards.value - options.unclosed_penalty * ~closed)


def figures(thoughts: Thoughts, rewards: Rewards, kept: Bool[Tensor, "batch group"]) -> Sums:
    """What docs/metrics.md calls rollout/* and reward/* and every method has, as (sum, count)."""
    count = kept.numel()
    sums: Sums = {
        "rollout/length": (float(thoughts.lengths.sum()), count),
        "rollout/closed": (float(thoughts.closed.sum()), count),
        "rollout/kept": (float(kept.sum()), count),
        "rollout/tokens": (float(thoughts.mask.sum()), 1 / distributed.world_size()),  # of the step, not of a process
        "reward/evidence": (float(thoughts.evidence[..., 0].sum()), count),
    }
    if rewards.value.shape[1] > 1:
        spread = rewards.value.std(dim=1)
        sums["reward/spread"] = (float(spread.sum()), spread.numel())
        sums["reward/flat_groups"] = (float((spread < FLAT).sum()), spread.numel())
    if rewards.total is not None:
        sums["reward/mean"] = (float(rewards.total.sum()), count)
    return sums


def leakage(tokenizer: Any, positions: Positions, thoughts: Thoughts, form: ThoughtFormat) -> tuple[float, int]:
    """Thoughts whose text, without the closing delimiter, contains the target token's text; and all of them."""
    said = content.texts(tokenizer, content.inside(thoughts, form))
    shares = content.leakage(tokenizer, positions.targets()[:, 0].tolist(), said)
    return sum(share or 0.0 for share in shares) * len(said[0]), thoughts.closed.numel()


def describe(
    tokenizer: Any, positions: Positions, thoughts: Thoughts, columns: Mapping[str, Tensor | Sequence[Any]], count: int
) -> list[dict[str, Any]]:
    """The first few positions of a step in words, for thoughts.jsonl.

    `columns` are further figures of each thought, by position and member.
    """
    decode = tokenizer.decode
    contexts, targets = positions.contexts(), positions.targets()
    rows = []
    for i in range(min(len(positions), count)):
        members = [
            {
                "text": decode(thoughts.tokens[i, g][thoughts.mask[i, g]].tolist()),
                "length": int(thoughts.lengths[i, g]),
                "closed": bool(thoughts.closed[i, g]),
                "evidence": float(thoughts.evidence[i, g, 0]),
                **{name: float(x[i, g]) if isinstance(x, Tensor) else x[i][g] for name, x in columns.items()},
            }
            for g in range(thoughts.closed.shape[1])
        ]
        window = positions.windows[int(positions.window[i])]
        rows.append(
            {
                "document": window.document,
                "position": int(positions.at[i]) + window.start,
                "context": decode(contexts[i][-200:]),
                "target": decode(targets[i].tolist()),
                "nothink": None,
                "thoughts": members,
            }
        )
    return rows
