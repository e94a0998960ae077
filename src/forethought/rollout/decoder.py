"""Decoding of thoughts: the state of its rows, the sampler, the batches that hold a KV cache, and the decoding loop.

The loop runs over a `Backend`, which reads documents and computes the logits of the next token: PyTorch (here) or C++
(cpp.py). CUDA graphs (cuda_graphs.py) have a loop of their own over the same state, because it runs on the device.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from forethought.config import Method
from forethought.data.positions import Positions, ThoughtFormat, pad_rows
from forethought.models.fused import prepacked
from forethought.models.logprobs import log_probabilities, mask_tokens, position_ids
from forethought.prefix import Prefix, SuffixCache, backbone, check_logits, decoder_of, lm_head, read
from forethought.rollout import Thoughts

COMPACT = 0.75  # finished rows are dropped from a batch when less than this share of its rows is still decoding
_REFILL = 0.5  # more positions are read when less than this share of the rows that fit is still decoding


def sample(
    logits: Float[Tensor, "row vocab"], noise: Float[Tensor, " row"], temperature: float, top_p: float
) -> Int[Tensor, " row"]:
    """Draw a token per row by inverting the cumulative distribution at a uniform number; sums in float64.

    With top_p < 1 the draw is from the smallest set of likeliest tokens whose probability reaches top_p. At temperature
    0 it is the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probability = (logits.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, order = probability.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        probability = probability.scatter(-1, order, ordered.masked_fill(outside, 0))
    cumulative = probability.double().cumsum(dim=-1)
    point = noise.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def sample_with_logp(
    logits: Float[Tensor, "row vocab"], noise: Float[Tensor, " row"], options: Method
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """A token per row by `sample`, and its log-probability at the temperature."""
    token = sample(logits, noise, options.temperature, options.top_p)
    return token, log_probabilities(logits, token, options.temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeState:
    """The state of all rows, position by position; its tensors are updated in place.

    A row samples its thought (`forced_index` is -1), then reads `forced_tokens`: what is left of the bridge to the
    text, and the targets, whose log-probabilities are its evidence. `forced_index` is the index of the token that the
    row reads next; past the last one the row is finished. Rows need not be at the same step. With `response_noise` a
    row writes: what it samples replaces the target that was scored there.
    """

    noise: Float[Tensor, "row thought"]  # a uniform number for each token
    forced_tokens: Int[Tensor, "row forced"]
    forced_index: Int[Tensor, " row"]
    tokens: Int[Tensor, "row thought"]
    logp: Float[Tensor, "row thought"]
    length: Int[Tensor, " row"]
    matched: Int[Tensor, " row"]  # the state of `ThoughtFormat.closing`
    closed: Int[Tensor, " row"]  # 0 or 1
    evidence: Float[Tensor, "row horizon"]
    hit: Int[Tensor, "row horizon"]  # 0 or 1
    response_noise: Float[Tensor, "row horizon"] | None = None
    response_logp: Float[Tensor, "row horizon"] | None = None

    @classmethod
    def start(
        cls,
        positions: Positions,
        form: ThoughtFormat,
        noise: Float[Tensor, "batch group thought"],
        device: torch.device,
        response_noise: Float[Tensor, "batch group horizon"] | None = None,
    ) -> "DecodeState":
        """Rows that have not sampled a token yet. With `response_noise` they write in place of the targets."""
        group, limit = noise.shape[1:]
        targets = positions.targets()
        if response_noise is not None:
            targets = targets[:, :1].expand(-1, response_noise.shape[2])
        rows, horizon = noise.shape[0] * group, targets.shape[1]
        bridges = torch.tensor([form.bridge(context) for context in positions.contexts()])
        return cls(
            noise=noise.reshape(rows, limit).to(device),
            forced_tokens=torch.cat([bridges, targets], dim=1).repeat_interleave(group, 0).to(device),
            forced_index=torch.full((rows,), -1, device=device),
            tokens=torch.full((rows, limit), form.pad, device=device),
            logp=torch.zeros(rows, limit, device=device),
            length=torch.zeros(rows, dtype=torch.long, device=device),
            matched=torch.zeros(rows, dtype=torch.long, device=device),
            closed=torch.zeros(rows, dtype=torch.long, device=device),
            evidence=torch.zeros(rows, horizon, device=device),
            hit=torch.zeros(rows, horizon, dtype=torch.long, device=device),
            response_noise=None if response_noise is None else response_noise.flatten(0, 1).to(device),
            response_logp=None if response_noise is None else torch.zeros(rows, horizon, device=device),
        )

    @property
    def bridge_length(self) -> int:
        """Forced tokens ahead of the targets."""
        return self.forced_tokens.shape[1] - self.evidence.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Each tensor by its name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def head(self, rows: int) -> Any:
        """A view of the first rows."""
        return type(self)(**{name: tensor[:rows] for name, tensor in self.tensors().items()})

    def thoughts(self, batch: int) -> Thoughts:
        """The thoughts at `batch` positions, padded to the longest."""
        width, horizon = int(self.length.max()), self.evidence.shape[1]
        mask = torch.arange(width, device=self.length.device) < self.length[:, None]
        found = Thoughts(
            tokens=self.tokens[:, :width].view(batch, -1, width).clone(),
            mask=mask.view(batch, -1, width),
            closed=self.closed.bool().view(batch, -1),
            logp=self.logp[:, :width].view(batch, -1, width).clone(),
            evidence=self.evidence.unflatten(0, (batch, -1)),
            hit=self.hit.bool().unflatten(0, (batch, -1)),
        )
        if self.response_logp is None:
            return found
        return replace(  # what was written took the place of all targets but the first
            found,
            evidence=found.evidence[..., :1],
            hit=found.hit[..., :1],
            written=self.forced_tokens[:, -horizon:].unflatten(0, (batch, -1)),
            written_logp=self.response_logp.unflatten(0, (batch, -1)),
        )


@runtime_checkable
class Backend(Protocol):
    """Computes what the decoding loop needs of a model."""

    model: Any

    def prepared(self) -> contextlib.AbstractContextManager[Any]:
        """Entered for as long as some positions are decoded; the weights do not change inside."""
        ...

    def read(self, documents: Sequence[Sequence[int]], prefix_lengths: Sequence[Sequence[int]]) -> Prefix:
        """Read documents, as `prefix.read`."""
        ...

    def step(self, tokens: Int[Tensor, "row width"], cache: SuffixCache) -> Float[Tensor, "row vocab"]:
        """Read some tokens per row, whose keys and values are added to the cache; the logits that follow the last."""
        ...

    def draw(
        self, logits: Float[Tensor, "row vocab"], noise: Float[Tensor, " row"], options: Method
    ) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
        """As `sample_with_logp`."""
        ...


class EagerBackend:
    """The model's own forward pass; on a CPU, if `prepack`, over weights that are prepacked for `rows` rows."""

    def __init__(self, model: Any, rows: int = 128, prepack: bool = True):
        self.model, self.rows, self.prepack = model, rows, prepack
        self.draw = sample_with_logp

    def prepared(self) -> contextlib.AbstractContextManager[Any]:
        """Prepack the weights."""
        return prepacked(self.model, self.rows, self.prepack)

    def read(self, documents: Sequence[Sequence[int]], prefix_lengths: Sequence[Sequence[int]]) -> Prefix:
        """Read documents."""
        return read(self.model, documents, prefix_lengths)

    def step(self, tokens: Int[Tensor, "row width"], cache: SuffixCache) -> Float[Tensor, "row vocab"]:
        """Read some tokens per row; the logits that follow the last."""
        width = tokens.shape[1]
        cache.reserve(width)
        hidden = backbone(self.model, tokens, cache, cache.position_ids(width))
        cache.length += width
        return lm_head(self.model, hidden[:, -1])


class SharedBatch:
    """Rows over documents that are in memory once. New rows can join while others are decoding."""

    def __init__(self, backend: Backend, cache: SuffixCache):
        self.backend, self.cache = backend, cache

    @classmethod
    def read(
        cls, backend: Backend, form: ThoughtFormat, positions: Positions, group: int, capacity: int
    ) -> "tuple[SharedBatch, Float[Tensor, 'row vocab']]":
        """A row per thought, and the logits that follow the opening delimiter; suffixes have `capacity` columns."""
        prefix = backend.read(*form.documents_and_prefix_lengths(positions))
        cache = SuffixCache(prefix, [position for position in range(len(positions)) for _ in range(group)], capacity)
        lead = torch.tensor([*form.after, *form.open], device=backend.model.device)
        return cls(backend, cache), backend.step(lead.expand(len(positions) * group, -1), cache)

    @property
    def full(self) -> bool:
        """Whether all columns are in use, so that finished rows must be dropped before the next step."""
        return self.cache.length == self.cache.capacity

    def step(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """Read one token per row; the logits that follow."""
        return self.backend.step(tokens[:, None], self.cache)

    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Keep only some rows, in their order."""
        self.cache.select(rows)

    def join(self, other: "SharedBatch") -> None:
        """Append the rows of a younger batch."""
        self.cache.join(other.cache)


class ReplicatedBatch:
    """Rows of any Hugging Face causal LM, each with a copy of its prompt in the cache."""

    full = False  # the cache grows

    def __init__(self, model: Any, mask: Bool[Tensor, "row width"]):
        self.model, self.mask, self.cache = model, mask, DynamicCache(config=model.config)

    @classmethod
    def read(
        cls, model: Any, prompts: Sequence[Sequence[int]], pad: int
    ) -> "tuple[ReplicatedBatch, Float[Tensor, 'row vocab']]":
        """A row per prompt, and the logits that follow it. Equal prompts are read once and then copied."""
        index: dict[tuple[int, ...], int] = {}
        rows = torch.tensor([index.setdefault(tuple(prompt), len(index)) for prompt in prompts], device=model.device)
        tokens, mask = (part.to(model.device) for part in pad_rows(list(index), pad, left=True))
        batch = cls(model, mask)
        logits = batch._forward(tokens)
        if len(index) < len(prompts):
            batch.select(rows)
            logits = logits[rows]
        return batch, logits

    def _forward(self, tokens: Int[Tensor, "row new"]) -> Float[Tensor, "row vocab"]:
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
        """Read one token per row; the logits that follow."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return self._forward(tokens[:, None])

    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Keep, copy or drop rows in every layer, attention and Mamba alike."""
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        self.mask = self.mask[rows]


@torch.no_grad()
def probe_copies(model: Any) -> None:
    """Compare rows with copies of their prefixes with plain forward passes: read, padded, decoded and scored.

    Raises ValueError for a model that computes something else in one of these ways, or cannot be read so.
    """
    mixers = (module for module in model.modules() if hasattr(module, "conv1d"))
    if any(getattr(getattr(one, "in_proj", None), "bias", None) is not None for one in mixers):
        raise ValueError("its Mamba layers have in_proj.bias, which the convolution also reads at padding")
    size = model.get_input_embeddings().num_embeddings
    long, short, tail = ([i % size for i in some] for some in (range(105, 114), range(107, 111), range(117, 120)))
    try:
        wanted = [
            model(input_ids=torch.tensor([[*row, *tail]], device=model.device), use_cache=False).logits[0]
            for row in (long, short)
        ]
        batch, logits = ReplicatedBatch.read(model, [short, long, long], 0)
        batch.select(torch.tensor([2, 0], device=model.device))
        logits = logits[[2, 0]]
        for step, token in enumerate((*tail, None)):
            for row, own, length in zip(logits, wanted, (len(long), len(short)), strict=True):
                check_logits(model, row, own[length - 1 + step], "when rows of a batch are decoded")
            if token is not None:
                logits = batch.step(torch.full((2,), token, device=model.device))
        for left in (True, False):
            tokens, mask = (some.to(model.device) for some in pad_rows([[*long, *tail], [*short, *tail]], 0, left))
            more = {"attention_mask": mask.long(), "position_ids": position_ids(mask)} if left else {}
            hidden = decoder_of(model)(input_ids=tokens, use_cache=False, **more).last_hidden_state
            for row, own, own_mask in zip(lm_head(model, hidden), wanted, mask, strict=True):
                check_logits(model, row[own_mask], own, f"when rows are padded on the {'left' if left else 'right'}")
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"it cannot be read: {' '.join(str(error).split())[:200]}") from error


class Decoder:
    """Decodes at most `rows` thoughts at once (or one document's, where these are more).

    With `shared` documents the next positions join the batch as thoughts finish; otherwise each batch is decoded to its
    end before the next.
    """

    def __init__(self, backend: Backend, form: ThoughtFormat, options: Method, rows: int, shared: bool):
        self.backend, self.form, self.options, self.rows, self.shared = backend, form, options, rows, shared

    def decode(self, positions: Positions, state: DecodeState) -> None:
        """Decode all rows of the state, which are those of the positions."""
        group = len(state.length) // len(positions)
        active = _ActiveRows(state, self.backend, self.form, self.options)
        read, batch, logits = 0, None, None  # positions read so far
        with self.backend.prepared():
            while read < len(positions) or active.rows.numel():
                count = active.rows.numel()
                if read < len(positions) and (not count or (self.shared and count < _REFILL * self.rows)):
                    end = positions.window_boundary(read, (self.rows - count) // group, at_least=not count)
                    if end > read:
                        running = (batch, logits) if count else None
                        batch = logits = None  # frees a finished batch before the next is read
                        batch, logits = self._read(positions.slice(read, end), group, state, running)
                        active.add(read * group, end * group)
                        read = end
                assert batch is not None and logits is not None
                tokens = active.advance(logits)
                keep = active.unfinished()
                if keep.numel() < COMPACT * len(active.rows) or not keep.numel() or batch.full:
                    active.rows, tokens = active.rows[keep], tokens[keep]
                    batch.select(keep) if keep.numel() else None
                if active.rows.numel():
                    logits = batch.step(tokens)

    def _read(
        self, positions: Positions, group: int, state: DecodeState, running: tuple[Any, Any] | None
    ) -> tuple[SharedBatch | ReplicatedBatch, Float[Tensor, "row vocab"]]:
        """Read positions, and append their rows to the batch that is running."""
        form = self.form
        if not self.shared:
            contexts = [form.prompt_tokens(context) for context in positions.contexts() for _ in range(group)]
            return ReplicatedBatch.read(self.backend.model, contexts, form.pad)
        columns = len(form.after) + len(form.open) + state.tokens.shape[1] + state.forced_tokens.shape[1]
        batch, logits = SharedBatch.read(self.backend, form, positions, group, columns)
        if running is None:
            return batch, logits
        running[0].join(batch)
        return running[0], torch.cat([running[1], logits])


class _ActiveRows:
    """The rows of a state that are in the batch, in its order."""

    def __init__(self, state: DecodeState, backend: Backend, form: ThoughtFormat, options: Method):
        device = state.length.device
        self.state, self.backend, self.options = state, backend, options
        self.close, self.closing = torch.tensor(form.close, device=device), form.closing.to(device)
        self.form = form
        self.rows = torch.zeros(0, dtype=torch.long, device=device)
        self.early_steps = 0  # in so many steps some of them may not close yet

    def add(self, start: int, end: int) -> None:
        """Rows start .. end-1 have been appended to the batch."""
        self.rows = torch.cat([self.rows, torch.arange(start, end, device=self.rows.device)])
        self.early_steps = self.closing.shortest

    def unfinished(self) -> Int[Tensor, " row"]:
        """Indices, in the batch, of rows that have a token left to sample or to score."""
        return (self.state.forced_index[self.rows] < self.state.forced_tokens.shape[1]).nonzero().squeeze(-1)

    def advance(self, logits: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
        """Sample or score with the logits of each row; returns the token that it reads next."""
        state = self.state
        index = state.forced_index[self.rows]
        thinking = index < 0
        count = int(thinking.sum())
        if count == len(index):
            return self._sample(logits, self.rows)
        column = index.clamp(min=0, max=state.forced_tokens.shape[1] - 1)
        self._score(logits, index, state.forced_tokens[self.rows, column])
        forced = state.forced_tokens[self.rows, column]  # once more: rows that write have changed them
        if count:
            forced[thinking] = self._sample(logits[thinking], self.rows[thinking])
        return forced

    def _score(
        self, logits: Float[Tensor, "row vocab"], index: Int[Tensor, " row"], forced: Int[Tensor, " row"]
    ) -> None:
        """Score rows at a target (and let them write), and move all rows past their thought forward by one token."""
        state, options = self.state, self.options
        scored = ((index >= state.bridge_length) & (index < state.forced_tokens.shape[1])).nonzero().squeeze(-1)
        rows, column = self.rows[scored], index[scored] - state.bridge_length
        if scored.numel():
            here = logits[scored]
            state.evidence[rows, column] = log_probabilities(here, forced[scored])
            state.hit[rows, column] = (here.argmax(dim=-1) == forced[scored]).long()
            if state.response_noise is not None and state.response_logp is not None:
                here = self.form.decodable(here)
                token = sample(here, state.response_noise[rows, column], options.temperature, options.top_p)
                state.forced_tokens[rows, index[scored]] = token
                state.response_logp[rows, column] = log_probabilities(here, token, options.temperature)
        state.forced_index[self.rows] = torch.where(index >= 0, index + 1, index)

    def _sample(
        self, logits: Float[Tensor, "thinking vocab"], rows: Int[Tensor, " thinking"]
    ) -> Int[Tensor, " thinking"]:
        """Sample the next token of rows that think; returns what they read, which differs where a thought closes."""
        state, limit = self.state, self.state.tokens.shape[1]
        at, logits = state.length[rows], self.form.decodable(logits)
        if self.early_steps:
            logits = mask_tokens(logits, self.closing.early, at < self.closing.shortest)
            self.early_steps -= 1
        token, logp = self.backend.draw(logits, state.noise[rows, at], self.options)
        state.tokens[rows, at] = token
        state.logp[rows, at] = logp
        state.length[rows] = length = at + 1
        state.matched[rows] = matched = self.closing.step(state.matched[rows], token)
        closed = matched == self.closing.done
        state.closed[rows] = closed.long()
        cut = torch.where(length == limit, 0, -1)
        if state.response_noise is not None:  # what is written continues the tokens that were sampled
            state.forced_index[rows] = torch.where(closed, len(self.close), cut)
            return token
        begun = matching_prefix(state.tokens[rows], at, self.close)
        state.forced_index[rows] = torch.where(closed, begun + 1, cut)
        return torch.where(closed, self.close[begun], token)


def matching_prefix(
    tokens: Int[Tensor, "row thought"], at: Int[Tensor, " row"], close: Int[Tensor, " closing"]
) -> Int[Tensor, " row"]:
    """How many tokens right before `at` are the first ones of the delimiter: all but its last, at most."""
    begun = torch.zeros_like(at)
    for k in range(1, len(close)):
        columns = at[:, None] + torch.arange(-k, 0, device=at.device)
        same = (tokens.gather(1, columns.clamp(min=0)) == close[:k]) & (columns >= 0)
        begun = torch.where(same.all(dim=-1), k, begun)
    return begun
