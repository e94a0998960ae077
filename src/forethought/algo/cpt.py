"""CPT: next-token pretraining (eq. 1)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from forethought.algo.base import Collected, Sums
from forethought.algo.objective import next_token_loss
from forethought.config import Config
from forethought.data.corpus import Window
from forethought.data.positions import ThoughtFormat, pad_rows
from forethought.models.compute_copy import Network
from forethought.models.logprobs import chunk_tokens, forward, log_probabilities
from forethought.prefix import activation_checkpointing
from forethought.rollout import Engine
from forethought.run import distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A few windows for next-token training."""

    tokens: Int[Tensor, "row token"]  # padded on the right
    mask: Bool[Tensor, "row token"]  # True at real tokens
    learned: Bool[Tensor, "row predicted"]  # True at the tokens (from the second on) that carry loss
    share: float  # 1 / tokens that carry loss in the whole step


class CPT:
    """Continued next-token pretraining (eq. 1): the baseline, and how the embedded base is made.

    An opening delimiter in the text is never a target: it is inserted by whoever wants a thought, not predicted.
    """

    def __init__(self, network: Network, engine: Engine, form: ThoughtFormat, tokenizer: Any, config: Config):
        self.network, self.policy, self.form, self.config = network, network.model, form, config

    def collect(self, windows: list[Window], step: int) -> Collected:
        """Pad the windows into pieces."""
        device, pieces = self.policy.device, []
        count = sum(int((~self._opens(torch.tensor([window.tokens]))[:, 1:]).sum()) for window in windows)
        windows = [windows[i] for i in distributed.shard_indices([len(window.tokens) for window in windows])]
        longest = max(len(window.tokens) for window in windows)
        size = max(1, chunk_tokens(self.policy, self.config.update.tokens_per_chunk) // longest)
        for start in range(0, len(windows), size):
            tokens, mask = pad_rows(
                [window.tokens for window in windows[start : start + size]], self.form.pad, left=False
            )
            learned = mask[:, 1:] & ~self._opens(tokens)[:, 1:]
            pieces.append((tokens.to(device), mask.to(device), learned.to(device)))
        rows = [Rows(tokens=t, mask=m, learned=x, share=1 / max(count, 1)) for t, m, x in pieces]
        work = tuple(len(window.tokens) for window in windows)
        return Collected(pieces=rows, sums={}, thoughts=[], work=work)

    def backward(self, piece: Rows) -> tuple[float, Sums]:
        """Next-token cross-entropy."""
        with activation_checkpointing(self.policy, self.config.update.checkpointing):
            logits = forward(self.policy, piece.tokens, piece.mask, keep=0)[:, :-1]
        target = piece.tokens[:, 1:]
        hit = (logits.argmax(dim=-1) == target)[piece.learned]
        loss = next_token_loss(log_probabilities(logits, target), piece.learned) * piece.share
        loss.backward()
        return float(loss.detach()), {"objective/accuracy": (float(hit.sum()), hit.numel())}

    def after_step(self) -> None:
        """Nothing follows the policy here."""

    def state(self) -> dict[str, torch.nn.Module]:
        """No further networks."""
        return {}

    def _opens(self, tokens: Int[Tensor, "row token"]) -> Bool[Tensor, "row token"]:
        """True at every token of an opening delimiter."""
        pattern = torch.tensor(self.form.open)
        found = torch.zeros_like(tokens, dtype=torch.bool)
        if tokens.shape[1] >= len(pattern):
            starts = (tokens.unfold(1, len(pattern), 1) == pattern).all(dim=-1)
            for offset in range(len(pattern)):
                found[:, offset : offset + starts.shape[1]] |= starts
        return found
