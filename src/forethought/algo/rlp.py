"""RLP (arXiv:2510.01265): `collect` is lines 7 to 12 of Algorithm 1, `forward_backward` line 13."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forethought.algo.metrics import PositionShard, ThoughtRecord
from forethought.algo.policy_gradient import PolicyGradient, compute_advantages
from forethought.algo.position_sampler import PositionSampler
from forethought.algo.rewards import Predictions, Reward, RewardInputs, Rewards, apply_unclosed_penalty, as_rewards
from forethought.config import Config, registry
from forethought.data.corpus import Window
from forethought.data.positions import Positions, ThoughtFormat, make_generator
from forethought.models.compute_copy import Network, Teacher
from forethought.models.logprobs import no_think_distribution, no_think_logp
from forethought.rollout import Engine, Thoughts, draw_noise


class RLP(PolicyGradient):
    """Reinforcement learning pretraining: thoughts are rewarded by the information they add about the next token."""

    keeps_start = False  # whether a frozen copy of the start is kept, even without a KL to it

    def __init__(self, network: Network, engine: Engine, form: ThoughtFormat, tokenizer: Any, config: Config):
        frozen = config.method.kl_weight or self.keeps_start
        start = copy.deepcopy(network.weights).requires_grad_(False) if frozen else None
        super().__init__(network, form, config, start)
        self.engine, self.tokenizer = engine, tokenizer
        self.teacher = Teacher(network.weights, config.method.ema) if self.uses_teacher(config) else None
        self.position_sampler = PositionSampler(network, start, form, tokenizer, config)
        self.reward: Reward = registry.load("reward", config.method.reward_name)

    def collect(self, windows: list[Window], step: int) -> ThoughtRecord:
        """Sample G thoughts at each position, score the true tokens with and without them, compare the thoughts."""
        shard = self.position_sampler.shard(windows, step)  # positions t
        thoughts, sampled, predictions = self.sample(shard, step)  # c ~ pi_theta(. | x_<t), log p_theta(x_t | x_<t, c)
        plain, soft_targets = self.teacher_scores(shard.positions, step)  # log p_phi(x_t | x_<t) (eq. 4)
        rewards = self.rewards(shard, thoughts, plain, predictions, step)  # r(c) (eq. 5)
        advantages, kept = compute_advantages(rewards, thoughts.closed, self.config)  # A(c) (eq. 7)
        if self.warms_up(step):
            advantages = torch.zeros_like(advantages)
        return ThoughtRecord(
            shard=shard,
            thoughts=thoughts,
            sampled=sampled,
            no_think_logp=plain,
            rewards=rewards,
            advantages=advantages,
            kept=kept,
            predictions=predictions,
            soft_targets=soft_targets,
        )

    def after_step(self) -> None:
        """Line 15: the EMA teacher follows the policy."""
        if self.teacher is not None and not self.config.method.freeze_teacher:
            self.teacher.update(self.network.weights)

    def state(self) -> dict[str, torch.nn.Module]:
        """The networks that a checkpoint must hold: the teacher and the KL reference, where there are any."""
        networks = {} if self.teacher is None else {"teacher": self.teacher.model}
        return networks if self.reference is None else {**networks, "reference": self.reference}

    @staticmethod
    def uses_teacher(config: Config) -> bool:
        """Whether there is an EMA teacher, to measure the reward against and for method.distillation."""
        return config.method.teacher_every > 0

    def warms_up(self, step: int) -> bool:
        """Whether a step trains the prediction term (and any KL), but not the choice of thoughts."""
        return step <= self.config.method.warmup_steps

    def sample(self, shard: PositionShard, step: int) -> tuple[Thoughts, Thoughts, Predictions | None]:
        """The thoughts, the tokens that are trained on, and the predictions after the thoughts, which RLP has not."""
        thoughts = self.engine.sample(
            shard.positions, self.noise("thoughts", self.config.method.thought_length, shard, step)
        )
        return thoughts, thoughts, None

    def noise(self, purpose: str, length: int, shard: PositionShard, step: int) -> Float[Tensor, "batch group thought"]:
        """Uniform numbers that draw the tokens; each position has a generator of its own."""
        seed, group = self.config.seed, self.config.method.group
        return draw_noise((group, length), [make_generator(seed, purpose, step, i) for i in shard.global_indices])

    def teacher_scores(
        self, positions: Positions, step: int
    ) -> tuple[Float[Tensor, "batch horizon"] | None, Float[Tensor, "batch horizon vocab"] | None]:
        """No-think log-evidence of the teacher, on the first and every teacher_every-th step.

        With method.distillation also the soft targets: its distribution at each target, mixed with the target.
        """
        every, share = self.config.method.teacher_every, self.config.method.distillation
        if self.teacher is None or (step % every and step != 1):
            return None, None
        at_once = self.scoring.tokens
        with torch.no_grad(), self.network.swapped_weights(self.teacher.model) as teacher:
            if not share:
                return no_think_logp(teacher, positions, at_once)[0], None
            soft_targets = no_think_distribution(teacher, positions, at_once, positions.horizon)
            targets = positions.targets().to(soft_targets.device)[..., None]
            logp = soft_targets.gather(-1, targets)
            soft_targets.exp_().mul_(share).scatter_add_(-1, targets, torch.full_like(logp, 1 - share))
            return logp.squeeze(-1), soft_targets

    def rewards(
        self,
        shard: PositionShard,
        thoughts: Thoughts,
        plain: Float[Tensor, "batch horizon"] | None,
        predictions: Predictions | None,
        step: int,
    ) -> Rewards:
        """method.reward of each thought, less the penalty of unclosed ones where there is one."""
        inputs = RewardInputs(
            thoughts=thoughts,
            positions=shard.positions,
            tokenizer=self.tokenizer,
            no_think_logp=plain,
            options=self.config.method,
            generator=make_generator(self.config.seed, "rewards", step),
            global_indices=shard.global_indices,
            predictions=predictions,
        )
        rewards = as_rewards(self.reward(inputs), inputs, self.config.method.reward)
        return apply_unclosed_penalty(rewards, thoughts.closed, self.config.method)


class Warmup(RLP):
    """The warm start of RLP (after arXiv:2602.03979, section 3.4): only the prediction term (and any KL).

    Thoughts are the policy's own and stay as they are; the text after them is learned, over method.horizon tokens.
    """

    def warms_up(self, step: int) -> bool:
        """Always."""
        return True
