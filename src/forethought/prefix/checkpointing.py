"""Gradient checkpointing that knows caches: of a layer only its input is kept, the rest is computed again backward.

transformers' own drops the cache, through which gradients of shared prefixes run.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from forethought.prefix.states import duplicate


def layers_of(model: Any) -> list[Any]:
    """The layers that can be computed again, in their order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def activation_checkpointing(model: Any, asked: bool) -> Iterator[None]:
    """Passes with gradients that begin in here keep the input of each layer alone, if that was `asked` for.

    Exact: the same numbers come out of a layer twice, because its cache is put back to what it was. The backward pass
    may follow later, and more than once.
    """
    layers = layers_of(model) if asked else []
    for number, layer in enumerate(layers):
        layer.forward = _twice(layer.forward, number)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _twice(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        before = None if cache is None else duplicate(cache.layers[number])
        first = True

        def once(*again: Any) -> Any:
            nonlocal first
            if first or cache is None:
                first = False
                return forward(*again, **kwargs)
            now, cache.layers[number] = cache.layers[number], duplicate(before)
            try:
                return forward(*again, **kwargs)
            finally:
                cache.layers[number] = now

        return checkpoint(once, *args, use_reentrant=False, preserve_rng_state=False)

    return run
