"""The objective as pure functions: advantages (eq. 7), clipped surrogate (eq. 8), KL, next-token loss (eq. 1).

Equation numbers are those of arXiv:2510.01265v1. Everything is float32; log-probabilities are in nats.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def group_advantages(
    rewards: Float[Tensor, "batch group"], kept: Bool[Tensor, "batch group"] | None = None
) -> Float[Tensor, "batch group"]:
    """Credit each thought against its siblings (eq. 7): A_i = G/(G-1) * (r_i - mean(r)), in nats.

    Identical to a leave-one-out baseline, so each group's advantages sum to zero. Thoughts that are not `kept` are
    no one's sibling and get 0; so does the last one kept of a group.
    """
    group = rewards.shape[-1]
    if group < 2:
        raise ValueError(f"comparing thoughts takes a group of at least 2, got {group}")
    rewards = rewards.detach()
    if kept is None:
        return group / (group - 1) * (rewards - rewards.mean(dim=-1, keepdim=True))
    count = kept.sum(dim=-1, keepdim=True)
    mean = rewards.masked_fill(~kept, 0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    advantages = count / (count - 1).clamp(min=1) * (rewards - mean)
    return advantages.masked_fill(~kept | (count < 2), 0)


def batch_advantages(
    rewards: Float[Tensor, "batch group"],
    kept: Bool[Tensor, "batch group"] | None = None,
    everywhere: Callable[[float], float] = lambda here: here,
) -> Float[Tensor, "batch group"]:
    """Compare with the mean reward of all kept thoughts of the step: A_i = r_i - mean(all r). Not in the paper.

    `everywhere` makes a sum over these thoughts one over the whole step, where several processes share it.
    """
    rewards = rewards.detach()
    kept = torch.ones_like(rewards, dtype=torch.bool) if kept is None else kept
    mean = everywhere(float(rewards.masked_fill(~kept, 0).sum())) / max(everywhere(float(kept.sum())), 1.0)
    return (rewards - mean).masked_fill(~kept, 0)


def scale_by_std(
    advantages: Float[Tensor, "batch group"],
    rewards: Float[Tensor, "batch group"],
    kept: Bool[Tensor, "batch group"] | None = None,
) -> Float[Tensor, "batch group"]:
    """Divide by the standard deviation of the group's kept thoughts, as GRPO does: A / (std(r) + 1e-4).

    The paper does not. Of a single thought kept the deviation is 0.
    """
    rewards = rewards.detach()
    if kept is None or bool(kept.all()):
        return advantages / (rewards.std(dim=-1, keepdim=True) + 1e-4)
    count = kept.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = rewards.masked_fill(~kept, 0).sum(dim=-1, keepdim=True) / count
    squares = (rewards - mean).masked_fill(~kept, 0).square().sum(dim=-1, keepdim=True)
    return advantages / ((squares / (count - 1).clamp(min=1)).sqrt() + 1e-4)


def clipped_surrogate(
    ratio: Float[Tensor, "*rows thought"],
    advantages: Float[Tensor, "*rows"],
    mask: Bool[Tensor, "*rows thought"],
    clip: tuple[float, float],
    weight: Float[Tensor, "*rows thought"] | None = None,
    length_norm: str = "thought",
) -> Float[Tensor, "*rows"]:
    """Loss of each thought (eq. 8): -(1/|c|) sum_u min(rho_u A, clip(rho_u, 1-eps_l, 1+eps_h) A), in nats.

    `mask` is True at the tokens that the policy sampled; |c| counts them, at least 1. `clip` is (eps_l, eps_h).
    `weight` multiplies the tokens' terms, see `importance_weight`; None: 1. Without 1/|c| if `length_norm` is "none".
    """
    low, high = clip
    credit = advantages.unsqueeze(-1)
    surrogate = torch.minimum(ratio * credit, ratio.clamp(1 - low, 1 + high) * credit)
    return -over_thought(surrogate if weight is None else surrogate * weight, mask, length_norm)


def importance_weight(
    logp_old: Float[Tensor, "*rows thought"], logp_sampler: Float[Tensor, "*rows thought"], cap: float
) -> Float[Tensor, "*rows thought"]:
    """Truncated importance ratio of each token, min(pi_old / pi_sampler, cap), without a gradient. Not in the paper.

    Corrects for a sampler that is not quite the policy, such as another engine's kernels; the cap bounds the variance.
    """
    return (logp_old - logp_sampler).detach().exp().clamp(max=cap)


def clipped_share(
    ratio: Float[Tensor, "*rows thought"],
    advantages: Float[Tensor, "*rows"],
    mask: Bool[Tensor, "*rows thought"],
    clip: tuple[float, float],
) -> Bool[Tensor, "*rows thought"]:
    """True at sampled tokens whose gradient the clip removes."""
    low, high = clip
    credit = advantages.unsqueeze(-1)
    return (((ratio > 1 + high) & (credit > 0)) | ((ratio < 1 - low) & (credit < 0))) & mask


def kl_to_reference(
    logp: Float[Tensor, "*rows thought"],
    logp_reference: Float[Tensor, "*rows thought"],
    mask: Bool[Tensor, "*rows thought"],
    length_norm: str = "thought",
) -> Float[Tensor, "*rows"]:
    """Token-level KL(policy || reference) of each thought by the k3 estimator: e^d - d - 1, d = logp_ref - logp."""
    difference = (logp_reference - logp).masked_fill(~mask, 0)
    return over_thought(torch.expm1(difference) - difference, mask, length_norm)


def over_thought(
    values: Float[Tensor, "*rows thought"], mask: Bool[Tensor, "*rows thought"], length_norm: str = "thought"
) -> Float[Tensor, "*rows"]:
    """Mean over the sampled tokens of each thought (1/|c|, never over the whole batch), or the sum for "none"."""
    total = values.masked_fill(~mask, 0).sum(dim=-1)
    return total if length_norm == "none" else total / mask.sum(dim=-1).clamp(min=1)


def next_token_loss(logp: Float[Tensor, "row token"], mask: Bool[Tensor, "row token"]) -> Float[Tensor, ""]:
    """Summed next-token cross-entropy (eq. 1) over the True places of `mask`; the caller divides by the count."""
    return -logp.masked_fill(~mask, 0).sum()
