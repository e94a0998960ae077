"""Rows of a causal LM over documents that are kept once."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from forethought.data.positions import Positions, ThoughtFormat
from forethought.prefix import SuffixCache, backbone, read, vocabulary
from forethought.rollout.cpp import Compiled


class Shared:
    """Rows over documents that are kept once; `compiled`, where given, reads in place of the model's own code."""

    def __init__(self, model: Any, fork: SuffixCache, compiled: Compiled | None = None):
        self.model, self.fork, self.compiled = model, fork, compiled

    @property
    def full(self) -> bool:
        """Whether every column is in use; what finished rows hold of them is then given free."""
        return self.fork.length == self.fork.room

    def read(self, tokens: Int[Tensor, "row width"]) -> Float[Tensor, "row vocab"]:
        """Read some tokens a row; the logits that follow the last."""
        width = tokens.shape[1]
        if self.compiled is not None:
            return [self.compiled.step(column, self.fork) for column in tokens.T.contiguous()][-1]
        self.fork.make_room(width)
        hidden = backbone(self.model, tokens, self.fork, self.fork.position_ids(width))
        self.fork.length += width
        return vocabulary(self.model, hidden[:, -1])

    def step(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """Read one token a row; the logits that follow."""
        return self.read(tokens[:, None])

    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Keep only some rows."""
        self.fork.select(rows)


def read_shared(
    model: Any, form: ThoughtFormat, positions: Positions, group: int, room: int, compiled: Compiled | None = None
) -> tuple[Shared, Float[Tensor, "row vocab"]]:
    """A row for each thought, and the logits that follow the opening delimiter; `room`: columns of the suffixes."""
    documents, stops = form.documents_and_prefix_lengths(positions)
    reads = read(model, documents, stops) if compiled is None else compiled.read(documents, stops)
    fork = SuffixCache(reads, [place for place in range(len(positions)) for _ in range(group)], room)
    batch = Shared(model, fork, compiled)
    lead = torch.tensor([*form.after, *form.open], device=model.device)
    return batch, batch.read(lead.expand(len(positions) * group, -1))
