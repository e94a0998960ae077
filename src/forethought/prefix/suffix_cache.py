"""KV caches of rows that continue documents: each document once, and each row's own suffix.

`SuffixCache` grows and shrinks with its rows. `StaticCache` never changes shape: every number that changes between two
decoding steps is a tensor on the device, so that a step can be captured as a CUDA graph.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, roll
from transformers.cache_utils import Cache, CacheLayerMixin

from forethought.prefix.attention import HIDDEN, Layout, PrefixSuffixKV
from forethought.prefix.reading import LayerState, Prefix, RecurrentLayer, concatenate


class _UnmaskedCache(Cache):
    """A cache for which models build no attention mask."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # the attention function masks, and position ids are always passed

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0  # as if there were only the queries


class _UnmaskedLayer(CacheLayerMixin):
    """An attention layer of such a cache."""

    is_sliding = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1  # unlimited


class SuffixCache(_UnmaskedCache):
    """A cache in which each row continues one of a prefix's positions (indices that do not decrease).

    With a `capacity`, suffix keys and values live in buffers of that many tokens, for decoding; without, one forward
    pass brings the whole suffix and gradients flow through it.
    """

    update: Any = torch.compiler.disable(_UnmaskedCache.update)  # looks up its layer: compiled, each would be alone

    def __init__(self, prefix: Prefix, positions: Sequence[int], capacity: int = 0, triton: bool = False):
        self.prefix, self.positions, self.capacity, self.length = prefix, tuple(positions), capacity, 0
        self.triton = triton  # attend in Triton kernels
        self.start = torch.zeros(len(positions), dtype=torch.long, device=prefix.device)  # first column of each row
        self.ragged = False  # whether any row starts after the first column
        index = torch.tensor(positions, device=prefix.device)
        self.rows: list[Any] = [_suffix_layer(self, state, index) for state in prefix.states]
        self._update_layout()
        super().__init__(layers=self.rows)

    def _update_layout(self) -> None:
        self.layout = Layout.of(*self.documents_and_lengths(), self.prefix.device)
        for layer, state in zip(self.rows, self.prefix.states, strict=True):
            layer.state = state

    def documents_and_lengths(self) -> tuple[list[int], list[int]]:
        """For each row its document, and how many of the document's tokens it continues."""
        prefix = self.prefix
        return [prefix.document[at] for at in self.positions], [prefix.length[at] for at in self.positions]

    def position_ids(self, width: int) -> Int[Tensor, "row width"]:
        """Position ids of the next `width` tokens of each row."""
        steps = torch.arange(self.length, self.length + width, device=self.prefix.device)
        return (self.layout.prefix_lengths - self.start)[:, None] + steps

    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Keep only some rows, in their order; documents without rows are dropped."""
        self.positions = tuple(self.positions[row] for row in rows.tolist())
        self.start = self.start[rows]
        for layer in self.rows:
            layer.reorder_cache(rows)
        self._drop_documents()
        self._update_layout()

    def join(self, other: "SuffixCache") -> None:
        """Append the rows of a younger cache of the same model and capacity; the newest tokens share a column."""
        self._shift(int(self.start.min()))
        gap = self.length - other.length
        assert gap >= 0 and self.capacity == other.capacity
        offset = len(self.prefix.document)
        self.prefix = concatenate(self.prefix, other.prefix)
        self.positions += tuple(offset + position for position in other.positions)
        self.start = torch.cat([self.start, other.start + gap])
        self.ragged = bool(self.start.any())
        for layer, more in zip(self.rows, other.rows, strict=True):
            layer.join(more, gap)
        self._update_layout()

    def reserve(self, width: int) -> None:
        """Ensure that `width` more columns fit, by dropping those that no row uses any more."""
        if self.length + width > self.capacity:
            self._shift(int(self.start.min()))
            assert self.length + width <= self.capacity

    def _shift(self, columns: int) -> None:
        """Drop the oldest columns, in which no row has a token."""
        if columns:
            self.start, self.length = self.start - columns, self.length - columns
            self.ragged = bool(self.start.any())
            for layer in self.rows:
                layer.shift(columns)

    def _drop_documents(self) -> None:
        """Drop documents and positions that no row continues."""
        prefix = self.prefix
        kept = sorted(set(self.positions))
        documents = sorted({prefix.document[position] for position in kept})
        if len(documents) == max(prefix.document) + 1:
            return
        index = torch.tensor(documents, device=prefix.device)
        at = torch.tensor(kept, device=prefix.device)
        states = [state.map(lambda t: t[index], lambda t: t[at]) for state in prefix.states]
        self.prefix = replace(
            prefix,
            states=tuple(states),
            document=tuple(documents.index(prefix.document[position]) for position in kept),
            length=tuple(prefix.length[position] for position in kept),
        )
        self.positions = tuple(kept.index(position) for position in self.positions)

    @property
    def starts(self) -> Int[Tensor, " row"] | None:
        """First column of each row's suffix; None where it is 0 for all."""
        return self.start if self.ragged else None


class _SuffixAttention(_UnmaskedLayer):
    """A layer's suffix keys and values; returns them together with the documents'."""

    def __init__(self, cache: SuffixCache, state: LayerState):
        super().__init__()
        self.cache, self.state = weakref.proxy(cache), state  # a cycle would keep masks and buffers until collected

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (*key_states.shape[:2], self.cache.capacity)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, state = self.cache, self.state
        assert state.keys is not None and state.values is not None
        if cache.capacity:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            assert self.keys is not None and self.values is not None
            end = cache.length + key_states.shape[2]
            self.keys[:, :, cache.length : end] = key_states
            self.values[:, :, cache.length : end] = value_states
            key_states, value_states = self.keys[:, :, :end], self.values[:, :, :end]
        return (
            PrefixSuffixKV(state.keys, key_states, cache.layout, cache.starts, cache.triton),
            PrefixSuffixKV(state.values, value_states, cache.layout, cache.starts, cache.triton),
        )

    def reorder_cache(self, beam_idx: Any) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]

    def shift(self, columns: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = roll(self.keys, -columns, 2), roll(self.values, -columns, 2)

    def join(self, other: Any, gap: int) -> None:
        """Append rows, whose tokens begin `gap` columns further right."""
        if self.keys is not None and self.values is not None:
            self.keys = torch.cat([self.keys, roll(other.keys, gap, 2)])
            self.values = torch.cat([self.values, roll(other.values, gap, 2)])


class _SuffixRecurrent(RecurrentLayer):
    """Each row's own Mamba state, starting from that of its position."""

    is_sliding = False

    def __init__(self, cache: SuffixCache, state: LayerState, positions: Tensor):
        super().__init__(max(len(state.conv), len(state.recurrent), 1))
        self.cache, self.state = weakref.proxy(cache), state
        for i, tensor in state.conv.items():
            self._set_conv(i, tensor[positions], state.kernels[i])
        for i, tensor in state.recurrent.items():
            self.update_recurrent_state(tensor[positions], i)

    def shift(self, columns: int) -> None:
        """Nothing to do: states have no columns."""

    def join(self, other: Any, gap: int) -> None:
        for mine, theirs in ((self.conv_states, other.conv_states), (self.recurrent_states, other.recurrent_states)):
            for i, tensor in mine.items():
                if tensor is not None:
                    mine[i] = torch.cat([tensor, theirs[i]])


class _SuffixBoth(_SuffixRecurrent, _SuffixAttention):
    """A layer that has a Mamba mixer and attention side by side."""

    def __init__(self, cache: SuffixCache, state: LayerState, positions: Tensor):
        CacheLayerMixin.__init__(self)
        _SuffixRecurrent.__init__(self, cache, state, positions)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        _SuffixAttention.lazy_initialization(self, *args)

    def reorder_cache(self, beam_idx: Any) -> None:
        _SuffixRecurrent.reorder_cache(self, beam_idx)
        _SuffixAttention.reorder_cache(self, beam_idx)

    def shift(self, columns: int) -> None:
        _SuffixAttention.shift(self, columns)

    def join(self, other: Any, gap: int) -> None:
        _SuffixRecurrent.join(self, other, gap)
        _SuffixAttention.join(self, other, gap)


def _suffix_layer(cache: SuffixCache, state: LayerState, positions: Tensor) -> Any:
    if not state.conv and not state.recurrent:
        return _SuffixAttention(cache, state)
    return (_SuffixRecurrent if state.keys is None else _SuffixBoth)(cache, state, positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCapacity:
    """The shape of a static cache."""

    rows: int
    documents: int
    slots: int  # most rows of one document
    prefix: int  # longest document, in tokens
    suffix: int  # longest suffix, in tokens

    def fits(self, other: "CacheCapacity") -> bool:
        """Whether a cache of the other shape fits into one of this shape."""
        names = ("rows", "documents", "slots", "prefix", "suffix")
        return all(getattr(self, name) >= getattr(other, name) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Which document each row continues, and how much of it the row sees, as tensors on the device."""

    prefix_lengths: Int[Tensor, " row"]  # the row sees the first so many keys of its document
    documents: Int[Tensor, " row"]  # its document
    slot_index: Int[Tensor, " row"]  # its index in the flattened `slots`
    slots: Int[Tensor, "document slot"]  # the rows of each document; -1 where there is none
    longest: Int[Tensor, " document"]  # the largest prefix length of its rows
    column: Int[Tensor, "1"]  # column of the newest token of all suffixes; earlier columns are seen

    @classmethod
    def of(cls, capacity: CacheCapacity, device: torch.device) -> "Table":
        """A table in which no row sees anything yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        slots = zeros(capacity.documents, capacity.slots) - 1
        own = {name: zeros(capacity.rows) for name in ("prefix_lengths", "documents", "slot_index")}
        return cls(**own, slots=slots, longest=zeros(capacity.documents), column=zeros(1))

    def head(self, rows: int) -> "Table":
        """A view of the first rows."""
        own = {name: getattr(self, name)[:rows] for name in ("prefix_lengths", "documents", "slot_index")}
        return Table(**own, slots=self.slots, longest=self.longest, column=self.column)

    def fill(self, documents: Sequence[int], prefix_lengths: Sequence[int]) -> None:
        """Let row i continue `prefix_lengths[i]` tokens of document `documents[i]`; later rows keep their values."""
        count, slots = self.slots.shape
        members: list[list[int]] = [[] for _ in range(count)]
        for row, document in enumerate(documents):
            members[document].append(row)
        rows = [row for some in members for row in some]
        index = [document * slots + i for document, some in enumerate(members) for i in range(len(some))]
        longest = [max((prefix_lengths[row] for row in some), default=0) for some in members]
        device = self.slots.device
        self.slots.copy_(torch.tensor([some + [-1] * (slots - len(some)) for some in members]))
        self.longest.copy_(torch.tensor(longest))
        self.slot_index[torch.tensor(rows, device=device)] = torch.tensor(index, device=device)
        self.prefix_lengths[: len(prefix_lengths)] = torch.tensor(list(prefix_lengths), device=device)
        self.documents[: len(documents)] = torch.tensor(list(documents), device=device)


@dataclass(frozen=True, slots=True)
class StaticKV:
    """Keys or values of a static cache, passed where an attention function expects one tensor."""

    prefix: Float[Tensor, "document head prefix size"]
    suffix: Float[Tensor, "row head suffix size"]
    table: Table

    @property
    def shape(self) -> torch.Size:
        """Shape of the suffix, from which models read the number of rows."""
        return self.suffix.shape


class StaticCache(_UnmaskedCache):
    """The cache of rows that read one token each, all at the same column."""

    def __init__(self, table: Table, layers: Sequence["_StaticAttention | _StaticRecurrent"]):
        self.table, self.own = table, list(layers)
        super().__init__(layers=[*self.own])

    @classmethod
    def like(cls, cache: SuffixCache, capacity: CacheCapacity) -> "StaticCache":
        """Buffers of a capacity, for a model that has read some tokens into `cache`."""
        table = Table.of(capacity, cache.prefix.device)
        return cls(table, [_static_layer(table, _Buffers.like(own, capacity)) for own in cache.rows])

    def head(self, rows: int) -> "StaticCache":
        """A view of the first rows."""
        part = self.table.head(rows)
        return StaticCache(part, [_static_layer(part, layer.buffers.head(rows)) for layer in self.own])

    def load(self, cache: SuffixCache) -> None:
        """Copy the documents and rows of a cache, with the tokens that it has read."""
        for mine, theirs in zip(self.own, cache.rows, strict=True):
            mine.buffers.load(theirs, cache.length)
        self.table.fill(*cache.documents_and_lengths())
        self.table.column.fill_(cache.length)

    def move_to_front(self, rows: Int[Tensor, " row"], known: int) -> None:
        """Move some rows to the front, in this order; the first `known` of them continue a document."""
        count, table = len(rows), self.table
        for layer in self.own:
            for tensor in [*(suffix for _, suffix in layer.buffers.pairs), *layer.buffers.states()]:
                tensor[:count] = tensor[rows]
        table.fill(table.documents[rows[:known]].tolist(), table.prefix_lengths[rows[:known]].tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffers:
    """The tensors of a layer of a static cache; absent parts are empty."""

    pairs: tuple[tuple[Tensor, Tensor], ...] = ()  # keys and values: (document, head, prefix, size), (row, head, ...)
    conv: dict[int, Tensor] = field(default_factory=dict)  # (row, channels, kernel)
    recurrent: dict[int, Tensor] = field(default_factory=dict)  # (row, ...)
    kernels: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def like(cls, own: Any, capacity: CacheCapacity) -> "_Buffers":
        """Empty buffers of the kind of a layer of a `SuffixCache`."""

        def rows(states: dict[int, Tensor]) -> dict[int, Tensor]:
            return {i: state.new_zeros(capacity.rows, *state.shape[1:]) for i, state in states.items()}

        pairs, state = [], own.state
        for like in (own.keys, own.values) if state.keys is not None else ():
            _, heads, _, size = like.shape
            prefix = like.new_zeros(capacity.documents, heads, capacity.prefix, size)
            pairs.append((prefix, like.new_zeros(capacity.rows, heads, capacity.suffix, size)))
        return cls(pairs=tuple(pairs), conv=rows(state.conv), recurrent=rows(state.recurrent), kernels=state.kernels)

    def head(self, rows: int) -> "_Buffers":
        """Views of the first rows, and all documents."""
        return replace(
            self,
            pairs=tuple((prefix, suffix[:rows]) for prefix, suffix in self.pairs),
            conv={i: state[:rows] for i, state in self.conv.items()},
            recurrent={i: state[:rows] for i, state in self.recurrent.items()},
        )

    def states(self) -> list[Tensor]:
        """The Mamba states, which a step reads and writes."""
        return [*self.conv.values(), *self.recurrent.values()]

    def load(self, own: Any, length: int) -> None:
        """Copy a layer of a `SuffixCache` whose rows have read `length` tokens."""
        given = ((own.state.keys, own.keys), (own.state.values, own.values)) if self.pairs else ()
        for (prefix, suffix), (shared, read) in zip(self.pairs, given, strict=True):
            prefix[: shared.shape[0], :, : shared.shape[2]] = shared
            suffix[: read.shape[0], :, :length] = read[:, :, :length]
        for i, state in self.conv.items():
            state[: len(own.conv_states[i])] = own.conv_states[i]
        for i, state in self.recurrent.items():
            state[: len(own.recurrent_states[i])] = own.recurrent_states[i]


class _StaticAttention(_UnmaskedLayer):
    """A layer's prefix and suffix, keys and values."""

    def __init__(self, table: Table, buffers: _Buffers):
        super().__init__()
        self.table: Any = table
        self.buffers: Any = buffers
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers are given."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        updated = []
        for (prefix, suffix), new in zip(self.buffers.pairs, (key_states, value_states), strict=True):
            suffix.index_copy_(2, self.table.column, new)
            updated.append(StaticKV(prefix, suffix, self.table))
        return tuple(updated)


class _StaticRecurrent(RecurrentLayer):
    """Mamba states in buffers that are written into."""

    is_sliding = False

    def __init__(self, table: Table, buffers: _Buffers):
        super().__init__(max(len(buffers.conv), len(buffers.recurrent), 1))
        self.table, self.buffers = table, buffers
        for i, state in buffers.conv.items():
            super()._set_conv(i, state, buffers.kernels[i])
        for i, state in buffers.recurrent.items():
            super().update_recurrent_state(state, i)

    def _set_conv(self, state_idx: int, tensor: Tensor, kernel: Any) -> None:
        self.buffers.conv[state_idx].copy_(tensor)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return self.buffers.recurrent[state_idx].copy_(recurrent_states)


class _StaticBoth(_StaticRecurrent, _StaticAttention):
    """A layer that has a Mamba mixer and attention side by side."""

    def __init__(self, table: Table, buffers: _Buffers):
        CacheLayerMixin.__init__(self)
        _StaticRecurrent.__init__(self, table, buffers)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the buffers are given."""


def _static_layer(table: Table, buffers: _Buffers) -> Any:
    if not buffers.conv and not buffers.recurrent:
        return _StaticAttention(table, buffers)
    return (_StaticBoth if buffers.pairs else _StaticRecurrent)(table, buffers)


def static_kv_attention(
    query: Tensor, key: StaticKV, value: StaticKV, scale: float, window: int | None = None
) -> Tensor:
    """softmax(q k) v over a row's document and suffix, for one query a row: (row, query head, 1, size) each."""
    if query.is_cuda:
        from forethought.prefix import kernels

        table = key.table
        numbers = (table.slots, table.longest, table.prefix_lengths, table.column)
        tensors = (key.prefix, value.prefix, key.suffix, value.suffix)
        out = kernels.decode_attention(query.squeeze(2), *tensors, *numbers, scale, window or 0)
        return out.unsqueeze(2)
    return _static_reference(query, key, value, scale, window)


def _static_reference(query: Tensor, key: StaticKV, value: StaticKV, scale: float, window: int | None) -> Tensor:
    """The same in matrix products: queries of all rows of a document are rows of one matrix per key head."""
    table, (rows, total, _, size) = key.table, query.shape
    heads, (documents, slots) = key.suffix.shape[1], table.slots.shape
    prefix, suffix, fan = key.prefix.shape[2], key.suffix.shape[2], total // heads
    members = table.slots.clamp(min=0).flatten()

    def fold(x: Tensor) -> Tensor:  # (row, key head, fan, *) -> (document, key head, slot * fan, *)
        grid = x.index_select(0, members).view(documents, slots, heads, fan, -1)
        return grid.transpose(1, 2).reshape(documents, heads, slots * fan, -1)

    def unfold(y: Tensor) -> Tensor:
        grid = y.view(documents, heads, slots, fan, -1).transpose(1, 2)
        return grid.reshape(documents * slots, heads, fan, -1).index_select(0, table.slot_index)

    query = query.view(rows, heads, fan, size) * scale
    at, own_at = (torch.arange(length, device=query.device) for length in (prefix, suffix))
    lengths = table.prefix_lengths[:, None]
    before, own = at < lengths, (own_at <= table.column).expand(rows, -1)
    if window is not None:
        before = before & (at > lengths + table.column - window)
        own = own & (own_at > table.column - window)
    shared = unfold(torch.matmul(fold(query), key.prefix.transpose(-1, -2)))
    score = torch.cat([shared, torch.matmul(query, key.suffix.transpose(-1, -2))], dim=-1).float()
    score = score.masked_fill(~torch.cat([before, own], dim=1)[:, None, None], HIDDEN)
    weight = score.softmax(dim=-1).to(value.prefix.dtype)
    out = unfold(torch.matmul(fold(weight[..., :prefix]), value.prefix))
    return (out + torch.matmul(weight[..., prefix:], value.suffix)).view(rows, total, 1, -1)
