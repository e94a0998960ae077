"""RPT: a thought, then a written prediction that is right or wrong. The baseline of a verifiable reward."""

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

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
from forethought.algo.rewards import REWARDS, Rewards, prefix_match
from forethought.config import Config, UserError
from forethought.data.corpus import Window
from forethought.data.positions import Positions, ThoughtFormat, make_generator
from forethought.data.token_bytes import TokenBytes
from forethought.flops import Work
from forethought.models.compute_copy import Network
from forethought.rollout import Responses, Writer, draw_noise, work_of
from forethought.run import distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What was written behind the thoughts of a step, taken apart."""

    tokens: list[list[list[int]]]  # of each thought, without method.end; empty where there is no prediction
    learned: Int[Tensor, "batch group"]  # written tokens that the policy learns from, a sampled method.end included


class RPT:
    """Reinforcement pre-training (arXiv:2506.08007): the same loop on thought and prediction, rewarded by 1 or 0."""

    def __init__(self, network: Network, engine: Writer, form: ThoughtFormat, tokenizer: Any, config: Config):
        self.network, self.engine, self.form, self.tokenizer, self.config = network, engine, form, tokenizer, config
        options = config.method
        if len(form.end) >= options.prediction_length:
            raise UserError(
                f"method.prediction_length = {options.prediction_length}: must be above the {len(form.end)} tokens of "
                f"method.end = {options.end!r}"
            )
        self.spelling = TokenBytes(tokenizer)
        self.reference = copy.deepcopy(network.weights).requires_grad_(False) if options.kl_weight else None
        self.learner = Learner(network, form, config, self.reference)
        self.places = PositionSampler(network, self.reference, tokenizer, config)

    def collect(self, windows: list[Window], step: int) -> Collected:
        """Sample G thoughts with their predictions at each position, check them, compare them."""
        started = time.perf_counter()
        everywhere = self.places.draw(windows, step)
        positions, numbers = own(everywhere, self.form, self.config.method)
        responses = self._respond(positions, step, numbers)
        sampled, thoughts = time.perf_counter(), responses.thoughts
        predictions = read(responses, self.form)
        match = self._match(positions, predictions).to(thoughts.evidence.device)
        rewards = self._rewards(responses, match, step, numbers)
        advantages, kept = compare(rewards, thoughts.closed, self.config)
        tokens = joined(responses, predictions, self.form)
        pieces = self.learner.pieces(positions, tokens, advantages, len(everywhere))
        sums = figures(thoughts, rewards, kept)
        sums["reward/match"] = (float(match.sum()), match.numel())
        sums["rollout/predicted"] = (
            float(sum(bool(one) for some in predictions.tokens for one in some)),
            match.numel(),
        )
        sums["rollout/tokens"] = (float(tokens.mask.sum()), 1 / distributed.world_size())
        sums["time/rollout_s"] = (sampled - started, 1)
        sums["time/score_s"] = (time.perf_counter() - sampled, 1)
        rows = []
        if self.config.train.logs(step):
            logged = sum(number < self.config.train.log_thoughts for number in numbers)
            sums["rollout/leakage"] = leakage(self.tokenizer, positions, thoughts, self.form)
            written = [[self.tokenizer.decode(one) for one in some] for some in predictions.tokens]
            assert rewards.total is not None
            columns = {"prediction": written, "reward": rewards.total, "advantage": advantages}
            rows = describe(self.tokenizer, positions, thoughts, columns, logged)
        work = replace(self._work(positions, responses, predictions), proxy=self.places.flops(positions.windows))
        rows = [{"step": step, "number": number, **row} for number, row in zip(numbers, rows, strict=False)]
        return Collected(pieces=pieces, sums=sums, thoughts=rows, work=work)

    def backward(self, piece: Experience) -> tuple[float, Sums]:
        """The clipped surrogate on thought and prediction, plus KL where asked for: loss of the piece, its figures."""
        return self.learner.backward(piece)

    def after_step(self) -> None:
        """The engine takes the new weights."""
        self.engine.sync()

    def state(self) -> dict[str, torch.nn.Module]:
        """The KL reference, where there is one. No teacher: the reward is the text itself."""
        return {} if self.reference is None else {"reference": self.reference}

    def _respond(self, positions: Positions, step: int, numbers: list[int]) -> Responses:
        options = self.config.method
        noise, writing = (
            draw_noise((options.group, length), [make_generator(self.config.seed, name, step, i) for i in numbers])
            for name, length in (("thoughts", options.thought_length), ("predictions", options.prediction_length))
        )
        return self.engine.respond(positions, noise, writing)

    def _match(self, positions: Positions, predictions: Predictions) -> Tensor:
        spell, rows = self.spelling.token, []
        places = zip(positions.window.tolist(), positions.at.tolist(), predictions.tokens, strict=True)
        for window, at, group in places:
            truth = positions.windows[window].tokens[at:]
            rows.append([prefix_match([spell(token) for token in one], map(spell, truth)) for one in group])
        return torch.tensor(rows, dtype=torch.float32)

    def _rewards(self, responses: Responses, match: Tensor, step: int, numbers: list[int]) -> Rewards:
        thoughts, options = responses.thoughts, self.config.method
        rewards = Rewards(value=match, shift=torch.zeros_like(match[:, 0]))
        if options.reward == "random":
            rewards = REWARDS["random"](
                thoughts, None, options, make_generator(self.config.seed, "rewards", step), numbers
            )
        return apply_unclosed_penalty(rewards, thoughts.closed, self.config)

    def _work(self, positions: Positions, responses: Responses, predictions: Predictions) -> Work:
        """RLP's, but that written tokens are read where targets would be, and learn."""
        work = work_of(positions, responses.thoughts, self.form, self.config, teacher=False)
        more = self.config.method.prediction_length - positions.horizon
        return replace(
            work,
            tails=tuple(tuple(tail + more for tail in group) for group in work.tails),
            written=tuple(map(tuple, predictions.learned.tolist())),
        )


def read(responses: Responses, form: ThoughtFormat) -> Predictions:
    """Take apart what was written. No prediction: behind a thought that was cut off, and where `end` is missing.

    Example: end = 9. Written 5 6 9 7: the prediction is 5 6, and 5 6 9 learn. Written 5 6 7 8: none, and all learn.
    """
    end, tokens, learned = list(form.end), [], []
    for group, closed in zip(responses.written.tolist(), responses.thoughts.closed.tolist(), strict=True):
        cut = [_until(written, end) if done else ([], 0) for written, done in zip(group, closed, strict=True)]
        tokens.append([prediction for prediction, _ in cut])
        learned.append([count for _, count in cut])
    return Predictions(tokens=tokens, learned=torch.tensor(learned, device=responses.written.device))


def _until(written: list[int], end: list[int]) -> tuple[list[int], int]:
    """What stands before the first `end`, and the tokens up to and with it."""
    if not end:
        return written, len(written)
    for k in range(len(written) - len(end) + 1):
        if written[k : k + len(end)] == end:
            return written[:k], k + len(end)
    return [], len(written)


def joined(responses: Responses, predictions: Predictions, form: ThoughtFormat) -> Sampled:
    """Thought and prediction as one: all that the policy sampled, and nothing that was forced."""
    thoughts, length = responses.thoughts, responses.written.shape[2]
    width = thoughts.tokens.shape[2] + length
    steps = torch.arange(width, device=thoughts.tokens.device)
    places = thoughts.lengths[..., None] + steps[:length]
    mask = steps < (thoughts.lengths + predictions.learned)[..., None]
    tokens = pad(thoughts.tokens, (0, length)).scatter(-1, places, responses.written)
    logp = pad(thoughts.logp, (0, length)).scatter(-1, places, responses.logp)
    return Sampled(tokens=tokens.masked_fill(~mask, form.pad), mask=mask, logp=logp.masked_fill(~mask, 0))
