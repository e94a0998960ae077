"""The native engine: thoughts, and free text, from any Hugging Face causal LM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from forethought.config import Config, Method, UserError
from forethought.data.positions import Positions, ThoughtFormat
from forethought.models.logprobs import mask_token
from forethought.rollout import Responses, Thoughts, share_prefixes
from forethought.rollout.cpp import CppBackend
from forethought.rollout.cuda_graphs import CUDAGraphDecoder, capturable
from forethought.rollout.decoder import COMPACT, Backend, Decoder, DecodeState, EagerBackend, ReplicatedBatch, sample


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
    """The engine of a config. Raises UserError where the model does not support what the config asks for."""
    share_prefixes(model, config)
    rows, shared = config.train.rollout_batch, config.model.prefix == "shared"
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
    return None if reason else CUDAGraphDecoder(model, form, config.method, config.train.rollout_batch, compiled)


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


Stop = Callable[[Sequence[int]], bool]  # whether a row that has generated these tokens is finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw tokens, how many, and for how many rows at once."""

    limit: int  # longest text, in generated tokens
    temperature: float  # 0: greedy
    top_p: float = 1.0
    rows: int = 64  # changes speed and memory, not the result
    not_first: int | None = None  # a token that no text begins with, such as a thought's closing delimiter


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Stop,
    streams: Sequence[torch.Generator],
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The tokens that follow each prompt, with the one that stopped it; at least one each.

    Prompt i draws from streams[i] alone, so its text does not depend on how prompts are split into batches (up to the
    rounding of a row that is padded to another width). `progress` receives the number of prompts of each batch.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))  # similar prompts together
    for start in range(0, len(order), sampling.rows):
        batch = order[start : start + sampling.rows]
        noise = torch.stack([torch.rand(sampling.limit, generator=streams[i]) for i in batch])
        found = _generate_batch(model, [prompts[i] for i in batch], sampling, stop, noise.to(model.device))
        for i, tokens in zip(batch, found, strict=True):
            texts[i] = tokens
        progress(len(batch))
    return texts


def _generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Stop, noise: Float[Tensor, "row limit"]
) -> list[list[int]]:
    batch, logits = ReplicatedBatch.read(model, prompts, pad=0)
    texts: list[list[int]] = [[] for _ in prompts]
    rows, running = list(range(len(prompts))), [True] * len(prompts)  # the rows in the batch, and which continue
    for step in range(sampling.limit):
        if step == 0 and sampling.not_first is not None:
            logits = mask_token(logits, sampling.not_first)
        drawn = _draw(logits, noise[rows, step], sampling)
        for i, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            if running[i]:
                texts[row].append(token)
                running[i] = not stop(texts[row])
        if not any(running) or step + 1 == sampling.limit:
            break
        if sum(running) < COMPACT * len(rows):
            kept = [i for i, runs in enumerate(running) if runs]
            rows, running = [rows[i] for i in kept], [True] * len(kept)
            drawn = drawn[kept]
            batch.select(torch.tensor(kept, device=model.device))
        logits = batch.step(drawn)
    return texts


def _draw(logits: Float[Tensor, "row vocab"], noise: Float[Tensor, " row"], sampling: Sampling) -> Int[Tensor, " row"]:
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return sample(logits, noise, sampling.temperature, sampling.top_p)
