"""Thoughts from any Hugging Face causal LM: a document is read once, the thoughts at all its places decode together."""

import contextlib
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from forethought.config import Config, Method, UserError
from forethought.data.positions import Positions, ThoughtFormat
from forethought.models.prepacked import packed
from forethought.prefix import enable
from forethought.rollout import Responses, Thoughts
from forethought.rollout.copies import COMPACT, read_copies
from forethought.rollout.cpp import Compiled
from forethought.rollout.cuda_graphs import Graphs, capturable
from forethought.rollout.decoder import Rows
from forethought.rollout.shared import read_shared

_REFILL = 0.5  # the next positions are read when fewer than this share of the rows that fit is still decoding


@runtime_checkable
class _Batch(Protocol):
    """Rows that decode together."""

    @property
    def full(self) -> bool:
        """Whether the next token finds room only if finished rows are dropped."""
        ...

    def step(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """Read one token a row; the logits that follow."""
        ...

    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Keep only some rows."""
        ...


class NativeEngine:
    """Samples with the policy itself, so there is nothing to synchronise and nothing to mismatch.

    `rows` bounds how many thoughts decode at once. With `shared` (a model that `prefix.enable` prepared) a document is
    kept once for all its thoughts, and as thoughts finish the next positions take their place; without, each thought
    has a copy of its prefix. With `graphs` thoughts decode without the host; what is written behind them does not.
    With `ordered`, a CPU multiplies with weights that are put into order once for each batch of thoughts (`packed`);
    with `compiled` (for shared documents) it decodes by compiled functions, one call a token.
    """

    def __init__(
        self,
        model: Any,
        form: ThoughtFormat,
        options: Method,
        rows: int = 128,
        shared: bool = True,
        *,
        graphs: Graphs | None = None,
        ordered: bool = True,
        compiled: Compiled | None = None,
    ):
        self.model, self.form, self.options, self.capacity, self.shared = model, form, options, rows, shared
        self.graphs, self.ordered, self.compiled = graphs, ordered, compiled
        self._drawing = None if compiled is None else compiled.draw

    def sync(self) -> None:
        """Nothing to do: the engine reads the policy's own weights."""

    @torch.no_grad()
    def sample(self, positions: Positions, noise: Float[Tensor, "batch group thought"]) -> Thoughts:
        """Sample, close by force where needed, and read log p of the targets off the logits that follow."""
        if self.graphs is not None:
            return self.graphs.sample(positions, noise)
        rows = Rows(positions.targets(), self.form, noise, self.model.device, drawing=self._drawing)
        with self._prepared():
            self._decode(positions, noise, rows)
        return rows.thoughts(len(positions), noise.shape[1])

    @torch.no_grad()
    def respond(
        self,
        positions: Positions,
        noise: Float[Tensor, "batch group thought"],
        writing: Float[Tensor, "batch group prediction"],
    ) -> Responses:
        """Sample a thought, read log p of the target off the logits that follow, and go on to write from them."""
        targets = positions.targets()[:, :1].expand(-1, writing.shape[2])
        rows = Rows(targets, self.form, noise, self.model.device, writing, self._drawing)
        with self._prepared():
            self._decode(positions, noise, rows)
        return rows.responses(len(positions), noise.shape[1])

    def _prepared(self) -> contextlib.AbstractContextManager[Any]:
        """Weights in the order that decoding reads them fastest."""
        if self.compiled is not None:
            return self.compiled.ordered()
        return packed(self.model, self.capacity, self.ordered)

    def _decode(self, positions: Positions, noise: Float[Tensor, "batch group thought"], rows: Rows) -> None:
        """Read positions as there is room for their rows, and take all rows to their ends."""
        group = noise.shape[1]
        room = len(self.form.after) + len(self.form.open) + noise.shape[2] + rows.feed.shape[1]
        waiting, batch, logits = 0, None, None
        while waiting < len(positions) or rows.alive.numel():
            alive = rows.alive.numel()
            if waiting < len(positions) and (not alive or (self.shared and alive < _REFILL * self.capacity)):
                end = positions.window_boundary(waiting, (self.capacity - alive) // group, at_least=not alive)
                if end > waiting:
                    running = (batch, logits) if alive else None
                    batch = logits = None  # a batch that has ended makes room before the next is read
                    batch, logits = self._begin(positions.slice(waiting, end), group, room, running)
                    rows.begin(waiting * group, end * group)
                    waiting = end
            assert batch is not None and logits is not None
            tokens = rows.advance(logits, self.options)
            keep = rows.alive_rows()
            if keep.numel() < COMPACT * len(rows.alive) or not keep.numel() or batch.full:
                rows.drop(keep)
                tokens = tokens[keep]
                batch.select(keep) if keep.numel() else None
            if rows.alive.numel():
                logits = batch.step(tokens)

    def _begin(
        self, positions: Positions, group: int, room: int, running: tuple[Any, Any] | None
    ) -> tuple[_Batch, Float[Tensor, "row vocab"]]:
        """Read new positions and set their rows behind those that are running."""
        if not self.shared:
            contexts = [self.form.prompt_tokens(context) for context in positions.contexts() for _ in range(group)]
            return read_copies(self.model, contexts, self.form.pad)
        batch, logits = read_shared(self.model, self.form, positions, group, room, self.compiled)
        if running is None:
            return batch, logits
        running[0].fork.join(batch.fork)
        return running[0], torch.cat([running[1], logits])


def native_engine(model: Any, form: ThoughtFormat, config: Config) -> NativeEngine:
    """The engine that a config asks for. Raises UserError for a model that cannot share prefixes but should."""
    shared = config.model.prefix == "shared"
    if shared:
        try:
            enable(model)
        except ValueError as error:
            raise UserError(
                f"model.prefix = 'shared': {type(model).__name__} cannot read a document once for all its thoughts "
                f"({error}); set model.prefix to 'replicated'"
            ) from error
    rows = config.train.rollout_batch
    graphs, ordered = _graphs(model, form, config), config.model.decoding != "eager"
    compiled = _compiled(model, config)
    return NativeEngine(model, form, config.method, rows, shared, graphs=graphs, ordered=ordered, compiled=compiled)


def _graphs(model: Any, form: ThoughtFormat, config: Config) -> Graphs | None:
    """Decoding without the host, where it was asked for or (`auto`) a GPU and the model's layers allow it.

    Raises UserError where it was asked for and cannot be.
    """
    asked = config.model.decoding
    if asked in ("eager", "cpp"):
        return None
    hindrance = None
    if config.model.prefix != "shared":
        hindrance = "model.prefix must be 'shared'"
    elif model.device.type != "cuda":
        hindrance = "there is no GPU"
    elif not capturable(model):
        hindrance = f"{type(model).__name__} has layers (Mamba, experts) that a graph cannot hold"
    if hindrance and asked != "auto":
        raise UserError(f"model.decoding = {asked!r}: {hindrance}; use 'auto' or 'eager'")
    if hindrance:
        return None
    return Graphs(model, form, config.method, config.train.rollout_batch, asked == "cuda_graphs_compiled")


def _compiled(model: Any, config: Config) -> Compiled | None:
    """The C++ backend, where it was asked for. Raises UserError where it cannot be."""
    if config.model.decoding != "cpp":
        return None
    try:
        if model.device.type != "cpu":
            raise ValueError("the model is not on a CPU")
        if config.model.prefix != "shared":
            raise ValueError("model.prefix must be 'shared'")
        return Compiled(model)
    except ValueError as error:
        raise UserError(f"model.decoding = 'cpp': {error}; use 'auto' or 'eager'") from error
