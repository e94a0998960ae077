"""Decoding without the host: a step over static buffers, captured once as a CUDA graph and replayed.

What `decoding.Rows` does with as many rows as are left is done here with masks on as many rows as there are, so that a
step never asks the device how many that is. The host looks every few steps, and moves the rows that still decode
together when half of them are done. Same noise, same thoughts as the plain engine, up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from forethought.config import Method
from forethought.data.positions import Positions, ThoughtFormat
from forethought.prefix import CacheCapacity, StaticCache, SuffixCache
from forethought.rollout import Thoughts
from forethought.rollout.decoder import Rows, sample
from forethought.rollout.shared import read_shared

_LOOK = 8  # steps between two looks of the host at which rows are done
_FEWEST = 16  # rows below which nothing is moved together any more
_GRAIN = 256  # documents' room is a multiple of this many tokens, so that few shapes occur
_WINDOWS = 4  # documents kept at once: this many times those that a step's groups would fill
_SHAPES = 64  # numbers of rows for which a step may be compiled
_CELL = 128  # tokens of the vocabulary that are summed together before one of them is drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeState:
    """What `Rows` keeps of each row, one seat a row, and what the model reads next. All of it is written in place."""

    noise: Float[Tensor, "row thought"]
    feed: Int[Tensor, "row fed"]  # the closing delimiter, then the targets
    tail: Int[Tensor, " row"]  # -1 while a row thinks, then the index in `feed` of its next token; past it: done
    tokens: Int[Tensor, "row thought"]
    logp: Float[Tensor, "row thought"]
    length: Int[Tensor, " row"]
    closed: Int[Tensor, " row"]
    evidence: Float[Tensor, "row horizon"]
    hit: Int[Tensor, "row horizon"]
    logits: Float[Tensor, "row vocab"]  # those that follow what the row has read
    next: Int[Tensor, " row"]  # the token that it reads now

    def tensors(self) -> dict[str, Tensor]:
        """Each by its name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def head(self, rows: int) -> "DecodeState":
        """The first seats only."""
        return DecodeState(**{name: tensor[:rows] for name, tensor in self.tensors().items()})


def capturable(model: Any) -> bool:
    """Whether a step of a model can be captured: attention layers only, and no experts that the data choose."""
    options = model.config.get_text_config()
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    experts = any(getattr(options, name, 0) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    return not experts and all(type(layer) in kinds for layer in DynamicCache(config=model.config).layers)


def draw(logits: Float[Tensor, "row vocab"], noise: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    """A token per row by inverting the cumulative distribution, as `decoding.sample`, in two levels.

    Sums of a cell of tokens first, then the tokens of the cell that is hit, so that no running sum goes over a whole
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
    place = torch.minimum((within <= rest).sum(dim=-1), (within < within[:, -1:]).sum(dim=-1))
    return (cell.squeeze(1) * _CELL + place).clamp(max=logits.shape[-1] - 1)


def advance(seats: DecodeState, close: Int[Tensor, " closing"], temperature: float, top_p: float) -> None:
    """Use each row's logits: sample or score, and set the token that it reads next. `Rows.advance` without indices."""
    limit, width, size = seats.tokens.shape[1], seats.feed.shape[1], len(close)
    thinking, tail = seats.tail < 0, seats.tail
    logits = seats.logits.float()
    fed = seats.feed.gather(1, tail.clamp(0, width - 1)[:, None]).squeeze(1)
    tail = _score(seats, logits, fed, size)
    at = seats.length.clamp(max=limit - 1)[:, None]
    barred = (thinking & (seats.length == 0))[:, None]
    words = torch.arange(logits.shape[1], device=logits.device)
    logits = torch.where(barred & (words == close[0]), float("-inf"), logits)
    scaled = logits if temperature == 1 else logits / temperature
    noise = seats.noise.gather(1, at).squeeze(1)
    token = draw(scaled, noise) if top_p == 1 else sample(logits, noise, temperature, top_p)
    logp = scaled.gather(1, token[:, None]) - scaled.logsumexp(dim=-1, keepdim=True)
    seats.tokens.scatter_(1, at, torch.where(thinking[:, None], token[:, None], seats.tokens.gather(1, at)))
    seats.logp.scatter_(1, at, torch.where(thinking[:, None], logp, seats.logp.gather(1, at)))
    columns = at + 1 + torch.arange(-size, 0, device=at.device)
    ending = (seats.tokens.gather(1, columns.clamp(min=0)) == close).all(dim=-1) & (at.squeeze(1) + 1 > size)
    closed = thinking & ending
    cut = thinking & ~ending & (at.squeeze(1) + 1 == limit)
    seats.length.add_(thinking.long())
    seats.closed.add_(closed.long())
    seats.tail.copy_(torch.where(closed, size, torch.where(cut, 0, tail)))
    seats.next.copy_(torch.where(thinking, token, fed))


def _score(
    seats: DecodeState, logits: Float[Tensor, "row vocab"], fed: Int[Tensor, " row"], size: int
) -> Int[Tensor, " row"]:
    """Record the evidence of rows at a target; where each row that does not think stands then."""
    tail, width = seats.tail, seats.feed.shape[1]
    scored = ((tail >= size) & (tail < width))[:, None]
    column = (tail - size).clamp(0, seats.evidence.shape[1] - 1)[:, None]
    evidence = logits.gather(1, fed[:, None]) - logits.logsumexp(dim=-1, keepdim=True)
    hit = (logits.argmax(dim=-1) == fed).long()[:, None]
    seats.evidence.scatter_(1, column, torch.where(scored, evidence, seats.evidence.gather(1, column)))
    seats.hit.scatter_(1, column, torch.where(scored, hit, seats.hit.gather(1, column)))
    return torch.where(tail >= 0, (tail + 1).clamp(max=width), tail)


class Graphs:
    """Samples with a model that `prefix.enable` prepared, step by captured step.

    Buffers and graphs are made for the first positions, and again only where later ones need more room. What follows
    the logits is compiled (torch.compile), with `compiled` the model too. On a CPU a step runs as it is, for tests.
    """

    def __init__(self, model: Any, form: ThoughtFormat, options: Method, rows: int, compiled: bool):
        self.model, self.form, self.options, self.capacity, self.compiled = model, form, options, rows, compiled
        self.close = torch.tensor(form.close, device=model.device)
        self.room: CacheCapacity | None = None
        self.shape = (0, 0, 0)  # thought, fed and horizon of the seats
        self.cache: StaticCache | None = None
        self.seats: DecodeState | None = None
        self.steps: dict[int, Callable[[], None]] = {}

    @torch.no_grad()
    def sample(self, positions: Positions, noise: Float[Tensor, "batch group thought"]) -> Thoughts:
        """The thoughts of the engine protocol's `sample`."""
        group, start = noise.shape[1], 0
        rows = Rows(positions.targets(), self.form, noise, self.model.device)
        while start < len(positions):
            end = self._end(positions, start, group)
            self._take(positions.slice(start, end), rows, start * group, end * group)
            start = end
        return rows.thoughts(len(positions), group)

    def _end(self, positions: Positions, start: int, group: int) -> int:
        """The end of the next positions that decode together: as many as there is room for, in not too many windows."""
        end = positions.window_boundary(start, max(1, self.capacity // group), at_least=True)
        most = max(1, _WINDOWS * self.capacity // self.options.group)
        owners = positions.window[start:end]
        return start + int((owners < owners[0] + most).sum())

    def _take(self, positions: Positions, rows: Rows, first: int, last: int) -> None:
        """All steps of the rows first .. last-1, whose places these are."""
        group = (last - first) // len(positions)
        lead = len(self.form.after) + len(self.form.open)
        batch, logits = read_shared(self.model, self.form, positions, group, lead)
        fork = batch.fork
        self._make_room(fork, rows, logits)
        assert self.room is not None and self.seats is not None and self.cache is not None
        self.cache.load(fork)
        ids = torch.arange(first, last, device=self.model.device)
        self._load_rows(rows, ids, logits)
        count = self.room.rows
        while True:
            step = self._step(count)
            for _ in range(_LOOK):
                step()
            going = self.seats.tail[:count] < self.seats.feed.shape[1]
            left = int(going.sum())
            if left and (left > count // 2 or count // 2 < _FEWEST):
                continue
            self._store_rows(rows, ids)
            if not left:
                return
            count //= 2
            order = (~going).to(torch.int8).argsort(stable=True)[:count]
            ids = self._move(order, ids)

    def _make_room(self, fork: SuffixCache, rows: Rows, logits: Float[Tensor, "row vocab"]) -> None:
        """Buffers that hold a fork's rows to their ends; those at hand, where these are large enough."""
        owner = [fork.prefix.owner[place] for place in fork.places]
        need = CacheCapacity(
            rows=len(owner),
            documents=max(owner) + 1,
            slots=max(owner.count(document) for document in set(owner)),
            prefix=max(fork.prefix.stop),
            suffix=fork.length + rows.tokens.shape[1] + rows.feed.shape[1] + 2 * _LOOK,
        )
        limit, width, horizon = rows.tokens.shape[1], rows.feed.shape[1], rows.evidence.shape[1]
        if self.room is not None and self.room.holds(need) and self.shape == (limit, width, horizon):
            return
        old = self.room or need
        self.steps.clear()
        self.cache = self.seats = None
        self.room = CacheCapacity(
            rows=max(need.rows, old.rows),
            documents=max(need.documents, old.documents),
            slots=max(need.slots, old.slots),
            prefix=-max(need.prefix, old.prefix) // _GRAIN * -_GRAIN,
            suffix=max(need.suffix, old.suffix),
        )
        self.cache = StaticCache.like(fork, self.room)
        count, self.shape = self.room.rows, (limit, width, horizon)

        def full(value: Any, *shape: int) -> Tensor:
            return torch.full((count, *shape), value, device=logits.device)

        self.seats = DecodeState(
            noise=full(0.5, limit), feed=full(0, width), tail=full(width), tokens=full(self.form.pad, limit),
            logp=full(0.0, limit), length=full(0), closed=full(0), evidence=full(0.0, horizon),
            hit=full(0, horizon), logits=logits.new_zeros(count, logits.shape[1]), next=full(0),
        )  # fmt: skip

    def _load_rows(self, rows: Rows, ids: Int[Tensor, " row"], logits: Float[Tensor, "row vocab"]) -> None:
        """Give each row a seat; the seats left over are done from the start."""
        assert self.seats is not None
        count, seats = len(ids), self.seats
        for name in ("noise", "feed", "tail", "tokens", "logp", "length", "evidence"):
            getattr(seats, name)[:count] = getattr(rows, name)[ids]
        seats.closed.zero_()
        seats.hit.zero_()
        seats.logits[:count] = logits
        seats.tail[count:] = seats.feed.shape[1]

    def _store_rows(self, rows: Rows, ids: Int[Tensor, " row"]) -> None:
        """Write down what the seats hold."""
        assert self.seats is not None
        count = len(ids)
        for name in ("tokens", "logp", "length", "evidence"):
            getattr(rows, name)[ids] = getattr(self.seats, name)[:count]
        rows.closed[ids] = self.seats.closed[:count].bool()
        rows.hit[ids] = self.seats.hit[:count].bool()

    def _move(self, order: Int[Tensor, " seat"], ids: Int[Tensor, " seated"]) -> Int[Tensor, " known"]:
        """Seat some rows first; which they are."""
        assert self.seats is not None and self.cache is not None
        for tensor in self.seats.tensors().values():
            tensor[: len(order)] = tensor[order]
        known = int((order < len(ids)).sum())
        self.cache.pick(order, known)
        return ids[order[:known]]

    def _step(self, count: int) -> Callable[[], None]:
        """One step of the first seats, as something to call again and again."""
        if count not in self.steps:
            assert self.seats is not None and self.cache is not None
            self.steps[count] = self._captured(self.seats.head(count), self.cache.head(count))
        return self.steps[count]

    def _captured(self, seats: DecodeState, cache: StaticCache) -> Callable[[], None]:
        options, model = self.options, self.model
        column, choose = cache.table.column, advance
        if seats.tail.is_cuda and not self.compiled:
            choose = torch.compile(advance)
            for tensor in seats.tensors().values():  # or every number of rows would be compiled for itself
                torch._dynamo.maybe_mark_dynamic(tensor, 0)

        def step() -> None:
            choose(seats, self.close, options.temperature, options.top_p)
            at = (cache.table.stop + column)[:, None]
            output = model(
                input_ids=seats.next[:, None], position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            seats.logits.copy_(output.logits[:, -1])
            column.add_(1)

        run: Callable[[], None] = step
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
        if self.compiled:
            run = torch.compile(step, fullgraph=True, dynamic=False)
        if not seats.tail.is_cuda:
            return run
        state = [*seats.tensors().values(), column]
        kept = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets libraries allocate what a capture must not
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)
        return graph.replay
