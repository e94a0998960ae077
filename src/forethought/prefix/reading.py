"""Read documents once, on unmodified Hugging Face models, hybrids with Mamba layers included."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from forethought.prefix.models import backbone
from forethought.prefix.states import Prefix, Recurrent, State, duplicate, stacked


def read(model: Any, documents: Sequence[Sequence[int]], stops: Sequence[Sequence[int]]) -> Prefix:
    """Read each document once, up to the last of its stops, and keep what rows need that continue it at any stop.

    Args:
        model: a causal LM that `enable` has prepared.
        documents: token ids of each document.
        stops: for each document the numbers of tokens before its places, not decreasing, at least 1 each.
    """
    if any(list(some) != sorted(some) for some in stops):
        raise ValueError("the places of a document must come in reading order")
    cache = DynamicCache(config=model.config)
    rows = [list(tokens[: some[-1]]) for tokens, some in zip(documents, stops, strict=True)]
    if any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers):
        states = _in_segments(model, rows, stops)
    else:
        width = max(len(row) for row in rows)
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        layers: list[Any] = [DynamicLayer() for _ in cache.layers]
        backbone(model, tokens, Cache(layers=layers))
        states = [State(keys=x.keys, values=x.values, conv={}, recurrent={}, kernels={}) for x in layers]
    return Prefix.of(states, stops, model.device)


def _in_segments(model: Any, rows: list[list[int]], stops: Sequence[Sequence[int]]) -> list[State]:
    """One document at a time, place by place, noting the Mamba states at each place.

    Models read a single token behind a state by a step that writes into the state, so where two places are neighbours
    the second is read from the place before both.
    """
    kinds = DynamicCache(config=model.config).layers
    notes: list[list[tuple[dict[int, Any], dict[int, Any]]]] = [[] for _ in kinds]
    ends: list[list[Any]] = [[] for _ in kinds]
    for row, some in zip(rows, stops, strict=True):
        layers = [_reading_layer(kind) for kind in kinds]
        earlier, before, done = layers, 0, 0
        for stop in some:
            if stop == done + 1 and done:
                layers, done = earlier, before
            if stop > done:
                earlier, before = [duplicate(layer) for layer in layers], done
                at = torch.arange(done, stop, device=model.device)[None]
                backbone(model, torch.tensor([row[done:stop]], device=model.device), Cache(layers=layers), at)
                done = stop
            for note, layer in zip(notes, layers, strict=True):
                if isinstance(layer, LinearAttentionLayer):
                    note.append((dict(layer.conv_states), dict(layer.recurrent_states)))
        for end, layer in zip(ends, layers, strict=True):
            end.append(layer)
    return [_noted(note, end) for note, end in zip(notes, ends, strict=True)]


def _noted(notes: Sequence[tuple[dict[int, Any], dict[int, Any]]], layers: Sequence[Any]) -> State:
    """One layer's state from its notes at each place and its cache at the end of each document."""
    keys = values = None
    if isinstance(layers[0], DynamicLayer):
        width = max(layer.keys.shape[2] for layer in layers)
        keys, values = (stacked([getattr(x, name) for x in layers], width) for name in ("keys", "values"))
    conv, recurrent = ({}, {}) if not notes else (_columns(notes, 0), _columns(notes, 1))
    kernels = dict(cast(Any, layers[0]).conv_kernel_size) if notes else {}
    return State(keys=keys, values=values, conv=conv, recurrent=recurrent, kernels=kernels)


def _columns(notes: Sequence[tuple[dict[int, Any], dict[int, Any]]], which: int) -> dict[int, Tensor]:
    return {i: torch.cat([note[which][i] for note in notes]) for i, t in notes[0][which].items() if t is not None}


class _ReadingBoth(Recurrent, DynamicLayer):
    """Mamba and attention side by side, while a document is read."""

    def __init__(self, number_of_states: int):
        DynamicLayer.__init__(self)
        Recurrent.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """The attention's; states are put as they come."""
        DynamicLayer.lazy_initialization(self, *args)


def _reading_layer(kind: Any) -> Any:
    if not isinstance(kind, LinearAttentionLayer):
        return DynamicLayer()
    both = isinstance(kind, DynamicLayer)
    return _ReadingBoth(kind.number_of_states) if both else Recurrent(kind.number_of_states)
