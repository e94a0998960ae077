"""CPT: continued next-token pretraining (eq. 1)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from forethought.algo.metrics import Sums
from forethought.algo.objective import next_token_loss
from forethought.config import Config
from forethought.data.corpus import Window
from forethought.data.positions import ThoughtFormat, pad_rows
from forethought.models.compute_copy import Network
from forethought.models.logprobs import chunk_tokens, forward, log_probabilities
from forethought.prefix import activation_checkpointing
from forethought.rollout import Engine
from forethought.run import distributed

INSERTED = "<inserted>"
"""The mark of tokens that are no text; no corpus can have a mark of this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecord:
    """The windows of one step on this rank, for next-token training."""

    windows: list[Window]
    global_count: int  # tokens of the step that carry loss, on all ranks

    def metrics(self) -> Sums:
        """Nothing was sampled."""
        return {}

    def text(self, tokenizer: Any, form: ThoughtFormat, positions: int) -> tuple[Sums, list[dict[str, Any]]]:
        """No thoughts to log."""
        return {}, []

    def work(self, form: ThoughtFormat, config: Config) -> tuple[int, ...]:
        """Tokens of each window, for FLOP counts."""
        return tuple(len(window.tokens) for window in self.windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextMicrobatch:
    """A few windows for next-token training."""

    tokens: Int[Tensor, "row token"]  # padded on the right
    mask: Bool[Tensor, "row token"]  # True at real tokens
    learned: Bool[Tensor, "row predicted"]  # True at the tokens (from the second on) that carry loss
    scale: float  # 1 / tokens of the whole step that carry loss


class CPT:
    """Continued next-token pretraining (eq. 1): the baseline, and how the embedded base models are made.

    An opening delimiter in the text is never a target, nor are the tokens that a window marks as `INSERTED`: they are
    there to request a thought, not to be predicted.
    """

    def __init__(self, network: Network, engine: Engine, form: ThoughtFormat, tokenizer: Any, config: Config):
        self.network, self.policy, self.form, self.config = network, network.model, form, config

    def collect(self, windows: list[Window], step: int) -> TextRecord:
        """This rank's share of the windows."""
        count = sum(int(self._is_text(window)[1:].sum()) for window in windows)
        mine = [windows[i] for i in distributed.shard_indices([len(window.tokens) for window in windows])]
        return TextRecord(windows=mine, global_count=count)

    def microbatches(self, record: TextRecord) -> list[TextMicrobatch]:
        """The windows padded, as many at a time as update.tokens_per_chunk allows."""
        device, windows, found = self.policy.device, record.windows, []
        longest = max(len(window.tokens) for window in windows)
        size = max(1, chunk_tokens(self.policy, self.config.update.tokens_per_chunk) // longest)
        for start in range(0, len(windows), size):
            some = windows[start : start + size]
            tokens, mask = pad_rows([window.tokens for window in some], self.form.pad, left=False)
            learned = pad_sequence([self._is_text(window) for window in some], batch_first=True)[:, 1:]
            found.append(
                TextMicrobatch(
                    tokens=tokens.to(device),
                    mask=mask.to(device),
                    learned=learned.to(device),
                    scale=1 / max(record.global_count, 1),
                )
            )
        return found

    def forward_backward(self, microbatch: TextMicrobatch) -> tuple[float, Sums]:
        """Next-token cross-entropy and its gradients."""
        with activation_checkpointing(self.policy, self.config.update.checkpointing):
            logits = forward(self.policy, microbatch.tokens, microbatch.mask, keep=0)[:, :-1]
        target = microbatch.tokens[:, 1:]
        hit = (logits.argmax(dim=-1) == target)[microbatch.learned]
        loss = next_token_loss(log_probabilities(logits, target), microbatch.learned) * microbatch.scale
        loss.backward()
        return float(loss.detach()), {"objective/accuracy": (float(hit.sum()), hit.numel())}

    def after_step(self) -> None:
        """No network follows the policy."""

    def state(self) -> dict[str, torch.nn.Module]:
        """No further networks."""
        return {}

    def _is_text(self, window: Window) -> Bool[Tensor, " token"]:
        """False at every token of an opening delimiter and at those that are marked as inserted."""
        tokens, pattern = torch.tensor(window.tokens), torch.tensor(self.form.open)
        text = torch.ones_like(tokens, dtype=torch.bool)
        if len(tokens) >= len(pattern):
            starts = (tokens.unfold(0, len(pattern), 1) == pattern).all(dim=-1)
            for offset in range(len(pattern)):
                text[offset : offset + len(starts)] &= ~starts
        text[list(window.marks.get(INSERTED, ()))] = False
        return text
