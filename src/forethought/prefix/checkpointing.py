"""How the layers of an update run: with activation checkpointing that supports caches, and compiled.

transformers' own checkpointing drops the cache, through which the gradients of shared prefixes flow.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from forethought.prefix.reading import decoder_of, snapshot


def layers_of(model: Any) -> list[Any]:
    """A causal LM's layers that can be recomputed, in order; a layer inside another (Zamba 2) belongs to it."""
    return list(dict.fromkeys(_outermost(decoder_of(model))))


def _outermost(module: Any) -> Iterator[Any]:
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _outermost(child)


@contextlib.contextmanager
def activation_checkpointing(model: Any, enabled: bool, compiled: bool = False) -> Iterator[None]:
    """If `enabled`, forward passes with gradients inside this context keep only the input of each layer.

    Exact: a layer's cache is restored before it is recomputed. The backward pass may run after the context has ended,
    and more than once. `compiled`: layers run compiled (`update.compile`), all by the same code for any size; the cache
    and the attention, which know the layer's number and the documents, stay outside of it.
    """
    layers = layers_of(model) if enabled or compiled else []
    for number, layer in enumerate(layers):
        forward = torch.compile(layer.forward, dynamic=True) if compiled else layer.forward
        layer.forward = _checkpointed(forward, number) if enabled else forward
    try:
        with contextlib.ExitStack() as stack:
            if compiled:  # a layer's number is no constant
                stack.enter_context(torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True))
            yield
    finally:
        for layer in layers:
            del layer.forward


def _checkpointed(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        before = None if cache is None else snapshot(cache.layers[number])
        first = True

        def once(*inputs: Any) -> Any:
            nonlocal first
            if first or cache is None:
                first = False
                return forward(*inputs, **kwargs)
            now, cache.layers[number] = cache.layers[number], snapshot(before)
            try:
                return forward(*inputs, **kwargs)
            finally:
                cache.layers[number] = now

        return checkpoint(once, *args, use_reentrant=False, preserve_rng_state=False)

    return run
