"""CUDA-graph decoding: a step over static buffers, captured once and replayed, so that the host launches nothing.

What the loop of decoder.py does with as many rows as are left is done here with masks on all rows, so that a step never
synchronizes with the device. The host checks every few steps which rows are finished, and moves the remaining rows
together when half of them are. Same noise, same thoughts as eager decoding, up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from forethought.config import Method
from forethought.data.positions import Positions, ThoughtFormat
from forethought.data.token_bytes import Closing
from forethought.memory import MOST_DOCUMENTS
from forethought.prefix import CacheCapacity, StaticCache, SuffixCache, attention_only, has_experts
from forethought.rollout.decoder import DecodeState, EagerBackend, SharedBatch, matching_prefix, sample

_LOOK = 8  # steps between two checks by the host which rows are finished
_FEWEST = 16  # rows below which rows are no longer moved together
_GRAIN = 256  # the documents' capacity is a multiple of this many tokens, so that few shapes occur
_SHAPES = 64  # numbers of rows for which a step may be compiled
_CELL = 128  # tokens of the vocabulary that are summed together before one of them is drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphState(DecodeState):
    """The state of the rows that decode together, with the input and output of the model. Written in place."""

    logits: Float[Tensor, "row vocab"]  # those that follow what the row has read
    next: Int[Tensor, " row"]  # the token that it reads now


def not_capturable(model: Any, compiled: bool) -> str:
    """Why a step of a model that shares prefixes cannot be captured; empty where it can."""
    if compiled and not attention_only(model):
        return f"{type(model).__name__} has layers (Mamba, experts) that were not compiled as a whole so far"
    if not has_experts(model):
        return ""
    grouped = model.config.get_text_config()._experts_implementation == "grouped_mm"
    if not (type(model)._can_set_experts_implementation() and grouped and model.dtype == torch.bfloat16):
        return "experts take grouped products of transformers (grouped_mm) and model.precision bf16"
    return ""


def sample_by_cells(logits: Float[Tensor, "row vocab"], noise: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    """A token per row by inverting the cumulative distribution, as `decoder.sample`, in two levels.

    Sums over cells of tokens first, then the tokens of the cell that is hit, so that no running sum covers a whole
    vocabulary.
    """
    weight = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    if spare := -weight.shape[-1] % _CELL:
        weight = pad(weight, (0, spare))
    cells = weight.view(weight.shape[0], -1, _CELL)
    sums = cells.sum(dim=-1).double().cumsum(dim=-1)
    point = noise.double()[:, None] * sums[:, -1:]
    cell = (sums <= point).sum(dim=-1, keepdim=True).clamp(max=sums.shape[-1] - 1)
    rest = point - torch.where(cell > 0, sums.gather(1, (cell - 1).clamp(min=0)), 0.0)
    within = cells.gather(1, cell[..., None].expand(-1, -1, _CELL)).squeeze(1).double().cumsum(dim=-1)
    # rounding may leave a rest past the cell: then its last token of any weight
    index = torch.minimum((within <= rest).sum(dim=-1), (within < within[:, -1:]).sum(dim=-1))
    return (cell.squeeze(1) * _CELL + index).clamp(max=logits.shape[-1] - 1)


def advance(
    state: GraphState,
    close: Int[Tensor, " closing"],
    closing: Closing,
    early: Bool[Tensor, " vocab"],
    never: Bool[Tensor, " vocab"],
    options: Method,
) -> None:
    """Sample or score with each row's logits, and set the token that it reads next: decoder.py's with masks."""
    limit, width = state.tokens.shape[1], state.forced_tokens.shape[1]
    thinking, index = state.forced_index < 0, state.forced_index
    logits = state.logits.float()
    forced = state.forced_tokens.gather(1, index.clamp(0, width - 1)[:, None]).squeeze(1)
    index = _score(state, logits, forced)
    at = state.length.clamp(max=limit - 1)[:, None]
    masked = (thinking & (state.length < closing.shortest))[:, None]
    logits = torch.where(masked & early | never, float("-inf"), logits[:, : len(early)])
    temperature = options.temperature
    scaled = logits if temperature == 1 else logits / temperature
    noise = state.noise.gather(1, at).squeeze(1)
    token = sample_by_cells(scaled, noise) if options.top_p == 1 else sample(logits, noise, temperature, options.top_p)
    logp = scaled.gather(1, token[:, None]) - scaled.logsumexp(dim=-1, keepdim=True)
    state.tokens.scatter_(1, at, torch.where(thinking[:, None], token[:, None], state.tokens.gather(1, at)))
    state.logp.scatter_(1, at, torch.where(thinking[:, None], logp, state.logp.gather(1, at)))
    at = at.squeeze(1)
    matched = torch.where(thinking, closing.step(state.matched, token), state.matched)
    closed = thinking & (matched == closing.done)
    cut = thinking & ~closed & (at + 1 == limit)
    begun = matching_prefix(state.tokens, at, close)
    state.length.add_(thinking.long())
    state.matched.copy_(matched)
    state.closed.add_(closed.long())
    state.forced_index.copy_(torch.where(closed, begun + 1, torch.where(cut, 0, index)))
    state.next.copy_(torch.where(closed, close[begun], torch.where(thinking, token, forced)))


def _score(state: GraphState, logits: Float[Tensor, "row vocab"], forced: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """Record the evidence of rows at a target; returns the new index of each row that does not think."""
    index, width, size = state.forced_index, state.forced_tokens.shape[1], state.bridge_length
    scored = ((index >= size) & (index < width))[:, None]
    column = (index - size).clamp(0, state.evidence.shape[1] - 1)[:, None]
    evidence = logits.gather(1, forced[:, None]) - logits.logsumexp(dim=-1, keepdim=True)
    hit = (logits.argmax(dim=-1) == forced).long()[:, None]
    state.evidence.scatter_(1, column, torch.where(scored, evidence, state.evidence.gather(1, column)))
    state.hit.scatter_(1, column, torch.where(scored, hit, state.hit.gather(1, column)))
    return torch.where(index >= 0, (index + 1).clamp(max=width), index)


class CUDAGraphDecoder:
    """Decodes with a model that `prefix.enable` prepared, step by captured step.

    Buffers and graphs are created for the first positions, and again only where later ones need a larger capacity. What
    follows the logits is compiled (torch.compile), with `compiled` the model too. On a CPU, for tests, nothing is
    captured.
    """

    def __init__(self, model: Any, form: ThoughtFormat, options: Method, rows: int, compiled: bool):
        self.model, self.form, self.options, self.rows, self.compiled = model, form, options, rows, compiled
        self.close, self.closing = torch.tensor(form.close, device=model.device), form.closing.to(model.device)
        head = model.get_output_embeddings().weight.shape[0]
        words = torch.arange(min(head, form.vocabulary or head), device=model.device)
        self.early = torch.isin(words, self.closing.early)
        self.never = torch.isin(words, torch.tensor(form.holes, dtype=torch.long, device=model.device))
        self.capacity: CacheCapacity | None = None
        self.shape = (0, 0, 0)  # thought, forced tokens and horizon of the buffers
        self.cache: StaticCache | None = None
        self.state: GraphState | None = None
        self.steps: dict[int, Callable[[], None]] = {}

    def decode(self, positions: Positions, state: DecodeState) -> None:
        """Decode all rows of the state, which are those of the positions."""
        group, start = len(state.length) // len(positions), 0
        while start < len(positions):
            end = self._end(positions, start, group)
            self._decode(positions.slice(start, end), state, start * group, end * group)
            start = end

    def free(self) -> None:
        """Drop graphs and buffers. The next positions create them again, as large: sizes decide how sums round."""
        self.steps.clear()
        self.cache = self.state = None

    def _end(self, positions: Positions, start: int, group: int) -> int:
        """The end of the next positions that decode together: as many as fit, in a bounded number of windows."""
        end = positions.window_boundary(start, max(1, self.rows // group), at_least=True)
        most = max(MOST_DOCUMENTS, self.rows // self.options.group)
        owners = positions.window[start:end]
        return start + int((owners < owners[0] + most).sum())

    def _decode(self, positions: Positions, state: DecodeState, first: int, last: int) -> None:
        """Decode rows first .. last-1, which are those of the positions."""
        group = (last - first) // len(positions)
        lead = len(self.form.after) + len(self.form.open)
        batch, logits = SharedBatch.read(EagerBackend(self.model), self.form, positions, group, lead)
        self._reserve(batch.cache, state, logits)
        assert self.capacity is not None and self.state is not None and self.cache is not None
        self.cache.load(batch.cache)
        ids = torch.arange(first, last, device=self.model.device)
        self._load_rows(state, ids, logits)
        del batch, logits  # the memory of all rows' states
        count = self.capacity.rows
        while True:
            step = self._step(count)
            for _ in range(_LOOK):
                step()
            unfinished = self.state.forced_index[:count] < self.state.forced_tokens.shape[1]
            left = int(unfinished.sum())
            if left and (left > count // 2 or count // 2 < _FEWEST):
                continue
            self._store_rows(state, ids)
            if not left:
                return
            count //= 2
            order = (~unfinished).to(torch.int8).argsort(stable=True)[:count]
            ids = self._move_to_front(order, ids)

    def _reserve(self, cache: SuffixCache, state: DecodeState, logits: Float[Tensor, "row vocab"]) -> None:
        """Ensure that the buffers can hold a cache's rows to their ends; existing ones are kept if large enough."""
        documents = cache.documents_and_lengths()[0]
        shape = (state.tokens.shape[1], state.forced_tokens.shape[1], state.evidence.shape[1])
        limit, width, horizon = shape
        need = CacheCapacity(
            rows=len(documents),
            documents=max(documents) + 1,
            slots=max(documents.count(document) for document in set(documents)),
            prefix=max(cache.prefix.length),
            suffix=cache.length + limit + width + 2 * _LOOK,
        )
        if self.cache is not None and self.capacity is not None and self.capacity.fits(need) and self.shape == shape:
            return
        old = self.capacity or need
        self.free()
        self.capacity = CacheCapacity(
            rows=max(need.rows, old.rows),
            documents=max(need.documents, old.documents),
            slots=max(need.slots, old.slots),
            prefix=-max(need.prefix, old.prefix) // _GRAIN * -_GRAIN,
            suffix=max(need.suffix, old.suffix),
        )
        self.cache = StaticCache.like(cache, self.capacity)
        count, self.shape = self.capacity.rows, shape

        def full(value: Any, *shape: int) -> Tensor:
            return torch.full((count, *shape), value, device=logits.device)

        self.state = GraphState(
            noise=full(0.5, limit), forced_tokens=full(0, width), forced_index=full(width),
            tokens=full(self.form.pad, limit), logp=full(0.0, limit), length=full(0), matched=full(0), closed=full(0),
            evidence=full(0.0, horizon), hit=full(0, horizon), logits=logits.new_zeros(count, logits.shape[1]),
            next=full(0),
        )  # fmt: skip

    def _load_rows(self, state: DecodeState, ids: Int[Tensor, " row"], logits: Float[Tensor, "row vocab"]) -> None:
        """Copy rows into the first rows of the buffers; the rows after them are finished from the start."""
        assert self.state is not None
        count, buffers = len(ids), self.state
        for name, tensor in state.tensors().items():
            getattr(buffers, name)[:count] = tensor[ids]
        buffers.logits[:count] = logits
        buffers.forced_index[count:] = buffers.forced_tokens.shape[1]

    def _store_rows(self, state: DecodeState, ids: Int[Tensor, " row"]) -> None:
        """Copy the results of rows out of the buffers."""
        assert self.state is not None
        for name in ("tokens", "logp", "length", "matched", "closed", "evidence", "hit"):
            getattr(state, name)[ids] = getattr(self.state, name)[: len(ids)]

    def _move_to_front(self, order: Int[Tensor, " front"], ids: Int[Tensor, " row"]) -> Int[Tensor, " known"]:
        """Move some rows of the buffers to the front; returns their ids."""
        assert self.state is not None and self.cache is not None
        for tensor in self.state.tensors().values():
            tensor[: len(order)] = tensor[order]
        known = int((order < len(ids)).sum())
        self.cache.move_to_front(order, known)
        return ids[order[:known]]

    def _step(self, count: int) -> Callable[[], None]:
        """One step of the first rows, to be called repeatedly."""
        if count not in self.steps:
            assert self.state is not None and self.cache is not None
            self.steps[count] = self._capture(self.state.head(count), self.cache.head(count))
        return self.steps[count]

    def _capture(self, state: GraphState, cache: StaticCache) -> Callable[[], None]:
        options, model = self.options, self.model
        column, choose = cache.table.column, advance
        if state.length.is_cuda and not self.compiled:
            choose = torch.compile(advance)
            for tensor in state.tensors().values():  # or it would be compiled again for every number of rows
                torch._dynamo.maybe_mark_dynamic(tensor, 0)

        def step() -> None:
            choose(state, self.close, self.closing, self.early, self.never, options)
            at = (cache.table.prefix_lengths + column)[:, None]
            output = model(
                input_ids=state.next[:, None], position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            state.logits.copy_(output.logits[:, -1])
            column.add_(1)

        run: Callable[[], None] = step
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
        if self.compiled:
            run = torch.compile(step, fullgraph=True, dynamic=False)
        if not state.length.is_cuda:
            return run
        mamba = [one for layer in cache.own for one in layer.buffers.states()]
        tensors = [*state.tensors().values(), *mamba, column]
        kept = [tensor.clone() for tensor in tensors]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets libraries allocate what a capture must not
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        return graph.replay
