"""Rows that continue documents: a cache with the documents once and each row's own suffix."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, roll
from transformers.cache_utils import CacheLayerMixin

from forethought.prefix.attention import Layout, PrefixSuffixKV
from forethought.prefix.states import Prefix, Recurrent, State, Unmasked, UnmaskedLayer, together


class SuffixCache(Unmasked):
    """A cache in which each row continues one of a prefix's places (indices that do not decrease).

    With `room`, suffix keys and values live in buffers of that many tokens, for decoding; without, one forward pass
    brings the whole suffix and gradients run through it.
    """

    def __init__(self, prefix: Prefix, places: Sequence[int], room: int = 0):
        self.prefix, self.places, self.room, self.length = prefix, tuple(places), room, 0
        self.start = torch.zeros(len(places), dtype=torch.long, device=prefix.device)  # first column of each row
        self.ragged = False  # whether any row starts later than the first column
        self._lay_out()
        picked = torch.tensor(places, device=prefix.device)
        self.rows: list[Any] = [_suffix_layer(self, state, picked) for state in prefix.states]
        super().__init__(layers=self.rows)

    def _lay_out(self) -> None:
        prefix = self.prefix
        owner, stop = ([some[place] for place in self.places] for some in (prefix.owner, prefix.stop))
        self.layout = Layout.of(owner, stop, prefix.device)

    def position_ids(self, width: int) -> Int[Tensor, "row width"]:
        """Where the next `width` tokens of each row stand in its text."""
        steps = torch.arange(self.length, self.length + width, device=self.prefix.device)
        return (self.layout.stop - self.start)[:, None] + steps

    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Keep only some rows, in the order they have; documents without rows are forgotten."""
        self.places = tuple(self.places[row] for row in rows.tolist())
        self.start = self.start[rows]
        for layer in self.rows:
            layer.reorder_cache(rows)
        self._forget()
        self._lay_out()

    def join(self, other: "SuffixCache") -> None:
        """Append the rows of a younger fork of the same model and room; the newest tokens share a column."""
        self._shift(int(self.start.min()))
        gap = self.length - other.length
        assert gap >= 0 and self.room == other.room
        documents, places = max(self.prefix.owner) + 1, len(self.prefix.owner)
        self.prefix = together(self.prefix, other.prefix, documents)
        self.places += tuple(places + place for place in other.places)
        self.start = torch.cat([self.start, other.start + gap])
        self.ragged = bool(self.start.any())
        for layer, more in zip(self.rows, other.rows, strict=True):
            layer.join(more, gap)
        self._refer()
        self._lay_out()

    def make_room(self, width: int) -> None:
        """See to it that `width` more columns fit, by dropping those that no row uses any more."""
        if self.length + width > self.room:
            self._shift(int(self.start.min()))
            assert self.length + width <= self.room

    def _shift(self, columns: int) -> None:
        """Drop the oldest columns, in which no row has a token."""
        if columns:
            self.start, self.length = self.start - columns, self.length - columns
            self.ragged = bool(self.start.any())
            for layer in self.rows:
                layer.shift(columns)

    def _forget(self) -> None:
        """Drop documents and places that no row continues."""
        prefix = self.prefix
        kept = sorted(set(self.places))
        documents = sorted({prefix.owner[place] for place in kept})
        if len(documents) == max(prefix.owner) + 1:
            return
        picked = torch.tensor(documents, device=prefix.device)
        at = torch.tensor(kept, device=prefix.device)
        states = [state.map(lambda t: t[picked], lambda t: t[at]) for state in prefix.states]
        self.prefix = replace(
            prefix,
            states=tuple(states),
            owner=tuple(documents.index(prefix.owner[place]) for place in kept),
            stop=tuple(prefix.stop[place] for place in kept),
        )
        self.places = tuple(kept.index(place) for place in self.places)
        self._refer()

    def _refer(self) -> None:
        for layer, state in zip(self.rows, self.prefix.states, strict=True):
            layer.state = state

    @property
    def begun(self) -> Int[Tensor, " row"] | None:
        """First column of each row's suffix; None where it is 0 for all."""
        return self.start if self.ragged else None


class _SuffixAttention(UnmaskedLayer):
    """A layer's suffix keys and values; returns them together with the documents'."""

    def __init__(self, fork: SuffixCache, state: State):
        super().__init__()
        self.fork, self.state = weakref.proxy(fork), state  # a cycle would keep masks and buffers until collected

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers of the fork's room."""
        shape = (*key_states.shape[:2], self.fork.room)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The next tokens' keys and values."""
        fork, state = self.fork, self.state
        assert state.keys is not None and state.values is not None
        if fork.room:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            assert self.keys is not None and self.values is not None
            end = fork.length + key_states.shape[2]
            self.keys[:, :, fork.length : end] = key_states
            self.values[:, :, fork.length : end] = value_states
            key_states, value_states = self.keys[:, :, :end], self.values[:, :, :end]
        return (
            PrefixSuffixKV(state.keys, key_states, fork.layout, fork.begun),
            PrefixSuffixKV(state.values, value_states, fork.layout, fork.begun),
        )

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep rows."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]

    def shift(self, columns: int) -> None:
        """Move everything to the left."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = roll(self.keys, -columns, 2), roll(self.values, -columns, 2)

    def join(self, other: Any, gap: int) -> None:
        """Append rows, whose tokens begin `gap` columns further right."""
        if self.keys is not None and self.values is not None:
            self.keys = torch.cat([self.keys, roll(other.keys, gap, 2)])
            self.values = torch.cat([self.values, roll(other.values, gap, 2)])


class _SuffixRecurrent(Recurrent):
    """Each row's own Mamba state, from that of its place on."""

    is_sliding = False

    def __init__(self, fork: SuffixCache, state: State, places: Tensor):
        super().__init__(max(len(state.conv), len(state.recurrent), 1))
        self.fork, self.state = weakref.proxy(fork), state
        for i, tensor in state.conv.items():
            self._put_conv(i, tensor[places], state.kernels[i])
        for i, tensor in state.recurrent.items():
            self.update_recurrent_state(tensor[places], i)

    def shift(self, columns: int) -> None:
        """States have no columns."""

    def join(self, other: Any, gap: int) -> None:
        """Append rows."""
        for mine, theirs in ((self.conv_states, other.conv_states), (self.recurrent_states, other.recurrent_states)):
            for i, tensor in mine.items():
                if tensor is not None:
                    mine[i] = torch.cat([tensor, theirs[i]])


class _SuffixBoth(_SuffixRecurrent, _SuffixAttention):
    """A layer that has a Mamba mixer and attention side by side."""

    def __init__(self, fork: SuffixCache, state: State, places: Tensor):
        CacheLayerMixin.__init__(self)
        _SuffixRecurrent.__init__(self, fork, state, places)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """The attention's buffers; states come ready."""
        _SuffixAttention.lazy_initialization(self, *args)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep rows."""
        _SuffixRecurrent.reorder_cache(self, beam_idx)
        _SuffixAttention.reorder_cache(self, beam_idx)

    def shift(self, columns: int) -> None:
        """Move the suffix to the left."""
        _SuffixAttention.shift(self, columns)

    def join(self, other: Any, gap: int) -> None:
        """Append rows."""
        _SuffixRecurrent.join(self, other, gap)
        _SuffixAttention.join(self, other, gap)


def _suffix_layer(fork: SuffixCache, state: State, places: Tensor) -> Any:
    if not state.conv and not state.recurrent:
        return _SuffixAttention(fork, state)
    return _SuffixRecurrent(fork, state, places) if state.keys is None else _SuffixBoth(fork, state, places)
