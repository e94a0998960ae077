"""Mixed: supervised training on text with and without thoughts, in one stage; the thoughts are the start's own."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from forethought import rollout
from forethought.algo.cpt import CPT, INSERTED, TextRecord
from forethought.algo.metrics import PositionShard, Sums, ThoughtRecord
from forethought.algo.rewards import Predictions
from forethought.algo.rlp import RLP
from forethought.config import Config
from forethought.data.corpus import Window
from forethought.data.positions import Positions, ThoughtFormat
from forethought.flops import Work
from forethought.models.compute_copy import Network, compute_copy
from forethought.models.logprobs import no_think_logp
from forethought.rollout import Engine, Thoughts, thought_tokens
from forethought.run import distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRecord:
    """The start's thoughts at a step's positions, and the text that the policy is trained on."""

    thoughts: ThoughtRecord  # its `kept` are the thoughts that were written into the text
    rows: TextRecord

    def metrics(self) -> Sums:
        """Those of the thoughts; what the start predicts without one is no figure of training."""
        sums = self.thoughts.metrics()
        del sums["reward/nothink"]
        return sums

    def text(self, tokenizer: Any, form: ThoughtFormat, positions: int) -> tuple[Sums, list[dict[str, Any]]]:
        """The policy's own thoughts are not sampled, so none are logged."""
        return {}, []

    def work(self, form: ThoughtFormat, config: Config) -> Work:
        """Thoughts and their scores without an update, and the rows of text."""
        work = self.thoughts.work(form, config)
        return replace(work, inner_steps=0, kl=False, supervised=self.rows.work(form, config))


class Mixed(RLP):
    """A cheap supervised rival of RLP (after arXiv:2608.23256): next-token loss on text with and without good thoughts.

    The frozen start thinks at the positions that RLP would use. Of a window's thoughts the one with the largest gain
    (eq. 5, by the start itself) is written into the window, if it closed and its gain is positive. The policy is
    trained on the window without it and on the window with it, thought included. The policy itself is not sampled.
    """

    keeps_start = True

    def __init__(self, network: Network, engine: Engine, form: ThoughtFormat, tokenizer: Any, config: Config):
        super().__init__(network, engine, form, tokenizer, config)
        if not network.has_adapters:
            compute_copy(self.reference, config.model.precision)
        start = network.model if network.has_adapters else self.reference
        self.engine = rollout.engine(start, form, config, "native")
        self.cpt = CPT(network, engine, form, tokenizer, config)

    @staticmethod
    def uses_teacher(config: Config) -> bool:
        """No EMA teacher: gains are measured against the start."""
        return False

    def collect(self, windows: list[Window], step: int) -> Any:
        """A `MixedRecord`: the windows, and those with a thought that gained."""
        record = super().collect(windows, step)
        positions, total = record.shard.positions, record.rewards.total
        assert total is not None
        kept = best(positions, total, record.thoughts.closed, self.config.method.min_gain)
        added = distributed.all_gather(self._with_thoughts(positions, record.thoughts, kept))
        rows = [*windows, *(row for rows in added for row in rows)]
        return MixedRecord(thoughts=replace(record, kept=kept), rows=self.cpt.collect(rows, step))

    def microbatches(self, record: Any) -> Any:
        """The rows of text, padded."""
        return self.cpt.microbatches(record.rows)

    def forward_backward(self, microbatch: Any) -> tuple[float, Sums]:
        """Next-token cross-entropy (eq. 1)."""
        return self.cpt.forward_backward(microbatch)

    def state(self) -> dict[str, torch.nn.Module]:
        """The start is loaded again from where it came."""
        return {}

    def sample(self, shard: PositionShard, step: int) -> tuple[Thoughts, Thoughts, Predictions | None]:
        """The start's thoughts."""
        with torch.no_grad(), self.network.as_model(self.reference):
            return super().sample(shard, step)

    def teacher_scores(self, positions: Positions, step: int) -> tuple[Float[Tensor, "batch horizon"], None]:
        """No-think log-evidence of the start."""
        with torch.no_grad(), self.network.as_model(self.reference) as start:
            return no_think_logp(start, positions, self.scoring.tokens)[0], None

    def _with_thoughts(
        self, positions: Positions, thoughts: Thoughts, kept: Bool[Tensor, "batch group"]
    ) -> list[Window]:
        """Each window that has a kept thought, with it: `before x_<t after open c bridge x_t ...`.

        What the template adds is marked as inserted.
        """
        tokens, contexts, form = thought_tokens(thoughts, self.form), positions.contexts(), self.form
        found = []
        for i, member in kept.nonzero().tolist():
            window = positions.windows[int(positions.window[i])]
            rest = window.tokens[int(positions.at[i]) :]
            prompt = form.prompt_tokens(contexts[i])
            head = int(contexts[i][:1] == [form.bos])  # the template comes after a leading BOS
            inserted = (
                *range(head, head + len(form.before)),
                *range(len(prompt) - len(form.after) - len(form.open), len(prompt)),
            )
            thinking = [*prompt, *tokens[i][member], *form.bridge(contexts[i])]
            repeated, row = range(len(thinking) - form.repeat, len(thinking)), [*thinking, *rest]
            found.append(replace(window, tokens=row, marks={INSERTED: (*inserted, *repeated)}))
        return found


def best(
    positions: Positions, gains: Float[Tensor, "batch group"], closed: Bool[Tensor, "batch group"], least: float
) -> Bool[Tensor, "batch group"]:
    """True at the thought with the largest gain in each window, among those that closed and gain over 0 and `least`."""
    fit = gains.masked_fill(~closed | (gains <= 0) | (gains < least), -torch.inf)
    kept = torch.zeros_like(closed)
    for window in positions.window.unique():
        members = (positions.window == window).nonzero().squeeze(-1)
        some = fit[members]
        top = int(some.argmax())
        if some.flatten()[top] > 0:
            kept[int(members[top // fit.shape[1]]), top % fit.shape[1]] = True
    return kept
