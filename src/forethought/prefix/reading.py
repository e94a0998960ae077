"""Documents that are read once, and what is kept of them for the rows that continue them.

Works on unmodified Hugging Face causal LMs, hybrids with Mamba layers included.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer
from transformers.modeling_outputs import MoeModelOutputWithPast


def decoder_of(model: Any) -> Any:
    """The layers of a causal LM with its embeddings, without its head: of a multimodal model, the text model's."""
    found = model.get_decoder()
    return found if found is not model else model.model  # Llama 4's text model finds itself


def backbone(
    model: Any, tokens: Int[Tensor, "row width"], cache: Cache, position_ids: Int[Tensor, "#row width"] | None = None
) -> Float[Tensor, "row width hidden"]:
    """Hidden states of a causal LM after its last layer, before the language-model head."""
    if position_ids is None:
        position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
    output = decoder_of(model)(input_ids=tokens, position_ids=position_ids, past_key_values=cache, use_cache=True)
    return output.last_hidden_state


def lm_head(model: Any, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
    """Logits of hidden states that `backbone` returned: the model's own forward pass with its layers left out.

    Scaling, soft caps and whatever else a family does to its logits are applied too.
    """
    base, rows = decoder_of(model), hidden.reshape(1, -1, hidden.shape[-1])
    base.forward = lambda *args, **kwargs: _Hidden(last_hidden_state=rows)
    try:
        tokens = torch.zeros(1, rows.shape[1], dtype=torch.long, device=rows.device)  # nothing reads them
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        del base.forward
    return logits.view(*hidden.shape[:-1], logits.shape[-1])


@dataclass
class _Hidden(MoeModelOutputWithPast):
    """What a family's language model reads from the output of its layers: the hidden states, and nothing else."""

    last_hidden_state: Any = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """What one layer keeps of the documents; absent parts are None or empty."""

    keys: Float[Tensor, "document head prefix size"] | None
    values: Float[Tensor, "document head prefix size"] | None
    conv: dict[int, Tensor] = field(default_factory=dict)  # (position, channels, kernel)
    recurrent: dict[int, Tensor] = field(default_factory=dict)  # (position, ...)
    kernels: dict[int, Any] = field(default_factory=dict)

    def map(self, documents: Callable[[Tensor], Tensor], positions: Callable[[Tensor], Tensor]) -> "LayerState":
        """Apply one function to what is kept per document, and one to what is kept per position."""
        return replace(
            self,
            keys=None if self.keys is None else documents(self.keys),
            values=None if self.values is None else documents(self.values),
            conv={i: positions(t) for i, t in self.conv.items()},
            recurrent={i: positions(t) for i, t in self.recurrent.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Documents that have been read, and the positions in them that rows may continue."""

    states: tuple[LayerState, ...]
    document: tuple[int, ...]  # of each position
    length: tuple[int, ...]  # tokens of the document before each position
    device: torch.device

    @classmethod
    def of(
        cls, states: Iterable[LayerState], prefix_lengths: Sequence[Sequence[int]], device: torch.device
    ) -> "Prefix":
        """Documents with the number of tokens before each of their positions."""
        document = tuple(number for number, lengths in enumerate(prefix_lengths) for _ in lengths)
        length = tuple(length for lengths in prefix_lengths for length in lengths)
        return cls(states=tuple(states), document=document, length=length, device=device)

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        found: list[Tensor] = []
        for state in self.states:
            found += [t for t in (state.keys, state.values) if t is not None]
            found += [*state.conv.values(), *state.recurrent.values()]
        return found

    def detached(self) -> "Prefix":
        """The same with every tensor a detached leaf, which accumulates the gradients of all rows."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(True)

        return replace(self, states=tuple(state.map(leaf, leaf) for state in self.states))

    def backward(self, leaves: "Prefix") -> None:
        """Propagate to the weights the gradients that the rows left on `detached`'s leaves."""
        pairs = [
            (tensor, leaf.grad)
            for tensor, leaf in zip(self.tensors(), leaves.tensors(), strict=True)
            if leaf.grad is not None and tensor.requires_grad
        ]
        torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])


def read(model: Any, documents: Sequence[Sequence[int]], prefix_lengths: Sequence[Sequence[int]]) -> Prefix:
    """Read each document once, up to its last position, and keep what rows need that continue it at any position.

    Args:
        model: a causal LM that `enable` has prepared.
        documents: token ids of each document.
        prefix_lengths: for each document the number of tokens before each position, non-decreasing, at least 1 each.
    """
    if any(list(lengths) != sorted(lengths) for lengths in prefix_lengths):
        raise ValueError("the positions of a document must come in reading order")
    cache = DynamicCache(config=model.config)
    rows = [list(tokens[: lengths[-1]]) for tokens, lengths in zip(documents, prefix_lengths, strict=True)]
    if any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers):
        states = _read_in_segments(model, rows, prefix_lengths)
    else:
        width = max(len(row) for row in rows)
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        layers: list[Any] = [DynamicLayer() for _ in cache.layers]
        backbone(model, tokens, Cache(layers=layers))
        states = [LayerState(keys=layer.keys, values=layer.values) for layer in layers]
    return Prefix.of(states, prefix_lengths, model.device)


def concatenate(first: Prefix, second: Prefix) -> Prefix:
    """The documents and positions of both."""
    states = []
    for a, b in zip(first.states, second.states, strict=True):
        keys = values = None
        if a.keys is not None and a.values is not None and b.keys is not None and b.values is not None:
            width = max(a.keys.shape[2], b.keys.shape[2])
            keys, values = (_pad_and_concatenate(pair, width) for pair in ((a.keys, b.keys), (a.values, b.values)))
        conv = {i: torch.cat([t, b.conv[i]]) for i, t in a.conv.items()}
        recurrent = {i: torch.cat([t, b.recurrent[i]]) for i, t in a.recurrent.items()}
        states.append(replace(a, keys=keys, values=values, conv=conv, recurrent=recurrent))
    documents = max(first.document) + 1
    document = (*first.document, *(documents + number for number in second.document))
    return replace(first, states=tuple(states), document=document, length=(*first.length, *second.length))


def _pad_and_concatenate(parts: Sequence[Tensor], width: int) -> Tensor:
    """(document, head, prefix, size) tensors as one, padded on the right; no row attends to the padding."""
    if all(part.shape[2] == width for part in parts):
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return torch.cat([pad(part, (0, 0, 0, width - part.shape[2])) for part in parts])


def snapshot(layer: Any) -> Any:
    """A cache layer as it is now; later reads replace its tensors and never write into them."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, dict(value))
    return twin


def _read_in_segments(model: Any, rows: list[list[int]], prefix_lengths: Sequence[Sequence[int]]) -> list[LayerState]:
    """One document at a time, position by position, recording the Mamba states at each position.

    Models process a single token by a step that writes into the state, so where two positions are neighbors the second
    one is read from the position before both.
    """
    kinds = DynamicCache(config=model.config).layers
    recorded: list[list[tuple[dict[int, Any], dict[int, Any]]]] = [[] for _ in kinds]
    finals: list[list[Any]] = [[] for _ in kinds]
    for row, lengths in zip(rows, prefix_lengths, strict=True):
        layers = [_reading_layer(kind) for kind in kinds]
        earlier, before, done = layers, 0, 0
        for length in lengths:
            if length == done + 1 and done:
                layers, done = earlier, before
            if length > done:
                earlier, before = [snapshot(layer) for layer in layers], done
                at = torch.arange(done, length, device=model.device)[None]
                backbone(model, torch.tensor([row[done:length]], device=model.device), Cache(layers=layers), at)
                done = length
            for states, layer in zip(recorded, layers, strict=True):
                if isinstance(layer, LinearAttentionLayer):
                    states.append((dict(layer.conv_states), dict(layer.recurrent_states)))
        for final, layer in zip(finals, layers, strict=True):
            final.append(layer)
    return [_layer_state(states, final) for states, final in zip(recorded, finals, strict=True)]


def _layer_state(recorded: Sequence[tuple[dict[int, Any], dict[int, Any]]], layers: Sequence[Any]) -> LayerState:
    """One layer's state from the Mamba states at each position and its cache at the end of each document."""
    keys = values = None
    if isinstance(layers[0], DynamicLayer):
        width = max(layer.keys.shape[2] for layer in layers)
        keys, values = (_pad_and_concatenate([getattr(x, name) for x in layers], width) for name in ("keys", "values"))
    conv, recurrent = (
        {i: torch.cat([each[which][i] for each in recorded]) for i, t in recorded[0][which].items() if t is not None}
        if recorded
        else {}
        for which in (0, 1)
    )
    kernels = dict(cast(Any, layers[0]).conv_kernel_size) if recorded else {}
    return LayerState(keys=keys, values=values, conv=conv, recurrent=recurrent, kernels=kernels)


class RecurrentLayer(LinearAttentionLayer):
    """Mamba states that are replaced, never written into, so that gradients flow through and snapshots stay valid."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Append the new inputs to the cached ones; the last ones of both are cached."""
        cached = self.conv_states[state_idx]
        full = conv_states if cached is None else torch.cat([cached, conv_states], dim=-1)
        kernel = conv_kernel_size or self.conv_kernel_size[state_idx] or conv_states.shape[-1]
        if full.shape[-1] < kernel:
            full = pad(full, (kernel - full.shape[-1], 0))
        self._set_conv(state_idx, full[..., -kernel:], kernel)
        return full

    def _set_conv(self, state_idx: int, tensor: Tensor, kernel: Any) -> None:
        self.conv_states[state_idx], self.conv_kernel_size[state_idx] = tensor, kernel
        self.has_previous_state[state_idx] = self.is_conv_states_initialized[state_idx] = True
        self.device, self.dtype = tensor.device, tensor.dtype

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Replace the state."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


class _RecurrentAttentionLayer(RecurrentLayer, DynamicLayer):
    """Mamba and attention side by side, while a document is read."""

    def __init__(self, number_of_states: int):
        DynamicLayer.__init__(self)
        RecurrentLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        DynamicLayer.lazy_initialization(self, *args)


def _reading_layer(kind: Any) -> Any:
    if not isinstance(kind, LinearAttentionLayer):
        return DynamicLayer()
    both = isinstance(kind, DynamicLayer)
    return (_RecurrentAttentionLayer if both else RecurrentLayer)(kind.number_of_states)
