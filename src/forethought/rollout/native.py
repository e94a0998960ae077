"""The native engine: thoughts, and free text, from any Hugging Face causal LM."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forethought.config import Config, Method, UserError
from forethought.data.positions import Positions, ThoughtFormat
from forethought.rollout import Responses, Thoughts
from forethought.rollout.cpp import CppBackend
from forethought.rollout.cuda_graphs import CUDAGraphDecoder, capturable
from forethought.rollout.decoder import Backend, Decoder, DecodeState, EagerBackend


class NativeEngine:
    """Samples with the policy itself, so there is nothing to synchronize and no mismatch between sampler and policy.

    At most `rows` thoughts decode at once. With `shared` (a model that `prefix.enable` prepared) a document is stored
    once for all its thoughts; without, each thought has a copy of its prefix. A `backend` other than eager PyTorch is
    for shared documents. With `graphs` thoughts are decoded by CUDA graphs; responses are not.
    """

    def __init__(
        self,
        model: Any,
        form: ThoughtFormat,
        options: Method,
        rows: int = 128,
        shared: bool = True,
        *,
        backend: Backend | None = None,
        graphs: CUDAGraphDecoder | None = None,
    ):
        self.model, self.form, self.graphs = model, form, graphs
        self.decoder = Decoder(backend or EagerBackend(model, rows), form, options, rows, shared)

    def sync(self) -> None:
        """Nothing to do: the engine reads the policy's own weights."""

    @torch.no_grad()
    def sample(self, positions: Positions, noise: Float[Tensor, "batch group thought"]) -> Thoughts:
        """Sample, force the closing delimiter where needed, and score the targets with the logits that follow."""
        state = DecodeState.start(positions.targets(), self.form, noise, self.model.device)
        (self.graphs or self.decoder).decode(positions, state)
        return state.thoughts(len(positions))

    @torch.no_grad()
    def respond(
        self,
        positions: Positions,
        noise: Float[Tensor, "batch group thought"],
        writing: Float[Tensor, "batch group prediction"],
    ) -> Responses:
        """Sample a thought, score the target with the logits that follow, and continue to sample from them."""
        targets = positions.targets()[:, :1].expand(-1, writing.shape[2])
        state = DecodeState.start(targets, self.form, noise, self.model.device, writing)
        self.decoder.decode(positions, state)
        return state.responses(len(positions))


def native_engine(model: Any, form: ThoughtFormat, config: Config) -> NativeEngine:
    """What `rollout.engine` builds. Raises UserError where the model does not support what the config asks for."""
    rows, shared = config.train.rows, config.model.prefix == "shared"
    backend = _cpp(model, config) or EagerBackend(model, rows, prepack=config.model.decoding != "eager")
    graphs = _cuda_graphs(model, form, config)
    return NativeEngine(model, form, config.method, rows, shared, backend=backend, graphs=graphs)


def _cuda_graphs(model: Any, form: ThoughtFormat, config: Config) -> CUDAGraphDecoder | None:
    """CUDA-graph decoding, if requested or (`auto`) if a GPU and the model's layers allow it."""
    decoding = config.model.decoding
    if decoding in ("eager", "cpp"):
        return None
    reason = None
    if config.model.prefix != "shared":
        reason = "model.prefix must be 'shared'"
    elif model.device.type != "cuda":
        reason = "there is no GPU"
    elif not capturable(model):
        reason = f"{type(model).__name__} has layers (Mamba, experts) that a CUDA graph cannot capture"
    if reason and decoding != "auto":
        raise UserError(f"model.decoding = {decoding!r}: {reason}; use 'auto' or 'eager'")
    compiled = decoding == "cuda_graphs_compiled"
    return None if reason else CUDAGraphDecoder(model, form, config.method, config.train.rows, compiled)


def _cpp(model: Any, config: Config) -> CppBackend | None:
    """The C++ backend, if requested."""
    if config.model.decoding != "cpp":
        return None
    try:
        if config.model.prefix != "shared":
            raise ValueError("model.prefix must be 'shared'")
        return CppBackend(model)
    except ValueError as error:
        raise UserError(f"model.decoding = 'cpp': {error}; use 'auto' or 'eager'") from error
