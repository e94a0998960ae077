"""Rewards of thoughts: the information gain (eq. 5), RPT's prefix match, and the random control.

A reward is a function of `RewardInputs` that returns `Rewards`, or a tensor (batch, group). One more is one function
and one entry in `forethought.config.registry`, or `--method.reward my_file:my_reward` for code outside the package.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forethought.config import Method, UserError
from forethought.data.positions import Positions
from forethought.rollout import Thoughts


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """r = value - shift. The shift is one number for a whole group, so it cancels in group-relative advantages.

    Keeping the two apart lets it cancel exactly, and not only up to rounding.
    """

    value: Float[Tensor, "batch group"]  # what differs between the thoughts of a position, nats
    shift: Float[Tensor, " batch"] | None  # what does not; None where the teacher was not evaluated

    @property
    def total(self) -> Float[Tensor, "batch group"] | None:
        """The reward itself; None where the shift is unknown."""
        return None if self.shift is None else self.value - self.shift[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """The predictions that RPT samples after its thoughts."""

    tokens: list[list[list[int]]]  # of each thought, without method.end; empty where there is no prediction
    trained: Int[Tensor, "batch group"]  # tokens of each that the policy is trained on, a sampled method.end included
    match: Float[Tensor, "batch group"]  # 1 where the prediction matches the text, else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInputs:
    """What a reward may use. Positions and thoughts are those of this rank."""

    thoughts: Thoughts  # with evidence: log p(x_t+k | x_<t, c), nats, (batch, group, horizon)
    positions: Positions  # contexts() and targets() give the tokens around each thought
    tokenizer: Any
    no_think_logp: Float[Tensor, "batch horizon"] | None  # the teacher's (eq. 4), nats; None where not evaluated
    options: Method
    generator: torch.Generator  # seeded by the run's seed and the step, the same on every rank
    global_indices: Sequence[int]  # of these positions among all positions of the step
    predictions: Predictions | None = None  # what RPT sampled after the thoughts


Reward = Callable[[RewardInputs], Rewards | Tensor]


def information_gain(inputs: RewardInputs) -> Rewards:
    """The paper's reward (eq. 5): r(c) = log p_theta(x_t | x_<t, c) - log p_phi(x_t | x_<t), in nats.

    With a horizon of several tokens both terms are sums discounted by gamma^k.
    """
    discount, plain = inputs.options.discount, inputs.no_think_logp
    value = discounted(inputs.thoughts.evidence, discount)
    return Rewards(value=value, shift=None if plain is None else discounted(plain, discount))


def prefix_match_reward(inputs: RewardInputs) -> Rewards:
    """RPT's reward: 1 where the prediction matches the text (see `prefix_match`), else 0."""
    assert inputs.predictions is not None, "method rpt samples predictions"
    match = inputs.predictions.match
    return Rewards(value=match, shift=torch.zeros_like(match[:, 0]))


def random_reward(inputs: RewardInputs) -> Rewards:
    """The control: standard normal numbers. What a run gains with these is not due to the method."""
    group, generator, device = inputs.thoughts.closed.shape[1], inputs.generator, inputs.thoughts.evidence.device
    # A position's numbers must not depend on how positions are sharded, so those of other ranks are drawn as well.
    rows = [torch.randn(group, generator=generator) for _ in range(max(inputs.global_indices, default=-1) + 1)]
    value = torch.stack([rows[number] for number in inputs.global_indices]).to(device)
    return Rewards(value=value, shift=torch.zeros_like(value[:, 0]))


def as_rewards(found: Any, inputs: RewardInputs, name: str) -> Rewards:
    """What a reward function returned, a tensor as `Rewards` without a shift. Raises UserError for anything else.

    NaN and infinity are refused, unless the evidence has them too: then the model is at fault, not the reward.
    """
    given = [one for one in (inputs.thoughts.evidence, inputs.no_think_logp) if one is not None]
    sound, device = all(bool(one.isfinite().all()) for one in given), given[0].device

    def checked(part: Any, shape: tuple[int, ...], of: str) -> Tensor:
        says = f"method.reward = {name!r}: returned "
        if not isinstance(part, Tensor):
            raise UserError(f"{says}a {type(part).__name__}, must be a tensor {shape}")
        if tuple(part.shape) != shape:
            raise UserError(f"{says}shape {tuple(part.shape)}, must be {shape}, one for each of the {of}")
        part = part.detach().float()
        if sound and (bad := int((~part.isfinite()).sum())):
            raise UserError(f"{says}NaN or infinity for {bad} of {part.numel()} {of}")
        return part.to(device)

    shape = tuple(inputs.thoughts.closed.shape)
    if not isinstance(found, Rewards):
        value = checked(found, shape, "thoughts")
        return Rewards(value=value, shift=value.new_zeros(len(value)))
    shift = None if found.shift is None else checked(found.shift, shape[:1], "positions")
    return Rewards(value=checked(found.value, shape, "thoughts"), shift=shift)


def apply_unclosed_penalty(rewards: Rewards, closed: Bool[Tensor, "batch group"], options: Method) -> Rewards:
    """Subtract method.unclosed_penalty from the reward of thoughts that were cut off, with method.unclosed penalize."""
    if options.unclosed != "penalize":
        return rewards
    return replace(rewards, value=rewards.value - options.unclosed_penalty * ~closed)


def prefix_match(prediction: Sequence[bytes], truth: Iterable[bytes]) -> bool:
    """Whether a prediction is a prefix of the true text that ends on one of its token boundaries (arXiv:2506.08007).

    Both are the bytes of consecutive tokens: [b" under"] matches [b" un", b"der", b" red"], [b" u"] ends inside a
    token, and a prediction without bytes does not match.
    """
    wanted = b"".join(prediction)
    found, tokens = b"", iter(truth)
    while len(found) < len(wanted):
        token = next(tokens, None)
        if token is None:
            return False
        found += token
    return bool(wanted) and found == wanted


def discounted(logp: Float[Tensor, "*rows horizon"], discount: float) -> Float[Tensor, "*rows"]:
    """sum_k gamma^k log p(x_t+k | ...), nats; at horizon 1 the log-probability itself."""
    weights = discount ** torch.arange(logp.shape[-1], device=logp.device)
    return (logp * weights).sum(dim=-1)
