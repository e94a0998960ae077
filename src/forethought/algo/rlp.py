"""RLP. `collect` is lines 7 to 12 of Algorithm 1, `backward` line 13."""

import copy
import time
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forethought.algo.base import Collected, Sums
from forethought.algo.policy_gradient import (
    Experience,
    Learner,
    Sampled,
    apply_unclosed_penalty,
    compare,
    describe,
    figures,
    leakage,
    own,
)
from forethought.algo.position_sampler import PositionSampler
from forethought.algo.rewards import REWARDS, Rewards
from forethought.config import Config
from forethought.data.corpus import Window
from forethought.data.positions import Positions, ThoughtFormat, make_generator
from forethought.models.compute_copy import Network
from forethought.models.logprobs import no_think_logp
from forethought.models.teacher import Teacher
from forethought.rollout import Engine, Thoughts, draw_noise, work_of


class RLP:
    """Reinforcement learning pretraining (arXiv:2510.01265, Algorithm 1)."""

    def __init__(self, network: Network, engine: Engine, form: ThoughtFormat, tokenizer: Any, config: Config):
        self.network, self.engine, self.form, self.tokenizer, self.config = network, engine, form, tokenizer, config
        options = config.method
        self.teacher = Teacher(network.weights, options.ema) if options.teacher_every else None
        self.reference = copy.deepcopy(network.weights).requires_grad_(False) if options.kl_weight else None
        self.learner = Learner(network, form, config, self.reference)
        self.places = PositionSampler(network, self.reference, tokenizer, config)

    def collect(self, windows: list[Window], step: int) -> Collected:
        """Sample G thoughts at each position, score them, compare them."""
        started = time.perf_counter()
        options, seed = self.config.method, self.config.seed
        everywhere = self.places.draw(windows, step)
        positions, numbers = own(everywhere, self.form, options)
        shape = (options.group, options.thought_length)
        noise = draw_noise(shape, [make_generator(seed, "thoughts", step, i) for i in numbers])
        thoughts = self.engine.sample(positions, noise)
        sampled = time.perf_counter()
        nothink = self._nothink(positions, step)
        rewards = self._rewards(thoughts, nothink, step, numbers)
        advantages, kept = compare(rewards, thoughts.closed, self.config)
        tokens = Sampled(tokens=thoughts.tokens, mask=thoughts.mask, logp=thoughts.logp)
        pieces = self.learner.pieces(positions, tokens, advantages, len(everywhere))
        sums = figures(thoughts, rewards, kept) | _gain(thoughts, nothink)
        sums["time/rollout_s"] = (sampled - started, 1)
        sums["time/score_s"] = (time.perf_counter() - sampled, 1)
        rows = []
        if self.config.train.logs(step):
            logged = sum(number < self.config.train.log_thoughts for number in numbers)
            sums["rollout/leakage"] = leakage(self.tokenizer, positions, thoughts, self.form)
            columns = {"reward": rewards.value if rewards.total is None else rewards.total, "advantage": advantages}
            rows = describe(self.tokenizer, positions, thoughts, columns, logged)
            if nothink is not None:
                rows = [{**row, "nothink": float(plain)} for row, plain in zip(rows, nothink[:, 0], strict=False)]
        work = work_of(positions, thoughts, self.form, self.config, teacher=nothink is not None)
        work = replace(work, proxy=self.places.flops(positions.windows))
        rows = [{"step": step, "number": number, **row} for number, row in zip(numbers, rows, strict=False)]
        return Collected(pieces=pieces, sums=sums, thoughts=rows, work=work)

    def backward(self, piece: Experience) -> tuple[float, Sums]:
        """The clipped surrogate on thought tokens (eq. 8), plus KL where asked for: loss of the piece, its figures."""
        return self.learner.backward(piece)

    def after_step(self) -> None:
        """Line 15: the teacher follows the policy; the engine takes the new weights."""
        if self.teacher is not None and not self.config.method.freeze_teacher:
            self.teacher.update(self.network.weights)
        self.engine.sync()

    def state(self) -> dict[str, torch.nn.Module]:
        """Teacher and KL reference, where there are any."""
        networks = {} if self.teacher is None else {"teacher": self.teacher.model}
        return networks if self.reference is None else {**networks, "reference": self.reference}

    def _nothink(self, positions: Positions, step: int) -> Float[Tensor, "batch horizon"] | None:
        every = self.config.method.teacher_every
        if self.teacher is None or (step % every and step != 1):
            return None
        with torch.no_grad(), self.network.swapped_weights(self.teacher.model) as teacher:
            return no_think_logp(teacher, positions, self.learner.reading.tokens)[0]

    def _rewards(
        self,
        thoughts: Thoughts,
        nothink: Float[Tensor, "batch horizon"] | None,
        step: int,
        numbers: list[int] | None = None,
    ) -> Rewards:
        generator = make_generator(self.config.seed, "rewards", step)
        rewards = REWARDS[self.config.method.reward_name](thoughts, nothink, self.config.method, generator, numbers)
        return apply_unclosed_penalty(rewards, thoughts.closed, self.config)


def _gain(thoughts: Thoughts, nothink: Float[Tensor, "batch horizon"] | None) -> Sums:
    """What only a teacher's answer can tell."""
    if nothink is None:
        return {}
    evidence, plain = thoughts.evidence[..., 0], nothink[:, 0]
    return {
        "reward/nothink": (float(plain.sum()), plain.numel()),
        "reward/gain": (float(evidence.sum() - plain.sum() * evidence.shape[1]), evidence.numel()),
    }
