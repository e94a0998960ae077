"""A cache that never changes its shape: documents once, a buffer of suffix tokens for each row, one column for all.

For decoding without the host: every number that changes from step to step is a tensor on the device, so that a step can
be captured once and replayed. Attention layers only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from forethought.prefix.attention import HIDDEN
from forethought.prefix.states import Unmasked, UnmaskedLayer
from forethought.prefix.suffix_cache import SuffixCache


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCapacity:
    """How large a cache is."""

    rows: int
    documents: int
    slots: int  # most rows of one document
    prefix: int  # longest document, in tokens
    suffix: int  # longest suffix, in tokens

    def holds(self, other: "CacheCapacity") -> bool:
        """Whether as much as the other room holds fits here."""
        names = ("rows", "documents", "slots", "prefix", "suffix")
        return all(getattr(self, name) >= getattr(other, name) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Which document each row continues, and how much of it the row sees; the numbers behind a step's attention."""

    stop: Int[Tensor, " row"]  # the row sees keys 0 .. stop-1 of its document
    owner: Int[Tensor, " row"]  # its document
    place: Int[Tensor, " row"]  # where it stands in `slots`, read as one list
    slots: Int[Tensor, "document slot"]  # the rows of each document; -1 where there is none
    seen: Int[Tensor, " document"]  # the largest stop of its rows
    column: Int[Tensor, "1"]  # column of the newest token of all suffixes; earlier columns are seen

    @classmethod
    def of(cls, room: CacheCapacity, device: torch.device) -> "Table":
        """A table in which no row sees anything yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        slots = zeros(room.documents, room.slots) - 1
        stop, owner, place = (zeros(room.rows) for _ in range(3))
        return cls(stop=stop, owner=owner, place=place, slots=slots, seen=zeros(room.documents), column=zeros(1))

    def head(self, rows: int) -> "Table":
        """The same numbers, of the first rows only."""
        own = {name: getattr(self, name)[:rows] for name in ("stop", "owner", "place")}
        return Table(**own, slots=self.slots, seen=self.seen, column=self.column)

    def fill(self, owner: Sequence[int], stop: Sequence[int]) -> None:
        """Let row i continue `stop[i]` tokens of document `owner[i]`; rows beyond these keep what they had."""
        documents, slots = self.slots.shape
        members: list[list[int]] = [[] for _ in range(documents)]
        for row, document in enumerate(owner):
            members[document].append(row)
        places = [document * slots + i for document, some in enumerate(members) for i in range(len(some))]
        rows = [row for some in members for row in some]
        table = [some + [-1] * (slots - len(some)) for some in members]
        seen = [max((stop[row] for row in some), default=0) for some in members]
        self.slots.copy_(torch.tensor(table))
        self.seen.copy_(torch.tensor(seen))
        self.place[torch.tensor(rows, device=self.place.device)] = torch.tensor(places, device=self.place.device)
        self.stop[: len(stop)] = torch.tensor(list(stop), device=self.stop.device)
        self.owner[: len(owner)] = torch.tensor(list(owner), device=self.owner.device)


@dataclass(frozen=True, slots=True)
class StaticKV:
    """Keys or values of a static cache; stands where an attention function expects one tensor."""

    prefix: Float[Tensor, "document head prefix size"]
    suffix: Float[Tensor, "row head suffix size"]
    table: Table

    @property
    def shape(self) -> torch.Size:
        """Shape of the suffix; models look at it for the number of rows."""
        return self.suffix.shape


class StaticCache(Unmasked):
    """The cache of rows that read one token each, all at the same column."""

    def __init__(self, table: Table, layers: Sequence["_Layer"]):
        self.table, self.own = table, list(layers)
        super().__init__(layers=[*self.own])

    @classmethod
    def like(cls, fork: SuffixCache, room: CacheCapacity) -> "StaticCache":
        """Buffers of the size of `room`, for a model that has read some tokens into `fork`.

        Raises ValueError for a model with layers that are no attention.
        """
        layers = []
        for own in fork.rows:
            if getattr(own, "keys", None) is None or own.state.conv or own.state.recurrent:
                raise ValueError("its cache has Mamba states, which a static cache does not take")
            layers.append([_buffers(some, room) for some in (own.keys, own.values)])
        table = Table.of(room, fork.prefix.device)
        return cls(table, [_Layer(table, keys, values) for keys, values in layers])

    def head(self, rows: int) -> "StaticCache":
        """The same buffers, of which only the first rows take part."""
        part = self.table.head(rows)
        layers = [_Layer(part, (x.keys[0], x.keys[1][:rows]), (x.values[0], x.values[1][:rows])) for x in self.own]
        return StaticCache(part, layers)

    def load(self, fork: SuffixCache) -> None:
        """Take over the documents and rows of a fork, the tokens that it has read included."""
        for mine, theirs in zip(self.own, fork.rows, strict=True):
            for (prefix, suffix), shared, own in (
                (mine.keys, theirs.state.keys, theirs.keys),
                (mine.values, theirs.state.values, theirs.values),
            ):
                prefix[: shared.shape[0], :, : shared.shape[2]] = shared
                suffix[: own.shape[0], :, : fork.length] = own[:, :, : fork.length]
        self.table.fill(*([some[place] for place in fork.places] for some in (fork.prefix.owner, fork.prefix.stop)))
        self.table.column.fill_(fork.length)

    def pick(self, rows: Int[Tensor, " row"], known: int) -> None:
        """Put some rows first, in this order; the first `known` of them continue a document."""
        count, table = len(rows), self.table
        for layer in self.own:
            for _, suffix in (layer.keys, layer.values):
                suffix[:count] = suffix[rows]
        table.fill(table.owner[rows[:known]].tolist(), table.stop[rows[:known]].tolist())


class _Layer(UnmaskedLayer):
    """A layer's prefix and suffix, keys and values."""

    def __init__(self, table: Table, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]):
        super().__init__()
        self.table: Any = table
        self.keys: Any = keys
        self.values: Any = values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: buffers come ready."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write the newest token of each row at the common column."""
        held = []
        for (prefix, suffix), new in ((self.keys, key_states), (self.values, value_states)):
            suffix.index_copy_(2, self.table.column, new)
            held.append(StaticKV(prefix, suffix, self.table))
        return tuple(held)


def _buffers(like: Tensor, room: CacheCapacity) -> tuple[Tensor, Tensor]:
    """Of documents and of suffixes, for keys or values of the kind of `like`."""
    _, heads, _, size = like.shape
    prefix = like.new_zeros(room.documents, heads, room.prefix, size)
    return prefix, like.new_zeros(room.rows, heads, room.suffix, size)


def static_kv_attention(
    query: Tensor, key: StaticKV, value: StaticKV, scale: float, window: int | None = None
) -> Tensor:
    """softmax(q k) v over a row's document and suffix, for one query a row: (row, query head, 1, size) each."""
    if query.is_cuda:
        from forethought.prefix import kernels

        table = key.table
        numbers = (table.slots, table.seen, table.stop, table.column)
        tensors = (key.prefix, value.prefix, key.suffix, value.suffix)
        out = kernels.decode_attention(query.squeeze(2), *tensors, *numbers, scale, window or 0)
        return out.unsqueeze(2)
    return _plain(query, key, value, scale, window)


def _plain(query: Tensor, key: StaticKV, value: StaticKV, scale: float, window: int | None) -> Tensor:
    """The same in plain matrix products: queries of all rows of a document are rows of one matrix a key head."""
    table, (rows, total, _, size) = key.table, query.shape
    heads, (documents, slots) = key.suffix.shape[1], table.slots.shape
    prefix, suffix, fan = key.prefix.shape[2], key.suffix.shape[2], total // heads
    members = table.slots.clamp(min=0).flatten()

    def fold(x: Tensor) -> Tensor:  # (row, key head, fan, *) -> (document, key head, slot * fan, *)
        grid = x.index_select(0, members).view(documents, slots, heads, fan, -1)
        return grid.transpose(1, 2).reshape(documents, heads, slots * fan, -1)

    def unfold(y: Tensor) -> Tensor:
        grid = y.view(documents, heads, slots, fan, -1).transpose(1, 2)
        return grid.reshape(documents * slots, heads, fan, -1).index_select(0, table.place)

    query = query.view(rows, heads, fan, size) * scale
    before = torch.arange(prefix, device=query.device) < table.stop[:, None]
    own = (torch.arange(suffix, device=query.device) <= table.column).expand(rows, -1)
    if window is not None:
        before = before & (torch.arange(prefix, device=query.device) > table.stop[:, None] + table.column - window)
        own = own & (torch.arange(suffix, device=query.device) > table.column - window)
    shared = unfold(torch.matmul(fold(query), key.prefix.transpose(-1, -2)))
    score = torch.cat([shared, torch.matmul(query, key.suffix.transpose(-1, -2))], dim=-1).float()
    score = score.masked_fill(~torch.cat([before, own], dim=1)[:, None, None], HIDDEN)
    weight = score.softmax(dim=-1).to(value.prefix.dtype)
    out = unfold(torch.matmul(fold(weight[..., :prefix]), value.prefix))
    return (out + torch.matmul(weight[..., prefix:], value.suffix)).view(rows, total, 1, -1)
