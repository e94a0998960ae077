"""Attention of many rows over one copy of a document: a prefix part and a suffix part, merged by log-sum-exp.

Softmax over prefix and suffix keys together equals the two parts' outputs weighted by exp(lse_part - lse), with
lse = logaddexp of the parts'. The fused kernels do not differentiate their log-sum-exp; called with the *merged* output
and log-sum-exp, a part's fused backward gives exactly that part's gradients, since both only enter as the softmax's
normaliser and as rowsum(dO * O).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

HIDDEN = -1e30  # added to the score of a masked key; finite, so that a row may see no key at all
_SPARSE = 1.5  # slots per row above which each position gets a call of its own
_BIAS = 2**22  # entries of an additive mask above which each position gets a call of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which document each row continues and how much of it the row sees. Rows of a document are contiguous.

    Example: two documents of 5 and 4 tokens, three rows that continue 3 and 5 tokens of the first and 4 of the second:
    spans (0, 3, 0, 1), (0, 5, 1, 2), (1, 4, 2, 3); slots [[0, 1], [2, 2]]; slot_index [0, 1, 2].
    """

    spans: tuple[tuple[int, int, int, int], ...]  # (document, visible keys, first row, end of rows) of each position
    documents: Int[Tensor, " row"]  # the row continues this document,
    prefix_lengths: Int[Tensor, " row"]  # of which it sees the first so many keys
    slots: Int[Tensor, "document slot"]  # the rows of each document; its last one repeated where there are fewer
    slot_index: Int[Tensor, " row"]  # a row's index in the flattened `slots`
    valid: Float[Tensor, "document slot"]  # 1 at a row, 0 where one is repeated
    even: bool  # whether all documents have equally many rows, so that the flattened `slots` are the rows in order
    biases: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)  # masks that all layers and steps share

    @classmethod
    def of(cls, documents: Sequence[int], prefix_lengths: Sequence[int], device: torch.device) -> "Layout":
        """The layout of rows that continue some tokens of their documents, which must not decrease."""
        spans: list[tuple[int, int, int, int]] = []
        rows: dict[int, list[int]] = {}
        for row, (document, seen) in enumerate(zip(documents, prefix_lengths, strict=True)):
            rows.setdefault(document, []).append(row)
            if spans and spans[-1][:2] == (document, seen):
                spans[-1] = (document, seen, spans[-1][2], row + 1)
            else:
                spans.append((document, seen, row, row + 1))
        if list(documents) != sorted(documents):
            raise ValueError("rows of a document must be contiguous, in the order of the documents")
        widest, count = max(len(some) for some in rows.values()), max(documents) + 1
        slots = [(some := rows.get(n, [0])) + some[-1:] * (widest - len(some)) for n in range(count)]
        slot_index = [n * widest + i for n in range(count) for i in range(len(rows.get(n, [])))]
        valid = torch.zeros(count * widest)
        valid[slot_index] = 1.0
        return cls(
            spans=tuple(spans),
            documents=torch.tensor(list(documents), device=device),
            prefix_lengths=torch.tensor(list(prefix_lengths), device=device),
            slots=torch.tensor(slots, device=device),
            slot_index=torch.tensor(slot_index, device=device),
            valid=valid.view(count, widest).to(device),
            even=len(slot_index) == count * widest,
        )


@dataclass(slots=True)  # frozen, torch.compile 2.11 would compile its fields, and again for each set of documents
class PrefixSuffixKV:
    """Keys or values in two parts, passed where an attention function expects one tensor."""

    prefix: Float[Tensor, "document head prefix size"]  # one copy per document
    suffix: Float[Tensor, "row head suffix size"]
    layout: Layout
    start: Int[Tensor, " row"] | None = None  # first column of the row's own suffix; None: 0 for all
    triton: bool = False  # attend in Triton kernels

    @property
    def shape(self) -> torch.Size:
        """Shape of the suffix, from which models read the number of rows."""
        return self.suffix.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One kernel call: which rows, over which keys. Queries of its rows and heads are rows of one matrix per head."""

    fold: Callable[[Tensor], Tensor]  # (row, query head, query, *) -> (batch, key head, query, *) of the call
    unfold: Callable[[Tensor], Tensor]  # and back
    unrepeated: Callable[[Tensor], Tensor]  # zeros at folded rows that are repeated
    keys: Callable[[Tensor], Tensor]  # the call's slice of the keys or values
    causal: bool = False
    bias: Float[Tensor, "batch one query key"] | None = None


def merged_attention(
    query: Tensor, key: PrefixSuffixKV, value: PrefixSuffixKV, scale: float, window: int | None = None
) -> Tensor:
    """softmax(q k / sqrt(d)) v over prefix and suffix, exactly as if every row had a copy of its document.

    Args:
        query: (row, query head, query, size); the queries are the last ones of the suffix.
        key: the keys; `value` the values. Each key head serves query heads / key heads consecutive query heads.
        scale: factor of the scores.
        window: a query sees only the last `window` tokens, itself included; None: all.
    """
    keys = (key.prefix, value.prefix, key.suffix, value.suffix)
    if key.triton and value.shape[-1] == query.shape[-1]:  # the kernels read both as of one size
        from forethought.prefix.kernels import row_attention

        return row_attention(query, *keys, key.layout, key.start, scale, window)
    parts = [*_prefix_parts(query, key, window), _suffix_part(query, key, window)]
    if query.shape[2] == 1 and not torch.is_grad_enabled():
        return _step(query, keys, parts, scale)
    if _has_kernel(query, parts):
        return _Fused.apply(query, *keys, parts, scale)
    return _reference(query, keys, parts, scale)


def _prefix_parts(query: Tensor, key: PrefixSuffixKV, window: int | None) -> list[_Part]:
    """All documents in one call with a mask, or one call per position where the mask would be large."""
    layout, prefix = key.layout, key.prefix
    heads, length = prefix.shape[1:3]
    fan, width = query.shape[1] // heads, query.shape[2]
    documents, slots = layout.slots.shape
    whole = window is None and all(seen == length for _, seen, _, _ in layout.spans)
    large = documents * slots * fan * width * length > _BIAS
    sparse = documents * slots > _SPARSE * len(layout.slot_index)
    if window is None and width > 1 and (sparse or ((large or query.is_cuda) and not whole)):
        return [_span_part(span, heads, fan) for span in layout.spans]

    def fold(x: Tensor) -> Tensor:
        rows = x if layout.even else x.index_select(0, layout.slots.flatten())
        grid = rows.view(documents, slots, heads, fan, width, -1)
        return grid.transpose(1, 2).reshape(documents, heads, slots * fan * width, -1)

    def unfold(y: Tensor) -> Tensor:
        grid = y.view(documents, heads, slots, fan, width, -1).transpose(1, 2)
        rows = grid.reshape(documents * slots, heads * fan, width, -1)
        return rows if layout.even else rows.index_select(0, layout.slot_index)

    def unrepeated(y: Tensor) -> Tensor:
        if layout.even:
            return y
        valid = layout.valid.to(y.dtype)[:, None, :, None].expand(-1, heads, -1, fan * width)
        return y * valid.reshape(*y.shape[:3], 1)

    return [
        _Part(
            fold=fold,
            unfold=unfold,
            unrepeated=unrepeated,
            keys=lambda k: k[:documents],
            bias=None if whole else _prefix_bias(query, key, window),
        )
    ]


def _prefix_bias(query: Tensor, key: PrefixSuffixKV, window: int | None) -> Tensor:
    """Additive mask (document, 1, slot * fan * query, prefix) of the keys that each row sees."""
    layout, length = key.layout, key.prefix.shape[2]
    fan, width = query.shape[1] // key.prefix.shape[1], query.shape[2]
    known = (fan, width, length, query.dtype)
    if window is None and known in layout.biases:
        return layout.biases[known]
    index = torch.arange(length, device=query.device)
    prefix_lengths = layout.prefix_lengths[layout.slots][..., None, None]  # (document, slot, 1, 1)
    seen = index < prefix_lengths
    if window is not None:
        own = key.suffix.shape[2] - width + torch.arange(width, device=query.device)[:, None]
        if key.start is not None:
            own = own - key.start[layout.slots][..., None, None]
        seen = seen & (index > prefix_lengths + own - window)
    bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, HIDDEN)
    documents, slots = layout.slots.shape
    bias = bias[:, :, None].expand(documents, slots, fan, width, length)
    bias = bias.reshape(documents, 1, slots * fan * width, length)
    if window is None:
        layout.biases[known] = bias
    return bias


def _span_part(span: tuple[int, int, int, int], heads: int, fan: int) -> _Part:
    """The rows of one position over the visible part of its document, unmasked."""
    document, seen, first, end = span

    def fold(x: Tensor) -> Tensor:
        rows, _, width, _ = (some := x[first:end]).shape
        return some.reshape(rows, heads, fan * width, -1).transpose(0, 1).reshape(1, heads, rows * fan * width, -1)

    def unfold(y: Tensor) -> Tensor:
        rows = end - first
        return y.view(heads, rows, fan, -1, y.shape[-1]).transpose(0, 1).reshape(rows, heads * fan, -1, y.shape[-1])

    return _Part(fold=fold, unfold=unfold, unrepeated=lambda y: y, keys=lambda k: k[document : document + 1, :, :seen])


def _suffix_part(query: Tensor, key: PrefixSuffixKV, window: int | None) -> _Part:
    """Each row over its own suffix."""
    rows, total, width, _ = query.shape
    heads, length = key.suffix.shape[1:3]
    fan = total // heads
    own = torch.arange(length - width, length, device=query.device)[:, None]
    index = torch.arange(length, device=query.device)
    near = None if window is None or length <= window else index > own - window
    bias = None
    if key.start is not None:
        begun = index >= key.start[:, None]
        bias = query.new_zeros(begun.shape).masked_fill_(~begun, HIDDEN)[:, None, None]
    if width == 1:
        if near is not None:
            bias = (0 if bias is None else bias) + query.new_zeros(near.shape).masked_fill_(~near, HIDDEN)
            bias = bias.view(-1, 1, 1, length)
        return _Part(
            fold=lambda x: x.view(rows, heads, fan, -1),
            unfold=lambda y: y.reshape(rows, total, 1, -1),
            unrepeated=lambda y: y,
            keys=lambda k: k,
            bias=None if bias is None else bias.expand(rows, 1, fan, length),
        )
    causal = near is None and bias is None and length == width
    if not causal:
        seen = index <= own if near is None else near & (index <= own)
        bias = query.new_zeros(seen.shape).masked_fill_(~seen, HIDDEN) + (0 if bias is None else bias)
        bias = bias.expand(rows, 1, width, length)
    return _Part(
        fold=lambda x: x,
        unfold=lambda y: y,
        unrepeated=lambda y: y,
        keys=lambda k: k.repeat_interleave(fan, dim=1),
        causal=causal,
        bias=bias,
    )


def _merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The parts of prefix (all but the last, of different rows) and suffix (the last) as one softmax."""
    prefix, prefix_lse = (torch.cat(some[:-1]) if len(some) > 2 else some[0] for some in (outs, lses))
    lse = torch.logaddexp(prefix_lse, lses[-1])
    weight = (prefix_lse - lse).exp().to(prefix.dtype)
    return prefix * weight + outs[-1] * (lses[-1] - lse).exp().to(prefix.dtype), lse


def _step(query: Tensor, keys: Sequence[Tensor], parts: list[_Part], scale: float) -> Tensor:
    """One query a row: a single softmax over both parts' scores, which are too few for fused kernels to be fast."""
    (shared, kp, vp), (own, ks, vs) = _calls(parts, keys)
    query = query * scale
    scores = []
    for part, k in ((shared, kp), (own, ks)):
        score = torch.matmul(part.fold(query), k.transpose(-1, -2))
        scores.append(part.unfold(score if part.bias is None else score + part.bias))
    weight = torch.cat(scores, dim=-1).softmax(dim=-1, dtype=torch.float32).to(vp.dtype)
    seen = kp.shape[2]
    one = shared.unfold(torch.matmul(shared.fold(weight[..., :seen]), vp))
    return one + own.unfold(torch.matmul(own.fold(weight[..., seen:]), vs))


def _reference(q: Tensor, keys: tuple[Tensor, ...], parts: list[_Part], scale: float) -> Tensor:
    """The same in matrix products, for every device; softmax in float32."""
    outs, lses = [], []
    for part, k, v in _calls(parts, keys):
        score = torch.matmul(part.fold(q), k.transpose(-1, -2)).float() * scale
        if part.causal:
            score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), HIDDEN)
        if part.bias is not None:
            score = score + part.bias
        lse = score.logsumexp(-1, keepdim=True)
        outs.append(part.unfold(torch.matmul((score - lse).exp().to(v.dtype), v)))
        lses.append(part.unfold(lse))
    return _merge(outs, lses)[0].to(q.dtype)


def _has_kernel(query: Tensor, parts: list[_Part]) -> bool:
    """Whether flash kernels support these queries: on a CPU all; on CUDA 16-bit ones without a mask."""
    if query.device.type == "cpu":
        return True
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and all(part.bias is None for part in parts)
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and fits


def _flash(part: _Part, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Output, log-sum-exp (batch, head, query) and the other arguments of the backward kernel."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        return *kernel(q, k, v, 0.0, part.causal, attn_mask=part.bias, scale=scale), ()
    out, lse, starts_q, starts_k, longest_q, longest_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, part.causal, False, scale=scale
    )
    return out, lse, (starts_q, starts_k, longest_q, longest_k, 0.0, part.causal, seed, offset)


def _flash_backward(
    part: _Part, tensors: tuple[Tensor, ...], more: tuple[Any, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `tensors` are grad, query, key, value, output and log-sum-exp."""
    aten = torch.ops.aten
    if tensors[0].device.type == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(*tensors, 0.0, part.causal, attn_mask=part.bias, scale=scale)
    return aten._scaled_dot_product_flash_attention_backward(*tensors, *more, scale=scale)


class _Fused(torch.autograd.Function):
    """Flash attention for each part, forward and backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        q, *keys, parts, scale = args
        outs, lses, ctx.more = [], [], []
        for part, k, v in _calls(parts, keys):
            out, lse, more = _flash(part, part.fold(q), k, v, scale)
            outs.append(part.unfold(out))
            lses.append(part.unfold(lse.unsqueeze(-1)))
            ctx.more.append(more)
        out, lse = _merge(outs, lses)
        ctx.save_for_backward(q, *keys, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        q, *keys, out, lse = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in keys]
            calls = _calls(ctx.parts, leaves)
        query_grads, tops, top_grads = [], [], []
        for (part, k, v), more in zip(calls, ctx.more, strict=True):
            folded = part.fold(lse).squeeze(-1).contiguous()
            tensors = (part.unrepeated(part.fold(grad)), part.fold(q), k.detach(), v.detach(), part.fold(out), folded)
            dq, dk, dv = _flash_backward(part, tensors, more, ctx.scale)
            query_grads.append(part.unfold(dq))
            tops += [k, v]
            top_grads += [dk, dv]
        own = query_grads.pop()
        torch.autograd.backward(tops, top_grads)
        shared = torch.cat(query_grads) if len(query_grads) > 1 else query_grads[0]
        return shared + own, *(leaf.grad for leaf in leaves), None, None


def _calls(parts: list[_Part], keys: Sequence[Tensor]) -> list[tuple[_Part, Tensor, Tensor]]:
    """Each part with its keys and values; `keys` are the prefix's keys and values and the suffix's, the last part's."""
    kp, vp, ks, vs = keys
    shared = [(part, part.keys(kp), part.keys(vp)) for part in parts[:-1]]
    return [*shared, (parts[-1], parts[-1].keys(ks), parts[-1].keys(vs))]
