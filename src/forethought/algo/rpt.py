"""RPT (arXiv:2506.08007), the baseline with a verifiable reward: after a thought the policy writes a prediction.

It differs from RLP in `sample`, which continues behind the thoughts, and in the reward, which matches bytes.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from forethought.algo.metrics import PositionShard
from forethought.algo.rewards import Predictions, prefix_match
from forethought.algo.rlp import RLP
from forethought.config import Config, UserError
from forethought.data.positions import Positions, ThoughtFormat
from forethought.data.token_bytes import TokenBytes
from forethought.models.compute_copy import Network
from forethought.rollout import Engine, Thoughts


class RPT(RLP):
    """Reinforcement pre-training: thoughts and predictions are sampled, a prediction is right (1) or wrong (0)."""

    def __init__(self, network: Network, engine: Engine, form: ThoughtFormat, tokenizer: Any, config: Config):
        options = config.method
        if len(form.end) >= options.prediction_length:
            raise UserError(
                f"method.prediction_length = {options.prediction_length}: must be above the {len(form.end)} tokens of "
                f"method.end = {options.end!r}"
            )
        super().__init__(network, engine, form, tokenizer, config)
        self.token_bytes = TokenBytes(tokenizer)

    @staticmethod
    def uses_teacher(config: Config) -> bool:
        """Never: the reward is the text itself."""
        return False

    def sample(self, shard: PositionShard, step: int) -> tuple[Thoughts, Thoughts, Predictions]:
        """Thoughts, each followed by its prediction; the policy is trained on both."""
        options = self.config.method
        noise = self.noise("thoughts", options.thought_length, shard, step)
        writing = self.noise("predictions", options.prediction_length, shard, step)
        thoughts = self.engine.sample(shard.positions, noise, writing)
        tokens, trained = parse_predictions(thoughts, self.form)
        match = self._match(shard.positions, tokens).to(trained.device)
        predictions = Predictions(tokens=tokens, trained=trained, match=match)
        return thoughts, join(thoughts, trained, self.form.pad), predictions

    def _match(self, positions: Positions, predictions: list[list[list[int]]]) -> Tensor:
        spell, rows = self.token_bytes.token, []
        for window, at, group in zip(positions.window.tolist(), positions.at.tolist(), predictions, strict=True):
            truth = positions.windows[window].tokens[at:]
            rows.append([prefix_match([spell(token) for token in one], map(spell, truth)) for one in group])
        return torch.tensor(rows, dtype=torch.float32)


def parse_predictions(thoughts: Thoughts, form: ThoughtFormat) -> tuple[list[list[list[int]]], Tensor]:
    """The prediction written after each thought, and how many of its tokens the policy is trained on.

    There is no prediction after a thought that was cut off, nor where `end` is missing. Example with end = 9: of
    5 6 9 7 the prediction is 5 6, and 5 6 9 are trained on; of 5 6 7 8 there is none, and all are trained on.
    """
    end, tokens, trained = list(form.end), [], []
    assert thoughts.written is not None
    for group, closed in zip(thoughts.written.tolist(), thoughts.closed.tolist(), strict=True):
        parsed = [_until(written, end) if done else ([], 0) for written, done in zip(group, closed, strict=True)]
        tokens.append([prediction for prediction, _ in parsed])
        trained.append([count for _, count in parsed])
    return tokens, torch.tensor(trained, device=thoughts.written.device)


def _until(written: list[int], end: list[int]) -> tuple[list[int], int]:
    """The tokens before the first `end`, and the number of tokens up to and including it."""
    if not end:
        return written, len(written)
    for k in range(len(written) - len(end) + 1):
        if written[k : k + len(end)] == end:
            return written[:k], k + len(end)
    return [], len(written)


def join(thoughts: Thoughts, trained: Tensor, pad_token: int) -> Thoughts:
    """Thought and prediction as one row: everything that the policy sampled, nothing that was forced."""
    assert thoughts.written is not None and thoughts.written_logp is not None
    length = thoughts.written.shape[2]
    steps = torch.arange(thoughts.tokens.shape[2] + length, device=thoughts.tokens.device)
    columns = thoughts.lengths[..., None] + steps[:length]
    mask = steps < (thoughts.lengths + trained)[..., None]
    tokens = pad(thoughts.tokens, (0, length)).scatter(-1, columns, thoughts.written)
    logp = pad(thoughts.logp, (0, length)).scatter(-1, columns, thoughts.written_logp)
    return replace(thoughts, tokens=tokens.masked_fill(~mask, pad_token), mask=mask, logp=logp.masked_fill(~mask, 0))
