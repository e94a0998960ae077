"""Triton kernels of a GPU: attention of many rows to one copy of their document and to their suffixes, and rotation.

Decoding: two kernels write partial outputs with their log-sum-exp, a third merges them. A program of the first reads a
piece of a document's keys once for all rows that continue it. Lengths are read from device memory, so a captured call
stays valid as suffixes grow.

Training (`row_attention`): one kernel forward and three backward, however many positions a document has. A program of
the backward pass's last two sums a few keys' gradients over all rows that see them, without atomics: repeatable.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 264  # two per multiprocessor of a large GPU; documents are split into pieces until there are as many
_PIECES = 16  # at most


@triton.jit
def _sweep(
    q, keys, values, step, low, high, first, last, scale, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # pragma: no cover
    """Online softmax of a tile of queries over keys low .. high-1, `step` apart; a query sees keys first .. last-1."""
    rows: tl.constexpr = q.shape[0]
    wide: tl.constexpr = q.shape[1]
    size = tl.arange(0, wide)
    top = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    out = tl.zeros([rows, wide], tl.float32)
    for start in range(low, high, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < high
        k = tl.load(keys + at[None, :] * step + size[:, None], mask=inside[None, :] & (size < SIZE)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        seen = (at[None, :] >= first[:, None]) & (at[None, :] < last[:, None])
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp(score - safe[:, None])
        decay = tl.exp(top - safe)
        total = total * decay + tl.sum(weight, 1)
        v = tl.load(
            values + at[:, None] * step + size[None, :], mask=inside[:, None] & (size < SIZE)[None, :], other=0.0
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
    part, part_lse = _sweep(tile, keys + ahead, values + ahead, SIZE, low, high, first, last, scale, SIZE, BLOCK)
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
    part, part_lse = _sweep(tile, keys + ahead, values + ahead, SIZE, 0, length, first, last, scale, SIZE, BLOCK)
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


@triton.jit
def _queries(
    row, head, start, width, suffix, q_row, q_head, q_step,
    HEADS: tl.constexpr, FAN: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """A tile of queries of one row that share a key head, query head by query head: their columns in the suffix, where
    they are in (row, query head, query) and in the tensor of queries, and whether there are so many."""
    line = start + tl.arange(0, TILE)
    query_head, at = head * FAN + line // width, line % width
    size = tl.arange(0, WIDE)
    place = (row * q_row + query_head * q_head + at * q_step)[:, None] + size[None, :]
    real = line < FAN * width
    number = (row * HEADS * FAN + query_head) * width + at
    return suffix - width + at, number, place, real, real[:, None] & (size < SIZE)[None, :]


@triton.jit
def _limits(own, stop, begin, PREFIX: tl.constexpr, WINDOW: tl.constexpr):  # pragma: no cover
    """First key that each query sees of its document or its suffix, and the one after the last."""
    last = tl.zeros_like(own) + stop if PREFIX else own + 1
    first = tl.zeros_like(own) if PREFIX else tl.zeros_like(own) + begin
    if WINDOW > 0:
        first = tl.maximum(first, (stop - begin if PREFIX else 0) + own - WINDOW + 1)
    return first, last


@triton.jit
def _rows(  # pragma: no cover
    q, prefix_keys, prefix_values, suffix_keys, suffix_values, documents, stops, begins, out, lse, scale, width, suffix,
    q_row, q_head, q_step, p_document, p_head, p_step, s_row, s_head, s_step,
    HEADS: tl.constexpr, FAN: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of queries over the keys of their row's document, then over those of its suffix."""
    row, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    own, number, place, real, known = _queries(
        row, head, tl.program_id(1) * TILE, width, suffix, q_row, q_head, q_step, HEADS, FAN, SIZE, WIDE, TILE
    )
    tile = tl.load(q + place, mask=known, other=0.0)
    stop, begin = tl.load(stops + row), tl.load(begins + row)
    first, last = _limits(own, stop, begin, True, WINDOW)
    ahead, low = tl.load(documents + row) * p_document + head * p_head, tl.min(first, 0)
    k, v = prefix_keys + ahead, prefix_values + ahead
    shared, shared_lse = _sweep(tile, k, v, p_step, low, stop, first, last, scale, SIZE, BLOCK)
    first, last = _limits(own, stop, begin, False, WINDOW)
    ahead, low, high = row * s_row + head * s_head, tl.min(first, 0), tl.max(last, 0)
    k, v = suffix_keys + ahead, suffix_values + ahead
    new, new_lse = _sweep(tile, k, v, s_step, low, high, first, last, scale, SIZE, BLOCK)
    top = tl.maximum(shared_lse, new_lse)  # finite: a query sees itself
    total = top + tl.log(tl.exp(shared_lse - top) + tl.exp(new_lse - top))
    merged = shared * tl.exp(shared_lse - total)[:, None] + new * tl.exp(new_lse - total)[:, None]
    tl.store(out + place, merged, mask=known)
    tl.store(lse + number, total, mask=real)


@triton.jit
def _back(  # pragma: no cover
    q, grad, lse, delta, keys, values, step, first, last, scale, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradient of a tile of queries from the keys first .. last-1 that each sees, up to `scale`."""
    size, high = tl.arange(0, q.shape[1]), tl.max(last, 0)
    out = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    for start in range(tl.min(first, 0), high, BLOCK):
        at = start + tl.arange(0, BLOCK)
        known = (at < high)[:, None] & (size < SIZE)[None, :]
        place = at[:, None] * step + size[None, :]
        k, v = tl.load(keys + place, mask=known, other=0.0), tl.load(values + place, mask=known, other=0.0)
        seen = (at[None, :] >= first[:, None]) & (at[None, :] < last[:, None])
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        weight = tl.where(seen, tl.exp(score - lse[:, None]), 0.0)
        weight = weight * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        out += tl.dot(weight.to(k.dtype), k, input_precision="ieee")
    return out


@triton.jit
def _rows_back(  # pragma: no cover
    q, prefix_keys, prefix_values, suffix_keys, suffix_values, documents, stops, begins, out, lse, grad, delta,
    query_grad, scale, width, suffix, q_row, q_head, q_step, p_document, p_head, p_step, s_row, s_head, s_step,
    HEADS: tl.constexpr, FAN: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and `delta`, for each the sum of its output times the output's gradient."""
    row, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    own, number, place, real, known = _queries(
        row, head, tl.program_id(1) * TILE, width, suffix, q_row, q_head, q_step, HEADS, FAN, SIZE, WIDE, TILE
    )
    tile, change = tl.load(q + place, mask=known, other=0.0), tl.load(grad + place, mask=known, other=0.0)
    total = tl.sum(change.to(tl.float32) * tl.load(out + place, mask=known, other=0.0).to(tl.float32), 1)
    tl.store(delta + number, total, mask=real)
    log = tl.load(lse + number, mask=real, other=0.0)
    stop, begin = tl.load(stops + row), tl.load(begins + row)
    first, last = _limits(own, stop, begin, True, WINDOW)
    ahead = tl.load(documents + row) * p_document + head * p_head
    k, v = prefix_keys + ahead, prefix_values + ahead
    found = _back(tile, change, log, total, k, v, p_step, first, last, scale, SIZE, BLOCK)
    first, last = _limits(own, stop, begin, False, WINDOW)
    ahead = row * s_row + head * s_head
    k, v = suffix_keys + ahead, suffix_values + ahead
    found += _back(tile, change, log, total, k, v, s_step, first, last, scale, SIZE, BLOCK)
    tl.store(query_grad + place, found * scale, mask=known)


@triton.jit
def _keys_back(  # pragma: no cover
    q, keys, values, slots, documents, stops, begins, lse, grad, delta, key_grad, value_grad, scale, count, slot,
    width, suffix, length, q_row, q_head, q_step, k_batch, k_head, k_step,
    HEADS: tl.constexpr, FAN: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr,
    PREFIX: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of some keys and values: of a document (PREFIX), from all its rows, or of one row's suffix."""
    batch, head, low = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS, tl.program_id(1) * BLOCK
    key, size = low + tl.arange(0, BLOCK), tl.arange(0, WIDE)
    known = (key < length)[:, None] & (size < SIZE)[None, :]
    place = batch * k_batch + head * k_head + key[:, None] * k_step + size[None, :]
    k, v = tl.load(keys + place, mask=known, other=0.0), tl.load(values + place, mask=known, other=0.0)
    of_key, of_value = tl.zeros([BLOCK, WIDE], tl.float32), tl.zeros([BLOCK, WIDE], tl.float32)
    begun, end = batch, batch + 1
    if PREFIX:  # a document behind the table has no rows
        begun = tl.load(slots + batch * slot, mask=batch < count, other=0)
        end = tl.load(slots + batch * slot + slot - 1, mask=batch < count, other=-1) + 1
    for row in range(begun, end):
        stop, begin, lines = tl.load(stops + row), tl.load(begins + row), FAN * width
        if PREFIX and (tl.load(documents + row) != batch) | (stop <= low):  # keys that the row does not see
            lines = 0
        for start in range(0, lines, TILE):
            own, number, own_place, real, inside = _queries(
                row, head, start, width, suffix, q_row, q_head, q_step, HEADS, FAN, SIZE, WIDE, TILE
            )
            tile = tl.load(q + own_place, mask=inside, other=0.0)
            change = tl.load(grad + own_place, mask=inside, other=0.0)
            log, total = tl.load(lse + number, mask=real, other=0.0), tl.load(delta + number, mask=real, other=0.0)
            first, last = _limits(own, stop, begin, PREFIX, WINDOW)
            seen = (key[:, None] >= first[None, :]) & (key[:, None] < last[None, :]) & real[None, :]
            score = tl.dot(k, tl.trans(tile), input_precision="ieee") * scale
            weight = tl.where(seen, tl.exp(score - log[None, :]), 0.0)
            of_value += tl.dot(weight.to(change.dtype), change, input_precision="ieee")
            weight = weight * (tl.dot(v, tl.trans(change), input_precision="ieee") - total[None, :])
            of_key += tl.dot(weight.to(tile.dtype), tile, input_precision="ieee")
    tl.store(key_grad + place, of_key * scale, mask=known)
    tl.store(value_grad + place, of_value, mask=known)


def row_attention(*args: Any) -> Tensor:
    """`attention.merged_attention` with gradients, of query, prefix keys and values, suffix keys and values, layout,
    start, scale and window."""
    return _RowAttention.apply(*args)


class _RowAttention(torch.autograd.Function):
    """`_rows` forward; `_rows_back` and, for documents and for suffixes, `_keys_back` backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, layout, start, scale, window = args
        q, kp, vp, ks, vs = (_dense(tensor) for tensor in tensors)
        vp, vs = _like(vp, kp), _like(vs, ks)
        rows, total, width, size = q.shape
        heads, suffix = ks.shape[1:3]
        fan, wide = total // heads, triton.next_power_of_2(max(16, size))
        out, lse = torch.empty_like(q), q.new_empty(rows, total, width, dtype=torch.float32)
        numbers = (layout.documents, layout.prefix_lengths, layout.prefix_lengths * 0 if start is None else start)
        strides = (*q.stride()[:3], *kp.stride()[:3], *ks.stride()[:3])
        tile, warps = tile_and_warps(wide, q.element_size())
        shape = {"HEADS": heads, "FAN": fan, "SIZE": size, "WIDE": wide, "WINDOW": window or 0, "TILE": tile}
        shape |= {"BLOCK": tile, "num_warps": warps, "num_stages": 2}
        grid = (rows * heads, triton.cdiv(fan * width, tile))
        _rows[grid](q, kp, vp, ks, vs, *numbers, out, lse, scale, width, suffix, *strides, **shape)
        ctx.save_for_backward(q, kp, vp, ks, vs, out, lse, *numbers, layout.slots)
        ctx.scale, ctx.strides, ctx.shape, ctx.grid = scale, strides, shape, grid
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        q, kp, vp, ks, vs, out, lse, *numbers, slots = ctx.saved_tensors
        grad, delta, heads = _like(grad_outputs[0], q), torch.empty_like(lse), ks.shape[1]
        dq, *grads = (torch.empty_like(tensor) for tensor in (q, kp, vp, ks, vs))
        sizes = (q.shape[2], ks.shape[2])
        _rows_back[ctx.grid](
            q, kp, vp, ks, vs, *numbers, out, lse, grad, delta, dq, ctx.scale, *sizes, *ctx.strides, **ctx.shape
        )
        for prefix, k, v, dk, dv in ((True, kp, vp, *grads[:2]), (False, ks, vs, *grads[2:])):
            length = k.shape[2]
            _keys_back[len(k) * heads, triton.cdiv(length, ctx.shape["BLOCK"])](
                q, k, v, slots, *numbers, lse, grad, delta, dk, dv, ctx.scale, *slots.shape, *sizes, length,
                *q.stride()[:3], *k.stride()[:3], **ctx.shape, PREFIX=prefix,
            )  # fmt: skip
        return dq, *grads, None, None, None, None


def tile_and_warps(wide: int, element_size: int) -> tuple[int, int]:
    """Queries or keys in one product, and warps of a program: what fits into registers and 99 KiB of shared memory."""
    return min(64, max(16, 2**15 // (wide * element_size**2))), 4 if wide <= 64 else 8


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, without gaps in memory and with its last dimension contiguous."""
    dense = tensor.stride(-1) == 1 and torch.empty_like(tensor).stride() == tensor.stride()
    return tensor if dense else tensor.contiguous()


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor, or a copy, with the strides of the other."""
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other).copy_(tensor)


@triton.jit
def _turn(  # pragma: no cover
    x, out, heads, x_head, out_head, cos, sin, later_cos, later_sin,
    HALF: tl.constexpr, WIDE: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """A token's heads, whose halves are (a, b), as (a cos - b sin, b cos + a sin)."""
    head, size = tl.arange(0, MANY)[:, None], tl.arange(0, WIDE)[None, :]
    known = (head < heads) & (size < HALF)
    a = tl.load(x + head * x_head + size, mask=known, other=0.0).to(tl.float32)
    b = tl.load(x + head * x_head + size + HALF, mask=known, other=0.0).to(tl.float32)
    tl.store(out + head * out_head + size, a * cos - b * sin, mask=known)
    tl.store(out + head * out_head + size + HALF, b * later_cos + a * later_sin, mask=known)


@triton.jit
def _rotate(  # pragma: no cover
    q, k, q_out, k_out, cos, sin, steps, q_heads, k_heads, q_row, q_head, q_step, k_row, k_head, k_step,
    qo_row, qo_head, qo_step, ko_row, ko_head, ko_step, c_row, c_step,
    HALF: tl.constexpr, WIDE: tl.constexpr, MANY: tl.constexpr, FEW: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One token's queries and keys; `BACK`: their gradients."""
    row, step = (tl.program_id(0) // steps).to(tl.int64), tl.program_id(0) % steps
    size = tl.arange(0, WIDE)
    place, known = row * c_row + step * c_step + size, size < HALF
    c = tl.load(cos + place, mask=known, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + place, mask=known, other=0.0).to(tl.float32)[None, :]
    later_c = tl.load(cos + place + HALF, mask=known, other=0.0).to(tl.float32)[None, :]
    later_s = tl.load(sin + place + HALF, mask=known, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s, later_s = -later_s, -s
    q, q_out = q + row * q_row + step * q_step, q_out + row * qo_row + step * qo_step
    _turn(q, q_out, q_heads, q_head, qo_head, c, s, later_c, later_s, HALF, WIDE, MANY)
    k, k_out = k + row * k_row + step * k_step, k_out + row * ko_row + step * ko_step
    _turn(k, k_out, k_heads, k_head, ko_head, c, s, later_c, later_s, HALF, WIDE, FEW)


def rotary(*args: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, both (row, head, step, size), rotated by cos and sin (row or 1, step, size), with gradients."""
    return _Rotary.apply(*args)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*args[2:])
        return _rotated(*args, back=False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return *_rotated(*grad_outputs, *ctx.saved_tensors, back=True), None, None


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (one if one.stride(-1) == 1 else one.contiguous() for one in (q, k, cos, sin))
    (rows, q_heads, steps, size), k_heads = q.shape, k.shape[1]
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    strides = [stride for one in (q, k, q_out, k_out) for stride in one.stride()[:3]]
    wide, many, few = map(triton.next_power_of_2, (size // 2, q_heads, k_heads))
    _rotate[(rows * steps,)](
        q, k, q_out, k_out, cos, sin, steps, q_heads, k_heads, *strides, cos.stride(0) * (len(cos) > 1), cos.stride(1),
        HALF=size // 2, WIDE=wide, MANY=many, FEW=few, BACK=back,
    )  # fmt: skip
    return q_out, k_out
