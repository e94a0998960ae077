"""Mixed: supervised training on text with and without thoughts, in one stage; the thoughts are the start's own."""

import copy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from forethought.algo.base import Collected, Sums
from forethought.algo.cpt import CPT, Rows
from forethought.algo.policy_gradient import figures
from forethought.algo.position_sampler import PositionSampler
from forethought.algo.rewards import information_gain
from forethought.config import Config
from forethought.data.corpus import Window
from forethought.data.positions import Positions, ThoughtFormat, make_generator
from forethought.models.compute_copy import Network, compute_copy
from forethought.models.logprobs import chunk_tokens, no_think_logp
from forethought.rollout import Engine, Thoughts, content, draw_noise, work_of
from forethought.rollout.native import native_engine


class Mixed:
    """A cheap supervised rival of RLP (after arXiv:2608.23256): next-token loss on text and on text with good thoughts.

    The start, kept frozen, thinks at the positions that RLP would. Of a window's thoughts the one that gained most
    (eq. 5, by the start itself) is written into the window, if it closed and gained anything; the policy learns
    the window without it and the window with it, thought included. Nothing is compared, and no policy is sampled.
    """

    def __init__(self, network: Network, engine: Engine, form: ThoughtFormat, tokenizer: Any, config: Config):
        self.network, self.form, self.config = network, form, config
        self.start = copy.deepcopy(network.weights).requires_grad_(False)
        if not network.has_adapters:
            compute_copy(self.start, config.model.precision)
        self.engine = native_engine(network.model if network.has_adapters else self.start, form, config)
        self.places = PositionSampler(network, self.start, tokenizer, config)
        self.supervised = CPT(network, engine, form, tokenizer, config)

    def collect(self, windows: list[Window], step: int) -> Collected:
        """The windows, and those with a thought that gained."""
        options, seed = self.config.method, self.config.seed
        positions = self.places.draw(windows, step)
        shape = (options.group, options.thought_length)
        noise = draw_noise(shape, [make_generator(seed, "thoughts", step, i) for i in range(len(positions))])
        with torch.no_grad(), self.network.as_model(self.start) as start:
            thoughts = self.engine.sample(positions, noise)
            nothink = no_think_logp(start, positions, chunk_tokens(start, self.config.update.tokens_per_chunk))[0]
        rewards = information_gain(thoughts, nothink, options, make_generator(seed, "rewards", step))
        assert rewards.total is not None
        kept = best(positions, rewards.total, thoughts.closed, options.min_gain)
        rows = [*windows, *self._with_thoughts(positions, thoughts, kept)]
        learned = self.supervised.collect(rows, step)
        sums: Sums = figures(thoughts, rewards, kept)
        sums["reward/gain"] = sums["reward/mean"]
        work = work_of(positions, thoughts, self.form, self.config, teacher=True)
        work = replace(
            work,
            inner_steps=0,
            kl=False,
            proxy=self.places.flops(windows),
            supervised=tuple(len(r.tokens) for r in rows),
        )
        return Collected(pieces=learned.pieces, sums=sums, thoughts=[], work=work)

    def backward(self, piece: Rows) -> tuple[float, Sums]:
        """Next-token cross-entropy (eq. 1)."""
        return self.supervised.backward(piece)

    def after_step(self) -> None:
        """The start stays."""

    def state(self) -> dict[str, torch.nn.Module]:
        """The start is found again where it was."""
        return {}

    def _with_thoughts(
        self, positions: Positions, thoughts: Thoughts, kept: Bool[Tensor, "batch group"]
    ) -> list[Window]:
        """Each window that has a kept thought, with it: `before x_<t after open c close x_t ...`."""
        inside, contexts = content.inside(thoughts, self.form), positions.contexts()
        found = []
        for i, member in kept.nonzero().tolist():
            window = positions.windows[int(positions.window[i])]
            rest = window.tokens[int(positions.at[i]) :]
            tokens = [*self.form.prompt_tokens(contexts[i]), *inside[i][member], *self.form.close, *rest]
            found.append(replace(window, tokens=tokens, marks={}))
        return found


def best(
    positions: Positions, gains: Float[Tensor, "batch group"], closed: Bool[Tensor, "batch group"], least: float
) -> Bool[Tensor, "batch group"]:
    """True at the thought of each window that gains most, of those that closed and gain more than 0 and `least`."""
    fit = gains.masked_fill(~closed | (gains <= 0) | (gains < least), -torch.inf)
    kept = torch.zeros_like(closed)
    for window in range(len(positions.windows)):
        places = (positions.window == window).nonzero().squeeze(-1)
        if not len(places):
            continue
        some = fit[places]
        top = int(some.argmax())
        if some.flatten()[top] > 0:
            kept[int(places[top // fit.shape[1]]), top % fit.shape[1]] = True
    return kept
