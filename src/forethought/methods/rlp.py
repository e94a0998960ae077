"""RLP. `collect` is lines 7 to 12 of Algorithm 1, `backward` line 13."""

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forethought.config import Config
from forethought.corpus import Window
from forethought.methods.base import Collected, Sums, add
from forethought.objective import (
    batch_advantages,
    clipped_share,
    clipped_surrogate,
    group_advantages,
    kl_to_reference,
    scale_by_std,
)
from forethought.positions import Positions, ThoughtFormat, draw, stream
from forethought.rewards import REWARDS, Rewards
from forethought.rollout import Engine, Thoughts, content, draw_noise, work_of
from forethought.scoring import (
    Continuations,
    Reading,
    chunk_tokens,
    continue_with_gradients,
    plain_evidence,
    thought_logp,
)
from forethought.teacher import Teacher

FLAT = 1e-3  # nats; a group whose rewards spread less than this has nothing to teach


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """The thoughts of some documents with what the loss needs, one row a thought. Nothing here carries a gradient."""

    continuations: Continuations  # documents, places, sampled tokens and their mask
    logp_sampler: Float[Tensor, "row thought"]  # at the sampling temperature, nats; 0 where masked
    logp_old: Float[Tensor, "row thought"] | None  # the trainer's, before the first inner step; None: the current one
    logp_reference: Float[Tensor, "row thought"] | None  # the frozen start's, where there is a KL to it
    advantage: Float[Tensor, " row"]  # nats
    share: float  # 1 / thoughts of the whole step: losses of all pieces add up to the mean


class RLP:
    """Reinforcement learning pretraining (arXiv:2510.01265, Algorithm 1)."""

    def __init__(self, policy: Any, engine: Engine, form: ThoughtFormat, tokenizer: Any, config: Config):
        self.policy, self.engine, self.form, self.tokenizer, self.config = policy, engine, form, tokenizer, config
        options = config.method
        self.teacher = Teacher(policy, options.ema) if options.teacher_every else None
        self.reference = copy.deepcopy(policy).requires_grad_(False) if options.kl_weight else None
        self._reading = Reading(
            temperature=options.temperature,
            tokens=chunk_tokens(policy, config.update.tokens_per_chunk),
            shared=config.model.prefix == "shared",
        )

    def collect(self, windows: list[Window], step: int) -> Collected:
        """Sample G thoughts at each position, score them, compare them."""
        started = time.perf_counter()
        options, seed = self.config.method, self.config.seed
        positions = draw(windows, options, stream(seed, "positions", step))
        shape = (options.group, options.thought_length)
        noise = draw_noise(shape, [stream(seed, "thoughts", step, i) for i in range(len(positions))])
        thoughts = self.engine.sample(positions, noise)
        sampled = time.perf_counter()
        nothink = self._nothink(positions, step)
        rewards = self._rewards(thoughts, nothink, step)
        advantages, kept = self._advantages(rewards, thoughts)
        pieces = self._pieces(positions, thoughts, advantages)
        sums = _figures(thoughts, nothink, rewards, kept)
        sums["time/rollout_s"] = (sampled - started, 1)
        sums["time/score_s"] = (time.perf_counter() - sampled, 1)
        sums["rollout/tokens"] = (float(thoughts.mask.sum()), 1)
        rows = []
        if self.config.train.logs(step):
            sums["rollout/leakage"] = self._leakage(positions, thoughts)
            rows = self._describe(positions, thoughts, nothink, rewards, advantages)
        work = work_of(positions, thoughts, self.form, self.config, teacher=nothink is not None)
        return Collected(pieces=pieces, sums=sums, thoughts=[{"step": step, **row} for row in rows], work=work)

    def backward(self, piece: Experience) -> tuple[float, Sums]:
        """The clipped surrogate on thought tokens (eq. 8), plus KL where asked for: loss of the piece, its figures."""
        total, sums = 0.0, Sums()

        def loss(logp: Float[Tensor, "row thought"], rows: Int[Tensor, " row"]) -> Float[Tensor, ""]:
            nonlocal total
            value, more = self._surrogate(piece, logp, rows)
            total += float(value.detach())
            add(sums, more)
            return value

        continue_with_gradients(self.policy, self.form, piece.continuations, self._reading, loss)
        return total, sums

    def _surrogate(self, piece: Experience, logp: Tensor, rows: Tensor) -> tuple[Float[Tensor, ""], Sums]:
        """Line 13 for some thoughts of a piece, from their log-probabilities under the policy."""
        options = self.config.method
        width = logp.shape[1]
        mask, advantage = piece.continuations.mask[rows, :width], piece.advantage[rows]
        old = logp.detach() if piece.logp_old is None else piece.logp_old[rows, :width]
        ratio = (logp - old).exp()
        clip = (options.clip_low, options.clip_high)
        losses = clipped_surrogate(ratio, advantage, mask, clip)
        tokens = float(mask.sum())
        sums: Sums = {}
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

    def after_step(self) -> None:
        """Line 15: the teacher follows the policy; the engine takes the new weights."""
        if self.teacher is not None and not self.config.method.freeze_teacher:
            self.teacher.update(self.policy)
        self.engine.sync()

    def state(self) -> dict[str, torch.nn.Module]:
        """Teacher and KL reference, where there are any."""
        networks = {} if self.teacher is None else {"teacher": self.teacher.model}
        return networks if self.reference is None else {**networks, "reference": self.reference}

    def _nothink(self, positions: Positions, step: int) -> Float[Tensor, "batch horizon"] | None:
        every = self.config.method.teacher_every
        if self.teacher is None or (step % every and step != 1):
            return None
        with torch.no_grad():
            return plain_evidence(self.teacher.model, positions, self._reading.tokens)[0]

    def _rewards(self, thoughts: Thoughts, nothink: Float[Tensor, "batch horizon"] | None, step: int) -> Rewards:
        options = self.config.method
        generator = stream(self.config.seed, "rewards", step)
        rewards = REWARDS[options.reward](thoughts, nothink, options, generator)
        if options.unclosed == "penalise":
            return replace(rewards, value=rewards.value - options.unclosed_penalty * ~thoughts.closed)
        return rewards

    def _advantages(
        self, rewards: Rewards, thoughts: Thoughts
    ) -> tuple[Float[Tensor, "batch group"], Bool[Tensor, "batch group"]]:
        """Compare (eq. 7). A shift-invariant comparison never sees the teacher, so that it cancels to the bit."""
        options = self.config.method
        kept = torch.ones_like(rewards.value, dtype=torch.bool)
        if options.unclosed == "drop":
            kept = thoughts.closed
        compared = rewards.value if self.config.shift_invariant else rewards.total
        assert compared is not None
        if options.clamp_gain:
            compared = compared.clamp(min=0)
        if not self.config.shift_invariant:
            kept = kept & (compared.amax(dim=1, keepdim=True) >= options.min_gain)
        if options.baseline == "group":
            advantages = group_advantages(compared, None if bool(kept.all()) else kept)
        elif options.baseline == "batch":
            advantages = batch_advantages(compared, kept)
        else:
            advantages = compared.masked_fill(~kept, 0)
        return scale_by_std(advantages, compared) if options.scale == "std" else advantages, kept

    def _pieces(
        self, positions: Positions, thoughts: Thoughts, advantages: Float[Tensor, "batch group"]
    ) -> list[Experience]:
        """The thoughts of the step, whole documents together, as many as update.tokens_per_chunk lets one read."""
        reading, group = self._reading, advantages.shape[1]
        longest = max(len(window.tokens) for window in positions.windows)
        pieces, start = [], 0
        for chunk in positions.chunks(max(1, self.config.method.positions * (reading.tokens // longest))):
            end = start + len(chunk)
            some = slice(start, end)
            continuations = Continuations.of(self.form, chunk, thoughts.tokens[some], thoughts.mask[some])
            piece = Experience(
                continuations=continuations,
                logp_sampler=thoughts.logp[some].flatten(0, 1),
                logp_old=None,
                logp_reference=None,
                advantage=advantages[some].flatten(),
                share=1 / (len(positions) * group),
            )
            if self.config.method.inner_steps > 1:
                piece = replace(piece, logp_old=thought_logp(self.policy, self.form, continuations, reading))
            if self.reference is not None:
                piece = replace(piece, logp_reference=thought_logp(self.reference, self.form, continuations, reading))
            pieces.append(piece)
            start = end
        return pieces

    def _leakage(self, positions: Positions, thoughts: Thoughts) -> tuple[float, int]:
        """Thoughts whose text, without the closing delimiter, contains the target token's text; and all of them."""
        said = content.texts(self.tokenizer, content.inside(thoughts, self.form))
        shares = content.leakage(self.tokenizer, positions.targets()[:, 0].tolist(), said)
        return sum(share or 0.0 for share in shares) * len(said[0]), thoughts.closed.numel()

    def _describe(
        self, positions: Positions, thoughts: Thoughts, nothink: Any, rewards: Rewards, advantages: Tensor
    ) -> list[dict[str, Any]]:
        """The first few positions of the step, in words, for thoughts.jsonl."""
        decode = self.tokenizer.decode
        total = rewards.value if rewards.total is None else rewards.total
        contexts, targets = positions.contexts(), positions.targets()
        rows = []
        for i in range(min(len(positions), self.config.train.log_thoughts)):
            members = [
                {
                    "text": decode(thoughts.tokens[i, g][thoughts.mask[i, g]].tolist()),
                    "length": int(thoughts.lengths[i, g]),
                    "closed": bool(thoughts.closed[i, g]),
                    "evidence": float(thoughts.evidence[i, g, 0]),
                    "reward": float(total[i, g]),
                    "advantage": float(advantages[i, g]),
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
                    "nothink": None if nothink is None else float(nothink[i, 0]),
                    "thoughts": members,
                }
            )
        return rows


def _figures(thoughts: Thoughts, nothink: Tensor | None, rewards: Rewards, kept: Bool[Tensor, "batch group"]) -> Sums:
    """What docs/metrics.md calls rollout/* and reward/*, as (sum, count)."""
    evidence, count = thoughts.evidence[..., 0], kept.numel()
    sums: Sums = {
        "rollout/length": (float(thoughts.lengths.sum()), count),
        "rollout/closed": (float(thoughts.closed.sum()), count),
        "rollout/kept": (float(kept.sum()), count),
        "reward/evidence": (float(evidence.sum()), count),
    }
    if rewards.value.shape[1] > 1:
        spread = rewards.value.std(dim=1)
        sums["reward/spread"] = (float(spread.sum()), spread.numel())
        sums["reward/flat_groups"] = (float((spread < FLAT).sum()), spread.numel())
    if rewards.total is not None:
        sums["reward/mean"] = (float(rewards.total.sum()), count)
    if nothink is not None:
        plain = nothink[:, 0]
        sums["reward/nothink"] = (float(plain.sum()), plain.numel())
        sums["reward/gain"] = (float(evidence.sum() - plain.sum() * rewards.value.shape[1]), count)
    return sums
