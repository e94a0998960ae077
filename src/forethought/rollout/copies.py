"""Rows of any Hugging Face causal LM, each with a copy of its prompt in the cache."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from forethought.data.positions import pad_rows
from forethought.models.logprobs import position_ids

COMPACT = 0.75  # finished rows are dropped from a cache when fewer than this share is still decoding


class Copies:
    """Rows that decode together; equal prompts are read once and then copied."""

    full = False  # a cache that grows

    def __init__(self, model: Any, mask: Bool[Tensor, "row width"]):
        self.model, self.mask, self.cache = model, mask, DynamicCache(config=model.config)

    def read(self, tokens: Int[Tensor, "row new"]) -> Float[Tensor, "row vocab"]:
        """Read the last columns of the mask; the logits that follow."""
        return self.model(
            input_ids=tokens,
            attention_mask=self.mask.long(),
            position_ids=position_ids(self.mask)[:, -tokens.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def step(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """Read one token a row; the logits that follow."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return self.read(tokens[:, None])

    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Keep, copy or drop rows of every layer, attention and Mamba alike."""
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        self.mask = self.mask[rows]


def read_copies(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> tuple[Copies, Float[Tensor, "row vocab"]]:
    """A row for each prompt, and the logits that follow it."""
    places: dict[tuple[int, ...], int] = {}
    rows = torch.tensor([places.setdefault(tuple(prompt), len(places)) for prompt in prompts], device=model.device)
    tokens, mask = (part.to(model.device) for part in pad_rows(list(places), pad, left=True))
    copies = Copies(model, mask)
    logits = copies.read(tokens)
    if len(places) < len(prompts):
        copies.select(rows)
        logits = logits[rows]
    return copies, logits
