"""A policy's fp32 weights and what computes with them: the same network, or a bf16 copy whose gradients come back."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from forethought.fused import fuse


class Network:
    """The fp32 weights that are trained, and the network that every forward and backward pass goes through.

    In bf16 that is a copy of the weights, made anew by `sync` after each optimizer step. Its gradients are added to
    those of the fp32 weights in fp32, as soon as a backward pass has them, so they may be summed over many chunks.
    An optimizer step of 1e-6 would be lost on bf16 weights; here it is not.
    """

    def __init__(self, weights: Any, precision: str):
        self.weights, self.compute = weights, weights
        if precision == "bf16":
            self.compute = computing(copy.deepcopy(weights), precision)
            for own, low in zip(weights.parameters(), self.compute.parameters(), strict=True):
                low.register_post_accumulate_grad_hook(_adder(own))

    @torch.no_grad()
    def sync(self) -> None:
        """Compute with the weights of now."""
        self._copy(self.weights)

    @contextlib.contextmanager
    def holding(self, other: Any) -> Iterator[Any]:
        """Compute with another network's fp32 weights, such as the teacher's, for a while; no copy is kept of them."""
        if self.compute is self.weights:
            yield other
            return
        self._copy(other)
        try:
            yield self.compute
        finally:
            self._copy(self.weights)

    @torch.no_grad()
    def _copy(self, source: Any) -> None:
        if self.compute is not self.weights:
            torch._foreach_copy_(list(self.compute.parameters()), [p.detach() for p in source.parameters()])


def computing(model: Any, precision: str) -> Any:
    """An fp32 model, turned into one that computes in this precision and is not trained itself; the same object.

    Buffers, such as rotary angles, stay fp32, and so do weights that the family wants in fp32.
    """
    if precision == "bf16":
        kept = getattr(model, "_keep_in_fp32_modules", None) or ()
        for name, parameter in model.named_parameters():
            if not any(part in name for part in kept):
                parameter.data = parameter.data.to(torch.bfloat16)
        if model.device.type == "cuda":
            fuse(model)
    return model


def _adder(own: Tensor) -> Any:
    """A hook that moves a gradient to `own`, in fp32."""

    def add(low: Tensor) -> None:
        assert low.grad is not None
        if own.grad is None:
            own.grad = low.grad.to(own.dtype)
        else:
            own.grad.add_(low.grad)
        low.grad = None

    return add
