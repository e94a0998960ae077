"""What a step sampled, and what is logged of it: metrics, the rows of thoughts.jsonl, the tokens that FLOPs count.

Methods fill a `ThoughtRecord` and know nothing of logging; the trainer reads it. Metrics are (sum, count) pairs, so
that ranks and microbatches add up to exact means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from forethought.algo.rewards import Predictions, Rewards
from forethought.config import Config
from forethought.data.positions import Positions, ThoughtFormat
from forethought.flops import Work
from forethought.rollout import Thoughts, thought_tokens
from forethought.run import distributed

Sums = dict[str, tuple[float, float | int]]
"""Metric name -> (sum, count)."""
ZERO_STD = 1e-3
"""Nats: a group whose rewards have a smaller standard deviation has nothing to learn from."""


def add_sums(sums: Sums, more: Sums) -> None:
    """Add sums and counts in place, metric by metric."""
    for name, (value, count) in more.items():
        before = sums.get(name, (0.0, 0))
        sums[name] = (before[0] + value, before[1] + count)


def means(sums: Sums) -> dict[str, float]:
    """The mean of each metric that has a count."""
    return {name: value / count for name, (value, count) in sums.items() if count}


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionShard:
    """The positions of a step that this rank works on: whole documents."""

    positions: Positions
    global_indices: list[int]  # of each position among all positions of the step
    global_count: int  # positions of the step on all ranks
    proxy_flops: int = 0  # FLOPs of the proxy that chose positions in these documents


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtRecord:
    """The thoughts of one step on this rank with their rewards and advantages. Nothing here carries a gradient."""

    shard: PositionShard
    thoughts: Thoughts
    sampled: Thoughts  # what the policy is trained on: the thoughts, in RPT followed by their predictions
    no_think_logp: Float[Tensor, "batch horizon"] | None  # the teacher's (eq. 4); None where it was not evaluated
    rewards: Rewards
    advantages: Float[Tensor, "batch group"]  # nats
    kept: Bool[Tensor, "batch group"]  # thoughts that the policy is trained on
    predictions: Predictions | None = None
    soft_targets: Float[Tensor, "batch horizon vocab"] | None = None  # those of method.distillation

    def metrics(self) -> Sums:
        """The metrics rollout/* and reward/* of docs/metrics.md, except those that need text."""
        thoughts, rewards, count = self.thoughts, self.rewards, self.kept.numel()
        logp = thoughts.evidence[..., 0]
        sums: Sums = {
            "rollout/length": (float(thoughts.lengths.sum()), count),
            "rollout/closed": (float(thoughts.closed.sum()), count),
            "rollout/kept": (float(self.kept.sum()), count),
            "rollout/tokens": (float(self.sampled.mask.sum()), 1 / distributed.world_size()),  # a sum over ranks
            "reward/evidence": (float(logp.sum()), count),
        }
        if rewards.value.shape[1] > 1:
            std = rewards.value.std(dim=1)
            sums["reward/std"] = (float(std.sum()), std.numel())
            sums["reward/zero_std_fraction"] = (float((std < ZERO_STD).sum()), std.numel())
        if rewards.total is not None:
            sums["reward/mean"] = (float(rewards.total.sum()), count)
        if self.no_think_logp is not None:
            plain = self.no_think_logp[:, 0]
            sums["reward/nothink"] = (float(plain.sum()), plain.numel())
            sums["reward/gain"] = (float(logp.sum() - plain.sum() * logp.shape[1]), count)
        if self.predictions is not None:
            written = sum(bool(tokens) for group in self.predictions.tokens for tokens in group)
            sums["reward/match"] = (float(self.predictions.match.sum()), count)
            sums["rollout/predicted"] = (float(written), count)
        return sums

    def text(self, tokenizer: Any, form: ThoughtFormat, positions: int) -> tuple[Sums, list[dict[str, Any]]]:
        """What needs decoding: rollout/leakage, and rows of thoughts.jsonl for the step's first `positions`.

        Each row has the "number" of its position in the step.
        """
        targets = self.shard.positions.targets()[:, 0].tolist()
        texts = decode_thoughts(tokenizer, thought_tokens(self.thoughts, form))
        shares = [share for share in leakage(tokenizer, targets, texts) if share is not None]
        sums: Sums = {"rollout/leakage": (sum(shares, 0.0), len(shares))}
        first = sum(number < positions for number in self.shard.global_indices)
        return sums, [self._row(tokenizer, i) for i in range(first)]

    def _row(self, tokenizer: Any, i: int) -> dict[str, Any]:
        thoughts, positions, decode = self.thoughts, self.shard.positions, tokenizer.decode
        reward = self.rewards.value if self.rewards.total is None else self.rewards.total
        members = []
        for g in range(thoughts.closed.shape[1]):
            member: dict[str, Any] = {
                "text": decode(thoughts.tokens[i, g][thoughts.mask[i, g]].tolist()),
                "length": int(thoughts.lengths[i, g]),
                "closed": bool(thoughts.closed[i, g]),
                "evidence": float(thoughts.evidence[i, g, 0]),
            }
            if self.predictions is not None:
                member["prediction"] = decode(self.predictions.tokens[i][g])
            members.append({**member, "reward": float(reward[i, g]), "advantage": float(self.advantages[i, g])})
        window = positions.windows[int(positions.window[i])]
        return {
            "number": self.shard.global_indices[i],
            "document": window.label,
            "row": window.document,
            "position": int(positions.at[i]) + window.start,
            "context": decode(positions.contexts()[i][-200:]),
            "target": decode(positions.targets()[i].tolist()),
            "nothink": None if self.no_think_logp is None else float(self.no_think_logp[i, 0]),
            "thoughts": members,
        }

    def work(self, form: ThoughtFormat, config: Config) -> Work:
        """The tokens that the step processes on this rank, for FLOP counts."""
        positions, options = self.shard.positions, config.method
        windows, at = positions.window.tolist(), positions.at.tolist()
        read = dict.fromkeys(windows, 0)
        for window, t in zip(windows, at, strict=True):
            read[window] = max(read[window], t + positions.horizon - 1)
        lengths, targets = self.thoughts.lengths.tolist(), self._targets(form)
        return Work(
            windows=tuple(read.values()),
            owners=tuple(windows),
            prefixes=tuple(len(form.before) + t for t in at),
            opening=len(form.after) + len(form.open),
            thoughts=tuple(map(tuple, lengths)),
            tails=() if config.samples_with_vllm else self._tails(targets, options.prediction_length),
            sharing="document" if config.model.prefix == "shared" else "rollout",
            reread=targets if config.rescores else (),
            horizon=positions.horizon,
            teacher=self.no_think_logp is not None,
            kl=options.kl_weight > 0,
            inner_steps=options.inner_steps,
            predicts=options.prediction_weight > 0,
            written=() if self.predictions is None else tuple(map(tuple, self.predictions.trained.tolist())),
            proxy=self.shard.proxy_flops,
        )

    def _targets(self, form: ThoughtFormat) -> tuple[tuple[int, ...], ...]:
        """Tokens read after the sampled ones of each thought to score its targets."""
        after = len(form.close) + form.repeat + self.shard.positions.horizon - 1
        groups = zip(thought_tokens(self.thoughts, form), self.thoughts.lengths.tolist(), strict=True)
        return tuple(tuple(len(own) - n + after for own, n in zip(*group, strict=True)) for group in groups)

    def _tails(self, targets: tuple[tuple[int, ...], ...], prediction: int) -> tuple[tuple[int, ...], ...]:
        """Tokens that the sampler reads there: for the targets, or a forced delimiter and all but the last written."""
        if self.predictions is None:
            return targets
        groups = zip(targets, self.thoughts.closed.tolist(), strict=True)
        return tuple(tuple(prediction - 1 + (not c) * n for n, c in zip(*group, strict=True)) for group in groups)


def decode_thoughts(tokenizer: Any, tokens: list[list[list[int]]]) -> list[list[str]]:
    """The text of each thought."""
    flat = iter(tokenizer.batch_decode([thought for group in tokens for thought in group]))
    return [[next(flat) for _ in group] for group in tokens]


def leakage(tokenizer: Any, targets: Sequence[int], texts: list[list[str]]) -> list[float | None]:
    """Share of each position's thoughts whose text contains the target's text, without spaces around it.

    None where the target is white space or an incomplete character: no text to look for. WordPiece's `##` is none.
    """
    shares: list[float | None] = []
    decoded = tokenizer.batch_decode([[token] for token in targets])
    for token, target, group in zip(targets, decoded, texts, strict=True):
        wanted = target.strip()
        if wanted.startswith("##") and not tokenizer.decode([token, token]).strip().endswith(wanted):
            wanted = wanted.removeprefix("##")
        known = wanted and "\N{REPLACEMENT CHARACTER}" not in wanted
        shares.append(sum(wanted in text for text in group) / len(group) if known else None)
    return shares
