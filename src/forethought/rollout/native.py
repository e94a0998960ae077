"""The native engine: thoughts, and free text, from any Hugging Face causal LM."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forethought.config import Config, Method, Notice, UserError
from forethought.data.positions import Positions, ThoughtFormat
from forethought.flops import PREPACK_MIN_WEIGHTS
from forethought.prefix import attention_only
from forethought.rollout import Thoughts, rescored
from forethought.rollout.cpp import CppBackend
from forethought.rollout.cuda_graphs import CUDAGraphDecoder, not_capturable
from forethought.rollout.decoder import Backend, Decoder, DecodeState, EagerBackend


class NativeEngine:
    """Samples with the policy itself, so there is nothing to synchronize and no mismatch between sampler and policy.

    With a `score`, for a backend that rounds the weights, what it sampled gets its evidence from there.

    At most `rows` thoughts decode at once. With `shared` (a model that `prefix.enable` prepared) a document is stored
    once for all its thoughts; without, each thought has a copy of its prefix. A `backend` other than eager PyTorch is
    for shared documents. With `graphs` thoughts are decoded by CUDA graphs, unless the engine also writes. Unless
    `keep_buffers`, graphs and their buffers are freed after each call.
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
        score: Callable[[Thoughts, Positions], Thoughts] | None = None,
    ):
        self.model, self.form, self.graphs, self.score = model, form, graphs, score
        self.keep_buffers = True
        self.decoder = Decoder(backend or EagerBackend(model, rows), form, options, rows, shared)

    def sync(self) -> None:
        """Nothing to do: the engine reads the policy's own weights."""

    @torch.no_grad()
    def sample(
        self,
        positions: Positions,
        noise: Float[Tensor, "batch group thought"],
        writing: Float[Tensor, "batch group prediction"] | None = None,
    ) -> Thoughts:
        """Sample, force the closing delimiter where needed, and score the targets with the logits that follow.

        With `writing`, continue to sample from these logits.
        """
        state = DecodeState.start(positions, self.form, noise, self.model.device, writing)
        try:
            (self.decoder if writing is not None else self.graphs or self.decoder).decode(positions, state)
        finally:
            if self.graphs and not self.keep_buffers:
                self.graphs.free()
        thoughts = state.thoughts(len(positions))
        if self.score is None:
            return thoughts
        scored, width = self.score(thoughts, positions), thoughts.evidence.shape[-1]
        return replace(scored, evidence=scored.evidence[..., :width], hit=scored.hit[..., :width])


def native_engine(model: Any, form: ThoughtFormat, config: Config) -> NativeEngine:
    """What `rollout.engine` builds. Raises UserError where the model does not support what the config asks for."""
    rows, shared = config.train.rows, config.model.prefix == "shared"
    backend = _cpp(model, config) or EagerBackend(model, rows, prepack=config.model.decoding != "eager")
    graphs = _cuda_graphs(model, form, config)
    rounds = isinstance(backend, CppBackend) and backend.bf16
    score = partial(rescored, policy=model, form=form, config=config) if rounds else None
    return NativeEngine(model, form, config.method, rows, shared, backend=backend, graphs=graphs, score=score)


def _cuda_graphs(model: Any, form: ThoughtFormat, config: Config) -> CUDAGraphDecoder | None:
    """CUDA-graph decoding, if requested or (`auto`) if a GPU and the model's layers allow it."""
    decoding = config.model.decoding
    if decoding in ("eager", "cpp"):
        return None
    reason, compiled = "", decoding == "cuda_graphs_compiled"
    if config.model.prefix != "shared":
        reason = "model.prefix must be 'shared'"
    elif model.device.type != "cuda":
        reason = "there is no GPU"
    elif decoding != "auto":
        reason = not_capturable(model, compiled)
    elif not attention_only(model):
        return None
    if reason and decoding != "auto":
        raise UserError(f"model.decoding = {decoding!r}: {reason}; use 'auto' or 'eager'")
    return None if reason else CUDAGraphDecoder(model, form, config.method, config.train.rows, compiled)


def _cpp(model: Any, config: Config) -> CppBackend | None:
    """The C++ backend, if requested (as by bf16), or by `auto` for fp32 weights that exceed a core's cache."""
    automatic, bf16 = config.model.decoding == "auto", config.rollout.precision == "bf16"
    if bf16 and config.model.decoding not in ("auto", "cpp"):
        raise UserError("rollout.precision = 'bf16': takes model.decoding auto or cpp, or rollout.engine vllm")
    large = sum(one.weight.numel() for one in model.modules() if isinstance(one, nn.Linear)) >= PREPACK_MIN_WEIGHTS
    suits = large and (model.device.type, model.dtype) == ("cpu", torch.float32)
    if not (bf16 or config.model.decoding == "cpp" or (automatic and suits)):
        return None
    try:
        if config.model.prefix != "shared":
            raise ValueError("model.prefix must be 'shared'")
        backend = CppBackend(model, bf16)
    except ValueError as error:
        if automatic and bf16:
            raise UserError(f"rollout.precision = 'bf16': {error}; use 'policy' or rollout.engine vllm") from error
        if automatic:
            return None
        raise UserError(f"model.decoding = 'cpp': {error}; use 'auto' or 'eager'") from error
    if automatic:
        weights = " with bf16 weights" if bf16 else ""
        warnings.warn(f"model.decoding = 'auto': thoughts are decoded in C++{weights}", Notice, stacklevel=2)
    return backend
