"""The update that RLP and RPT share: advantages (eq. 7), the clipped surrogate (eq. 8), the prediction term.

With method.prediction_weight w the loss of a thought is that of eq. 8 minus w sum_k gamma^k log p(x_t+k | x_<t, c, ...)
with its gradient: what is predicted after a thought is trained beside the choice of the thought. Not in the paper.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forethought.algo.metrics import Sums, ThoughtRecord, add_sums
from forethought.algo.objective import (
    batch_advantages,
    clipped_share,
    clipped_surrogate,
    group_advantages,
    importance_weight,
    kl_to_reference,
    scale_by_std,
)
from forethought.algo.rewards import Rewards, discounted
from forethought.config import Config, UserError
from forethought.data.positions import ThoughtFormat
from forethought.models.compute_copy import Network
from forethought.models.logprobs import ScoringOptions, ThoughtBatch, chunk_tokens, forward_backward, thought_logp
from forethought.rollout import thought_tokens
from forethought.run import distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """The thoughts of some documents with what the loss needs, one row per thought. Nothing here carries a gradient."""

    batch: ThoughtBatch  # documents, positions, sampled tokens and their mask
    logp_sampler: Float[Tensor, "row thought"]  # at the sampling temperature, nats; 0 where masked
    logp_old: Float[Tensor, "row thought"] | None  # the policy's, before the first inner step; None: the current one
    logp_reference: Float[Tensor, "row thought"] | None  # the frozen start's, where there is a KL to it
    advantage: Float[Tensor, " row"]  # nats
    kept: Bool[Tensor, " row"]  # thoughts that are trained on: the others have no term of the loss
    scale: float  # 1 / thoughts of the whole step: losses of all microbatches add up to the mean
    prediction_weight: Float[Tensor, " row"] | None = None  # of the prediction term; None: there is none

    def terms(self) -> "dict[str, Microbatch]":
        """The microbatch with one term of the loss each; nothing where there is only one."""
        if self.prediction_weight is None:
            return {}
        return {
            "policy": replace(self, prediction_weight=None),
            "prediction": replace(self, advantage=torch.zeros_like(self.advantage), logp_reference=None),
        }


def compute_advantages(
    rewards: Rewards, closed: Bool[Tensor, "batch group"], config: Config
) -> tuple[Float[Tensor, "batch group"], Bool[Tensor, "batch group"]]:
    """Advantages (eq. 7) in nats, and which thoughts are kept.

    A shift-invariant baseline never uses the teacher's score, so that it cancels to the bit.
    """
    options = config.method
    kept = closed if options.unclosed == "drop" else torch.ones_like(rewards.value, dtype=torch.bool)
    compared = rewards.value if config.shift_invariant else rewards.total
    if compared is None:
        raise UserError(f"method.reward = {options.reward!r}: returned no shift, which these method options need")
    if not config.shift_invariant:
        kept = kept & ~(compared.amax(dim=1, keepdim=True) < options.min_gain)  # NaN stays, and stops the run
    if options.clamp_gain:
        compared = compared.clamp(min=0)
    if options.baseline == "group":
        advantages = group_advantages(compared, None if bool(kept.all()) else kept)
    elif options.baseline == "batch":
        advantages = batch_advantages(compared, kept, lambda value: sum(distributed.all_gather(value)))
    else:
        advantages = compared.masked_fill(~kept, 0)
    return scale_by_std(advantages, compared, kept) if options.scale == "std" else advantages, kept


class PolicyGradient:
    """Line 13 of Algorithm 1: the clipped surrogate on sampled tokens (eq. 8), plus a KL to `reference` if given."""

    def __init__(self, network: Network, form: ThoughtFormat, config: Config, reference: Any):
        self.network, self.form, self.config, self.reference = network, form, config, reference
        self.policy = network.model
        self.scoring = ScoringOptions(
            temperature=config.method.temperature,
            tokens=chunk_tokens(self.policy, config.update.tokens_per_chunk),
            shared=config.model.prefix == "shared",
            checkpointing=config.update.checkpointing,
            compiled=config.update.compile,
            triton=config.update.attention == "triton",
        )

    def microbatches(self, record: ThoughtRecord) -> list[Microbatch]:
        """Whole documents with their thoughts, as many at a time as update.tokens_per_chunk allows."""
        positions, sampled, advantages = record.shard.positions, record.sampled, record.advantages
        weight, group = self.config.method.prediction_weight, advantages.shape[1]
        contents = thought_tokens(record.thoughts, self.form) if weight else []
        longest = max(len(window.tokens) for window in positions.windows)
        pieces, start = [], 0
        for chunk in positions.chunks(max(1, self.config.method.positions * (self.scoring.tokens // longest))):
            rows = slice(start, start := start + len(chunk))
            batch = ThoughtBatch.from_positions(self.form, chunk, sampled.tokens[rows], sampled.mask[rows])
            pieces.append((chunk, rows, batch))
        old = reference = [None] * len(pieces)
        if self.config.method.inner_steps > 1:
            old = [thought_logp(self.policy, self.form, batch, self.scoring) for *_, batch in pieces]
        if self.reference is not None:
            with self.network.swapped_weights(self.reference) as model:
                reference = [thought_logp(model, self.form, batch, self.scoring) for *_, batch in pieces]
        found, soft = [], record.soft_targets
        for (chunk, rows, batch), logp_old, logp_reference in zip(pieces, old, reference, strict=True):
            kept, targets = record.kept[rows].flatten(), None if soft is None else soft[rows]
            microbatch = Microbatch(
                batch=batch.with_targets(self.form, chunk, contents[rows], targets) if weight else batch,
                logp_sampler=sampled.logp[rows].flatten(0, 1),
                logp_old=logp_old,
                logp_reference=logp_reference,
                advantage=advantages[rows].flatten(),
                kept=kept,
                scale=1 / (record.shard.global_count * group),
                prediction_weight=weight * kept.float() if weight else None,
            )
            found.append(microbatch)
        return found

    def forward_backward(self, microbatch: Microbatch) -> tuple[float, Sums]:
        """Add the microbatch's gradients. Returns its part of the loss and its metrics."""
        total, sums = 0.0, Sums()

        def loss(
            logp: Float[Tensor, "row thought"], evidence: Float[Tensor, "row horizon"], rows: Int[Tensor, " row"]
        ) -> Float[Tensor, ""]:
            nonlocal total
            losses, more = self._surrogate(microbatch, logp, rows)
            if microbatch.prediction_weight is not None:
                surprise = -discounted(evidence, self.config.method.discount)
                losses = losses + microbatch.prediction_weight[rows] * surprise
                more["objective/prediction_loss"] = (float(surprise.detach().sum()), len(surprise))
            value = losses.sum() * microbatch.scale
            total += float(value.detach())
            add_sums(sums, more)
            return value

        forward_backward(self.policy, self.form, microbatch.batch, self.scoring, loss)
        return total, sums

    def _surrogate(self, microbatch: Microbatch, logp: Tensor, rows: Tensor) -> tuple[Float[Tensor, " row"], Sums]:
        """The policy term of some thoughts of a microbatch, from their log-probabilities under the policy."""
        options, width = self.config.method, logp.shape[1]
        mask, advantage = microbatch.batch.mask[rows, :width], microbatch.advantage[rows]
        sampler = microbatch.logp_sampler[rows, :width]
        old = logp.detach() if microbatch.logp_old is None else microbatch.logp_old[rows, :width]
        ratio = (logp - old).exp()
        clip = (options.clip_low, options.clip_high)
        tokens = float(mask.sum())
        sums: Sums = {}
        weight = None
        if cap := self.config.rollout.importance_cap:
            weight = importance_weight(old, sampler, cap)
            sums["objective/importance_weight"] = (float(weight[mask].sum()), tokens)
        losses = clipped_surrogate(ratio, advantage, mask, clip, weight, options.length_norm)
        if microbatch.logp_reference is not None:
            kl = kl_to_reference(logp, microbatch.logp_reference[rows, :width], mask, options.length_norm)
            losses = losses + options.kl_weight * kl * microbatch.kept[rows]
            sums["objective/kl"] = (float(kl.detach().sum()), len(kl))
        with torch.no_grad():
            mismatch = (logp - sampler).abs()
            clipped = clipped_share(ratio, advantage, mask, clip)
            sums |= {
                "objective/ratio": (float(ratio[mask].sum()), tokens),
                "objective/clip_fraction": (float(clipped.sum()), tokens),
                "objective/mismatch": (float(mismatch[mask].sum()), tokens),
            }
        return losses, sums
