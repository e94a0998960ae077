"""Decoding attention on a GPU (Triton): many rows over one copy of their document, then over their own suffixes.

Two kernels write partial outputs with their log-sum-exp, a third merges them. A program of the first reads a piece of a
document's keys once for all rows that continue it. Lengths are read from device memory, so a captured call stays valid
as suffixes grow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 264  # two per multiprocessor of a large GPU; documents are split into pieces until there are as many
_PIECES = 16  # at most


@triton.jit
def _sweep(q, keys, values, low, high, first, last, scale, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # pragma: no cover
    """Online softmax of a tile of queries over keys low .. high-1; a query sees keys first .. last-1."""
    rows: tl.constexpr = q.shape[0]
    wide: tl.constexpr = q.shape[1]
    size = tl.arange(0, wide)
    top = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    out = tl.zeros([rows, wide], tl.float32)
    for start in range(low, high, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < high
        k = tl.load(keys + at[None, :] * SIZE + size[:, None], mask=inside[None, :] & (size < SIZE)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        seen = (at[None, :] >= first[:, None]) & (at[None, :] < last[:, None])
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp(score - safe[:, None])
        decay = tl.exp(top - safe)
        total = total * decay + tl.sum(weight, 1)
        v = tl.load(
            values + at[:, None] * SIZE + size[None, :], mask=inside[:, None] & (size < SIZE)[None, :], other=0.0
        )
        out = out * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        top = new
    none = total == 0.0
    lse = tl.where(none, float("-inf"), top + tl.log(tl.where(none, 1.0, total)))
    return out / tl.where(none, 1.0, total)[:, None], lse


@triton.jit
def _documents(  # pragma: no cover
    q, keys, values, slots, seen, stop, column, out, lse, scale, rows, width, prefix,
    HEADS: tl.constexpr, FAN: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One key head of one document, one piece of its keys, one tile of its rows and their query heads."""
    document, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    piece, pieces = tl.program_id(1), tl.num_programs(1)
    place = tl.program_id(2) * TILE + tl.arange(0, TILE)
    slot = place // FAN
    row = tl.load(slots + document * width + slot, mask=slot < width, other=-1)
    real = row >= 0
    row = tl.where(real, row, 0)
    line = row * HEADS * FAN + head * FAN + place % FAN
    size = tl.arange(0, WIDE)
    known = real[:, None] & (size < SIZE)[None, :]
    tile = tl.load(q + line[:, None] * SIZE + size[None, :], mask=known, other=0.0)
    length = tl.load(seen + document)
    each = tl.cdiv(tl.cdiv(length, pieces), BLOCK) * BLOCK
    last = tl.load(stop + row, mask=real, other=0)
    first = tl.zeros_like(last)
    if WINDOW > 0:
        first = tl.maximum(last + tl.load(column) - WINDOW + 1, 0)
    ahead = (document * HEADS + head).to(tl.int64) * prefix * SIZE
    low, high = piece * each, tl.minimum((piece + 1) * each, length)
    part, part_lse = _sweep(tile, keys + ahead, values + ahead, low, high, first, last, scale, SIZE, BLOCK)
    line += piece * rows * HEADS * FAN
    tl.store(out + line[:, None] * SIZE + size[None, :], part, mask=known)
    tl.store(lse + line, part_lse, mask=real)


@triton.jit
def _suffixes(  # pragma: no cover
    q, keys, values, column, out, lse, scale, rows, pieces, suffix,
    HEADS: tl.constexpr, FAN: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One key head of one row's own suffix, for the query heads that it serves."""
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    place = tl.arange(0, TILE)
    line = row * HEADS * FAN + head * FAN + place
    size = tl.arange(0, WIDE)
    known = (place < FAN)[:, None] & (size < SIZE)[None, :]
    tile = tl.load(q + line[:, None] * SIZE + size[None, :], mask=known, other=0.0)
    length = tl.load(column) + 1
    last = tl.zeros([TILE], tl.int64) + length
    first = tl.zeros([TILE], tl.int64)
    if WINDOW > 0:
        first = tl.maximum(last - WINDOW, 0)
    ahead = (row * HEADS + head).to(tl.int64) * suffix * SIZE
    part, part_lse = _sweep(tile, keys + ahead, values + ahead, 0, length, first, last, scale, SIZE, BLOCK)
    line += pieces * rows * HEADS * FAN
    tl.store(out + line[:, None] * SIZE + size[None, :], part, mask=known)
    tl.store(lse + line, part_lse, mask=place < FAN)


@triton.jit
def _merge(
    parts, lse, out, lines, count, SIZE: tl.constexpr, WIDE: tl.constexpr, MANY: tl.constexpr
):  # pragma: no cover
    """The parts of one row and query head as one softmax."""
    line = tl.program_id(0)
    part = tl.arange(0, MANY)
    size = tl.arange(0, WIDE)
    log = tl.load(lse + part * lines + line, mask=part < count, other=float("-inf"))
    weight = tl.exp(log - tl.max(log, 0))
    weight = weight / tl.sum(weight, 0)
    at = (part[:, None] * lines + line) * SIZE + size[None, :]
    each = tl.load(parts + at, mask=(part < count)[:, None] & (size < SIZE)[None, :], other=0.0)
    each = tl.where(weight[:, None] > 0, each, 0.0)
    tl.store(out + line * SIZE + size, tl.sum(each * weight[:, None], 0), mask=size < SIZE)


@torch.library.custom_op("forethought::decode_attention", mutates_args=())
def decode_attention(
    query: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    slots: Tensor,
    seen: Tensor,
    stop: Tensor,
    column: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """softmax(q k) v over a row's document and its own suffix, one query a row.

    Args:
        query: (row, query head, size).
        prefix_keys: (document, key head, prefix, size), as prefix_values; contiguous.
        suffix_keys: (row, key head, suffix, size), as suffix_values; contiguous.
        slots: the rows of each document (document, slot), -1 where there is none.
        seen: the largest `stop` of a document's rows.
        stop: keys of its document that a row sees.
        column: (1,), the newest column of all suffixes.
        scale: factor of the scores.
        window: a query sees the last `window` tokens only; 0: all.
    """
    rows, total, size = query.shape
    documents, heads, prefix, _ = prefix_keys.shape
    fan, slot = total // heads, slots.shape[1]
    query = query.contiguous()
    tile = min(64, max(16, triton.next_power_of_2(slot * fan)))
    tiles = triton.cdiv(slot * fan, tile)
    pieces = max(1, min(_PIECES, triton.cdiv(_PROGRAMS, documents * heads * tiles), triton.cdiv(prefix, 64)))
    parts = torch.empty(pieces + 1, rows, total, size, dtype=torch.float32, device=query.device)
    lse = torch.empty(pieces + 1, rows, total, dtype=torch.float32, device=query.device)
    wide = triton.next_power_of_2(size)
    shape = {"HEADS": heads, "FAN": fan, "SIZE": size, "WIDE": wide, "WINDOW": window}
    _documents[(documents * heads, pieces, tiles)](
        query, prefix_keys, prefix_values, slots, seen, stop, column, parts, lse, scale, rows, slot, prefix,
        **shape, TILE=tile, BLOCK=64, num_warps=4,
    )  # fmt: skip
    own = max(16, triton.next_power_of_2(fan))
    _suffixes[(rows * heads,)](
        query, suffix_keys, suffix_values, column, parts, lse, scale, rows, pieces, suffix_keys.shape[2],
        **shape, TILE=own, BLOCK=32, num_warps=2,
    )  # fmt: skip
    out = torch.empty_like(query)
    many = triton.next_power_of_2(pieces + 1)
    _merge[(rows * total,)](parts, lse, out, rows * total, pieces + 1, SIZE=size, WIDE=wide, MANY=many, num_warps=1)
    return out


@decode_attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)
