"""What is kept of documents that were read; the bases of the caches and layers that keep it."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What one layer keeps of the documents; absent parts are None or empty."""

    keys: Float[Tensor, "document head prefix size"] | None
    values: Float[Tensor, "document head prefix size"] | None
    conv: dict[int, Tensor]  # (place, channels, kernel)
    recurrent: dict[int, Tensor]  # (place, ...)
    kernels: dict[int, Any]

    def map(self, documents: Callable[[Tensor], Tensor], places: Callable[[Tensor], Tensor]) -> "State":
        """The same with one function over what is kept a document, and one over what is kept a place."""
        return replace(
            self,
            keys=None if self.keys is None else documents(self.keys),
            values=None if self.values is None else documents(self.values),
            conv={i: places(t) for i, t in self.conv.items()},
            recurrent={i: places(t) for i, t in self.recurrent.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Documents that have been read, and the places in them that rows may continue."""

    states: tuple[State, ...]
    owner: tuple[int, ...]  # document of each place
    stop: tuple[int, ...]  # tokens of the document before each place
    device: torch.device

    @classmethod
    def of(cls, states: Iterable[State], stops: Sequence[Sequence[int]], device: torch.device) -> "Prefix":
        """Documents with the numbers of tokens before the places of each."""
        owner = tuple(number for number, some in enumerate(stops) for _ in some)
        return cls(
            states=tuple(states), owner=owner, stop=tuple(stop for some in stops for stop in some), device=device
        )

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        found: list[Tensor] = []
        for state in self.states:
            found += [t for t in (state.keys, state.values) if t is not None]
            found += [*state.conv.values(), *state.recurrent.values()]
        return found

    def detached(self) -> "Prefix":
        """The same with every tensor a leaf of its own, which collects the gradients of all rows."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(True)

        return replace(self, states=tuple(state.map(leaf, leaf) for state in self.states))

    def backward(self, leaves: "Prefix") -> None:
        """Carry on, into the weights, the gradients that the rows left on `detached`'s leaves."""
        pairs = [
            (tensor, leaf.grad)
            for tensor, leaf in zip(self.tensors(), leaves.tensors(), strict=True)
            if leaf.grad is not None and tensor.requires_grad
        ]
        torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])


def together(one: Prefix, other: Prefix, documents: int) -> Prefix:
    """The documents and places of both; `documents` is how many the first has."""
    states = []
    for a, b in zip(one.states, other.states, strict=True):
        keys = values = None
        if a.keys is not None and a.values is not None and b.keys is not None and b.values is not None:
            width = max(a.keys.shape[2], b.keys.shape[2])
            keys, values = (stacked(pair, width) for pair in ((a.keys, b.keys), (a.values, b.values)))
        conv = {i: torch.cat([t, b.conv[i]]) for i, t in a.conv.items()}
        recurrent = {i: torch.cat([t, b.recurrent[i]]) for i, t in a.recurrent.items()}
        states.append(replace(a, keys=keys, values=values, conv=conv, recurrent=recurrent))
    owner = (*one.owner, *(documents + owner for owner in other.owner))
    return replace(one, states=tuple(states), owner=owner, stop=(*one.stop, *other.stop))


def stacked(parts: Sequence[Tensor], width: int) -> Tensor:
    """(document, head, prefix, size) tensors as one, filled up on the right; the filling is never seen."""
    if all(part.shape[2] == width for part in parts):
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return torch.cat([pad(part, (0, 0, 0, width - part.shape[2])) for part in parts])


def duplicate(layer: Any) -> Any:
    """A cache's layer as it is now; reading on replaces tensors and writes into none."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, dict(value))
    return twin


class Recurrent(LinearAttentionLayer):
    """Mamba states that are replaced and never written into, so that gradients run through and snapshots stay."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """The new inputs behind the kept ones; the last ones of both are kept."""
        kept = self.conv_states[state_idx]
        full = conv_states if kept is None else torch.cat([kept, conv_states], dim=-1)
        kernel = conv_kernel_size or self.conv_kernel_size[state_idx] or conv_states.shape[-1]
        if full.shape[-1] < kernel:
            full = pad(full, (kernel - full.shape[-1], 0))
        self._put_conv(state_idx, full[..., -kernel:], kernel)
        return full

    def _put_conv(self, state_idx: int, tensor: Tensor, kernel: Any) -> None:
        self.conv_states[state_idx], self.conv_kernel_size[state_idx] = tensor, kernel
        self.has_previous_state[state_idx] = self.is_conv_states_initialized[state_idx] = True
        self.device, self.dtype = tensor.device, tensor.dtype

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """The state after the new tokens."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


class Unmasked(Cache):
    """A cache for which models make no mask."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: masks are the attention's own business, and positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As if the queries stood alone, for which no mask is made."""
        return query_length, 0


class UnmaskedLayer(CacheLayerMixin):
    """A layer of attention in such a cache."""

    is_sliding = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the cache says."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """As the cache says."""
        return 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1
