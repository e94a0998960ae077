"""A policy's fp32 weights and what computes with them: the same network, or a whole or bf16 copy of them."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forethought.models import sharding
from forethought.models.fused import fuse
from forethought.models.sharding import local_shard
from forethought.run import distributed


class Network:
    """The fp32 weights that are trained, and the network that every forward and backward pass goes through.

    In bf16 that is a copy of the weights, made anew by `sync` after each optimizer step. Its gradients are added to
    those of the fp32 weights in fp32, as soon as a backward pass has them, so they may be summed over many chunks.
    An optimizer step of 1e-6 would be lost on bf16 weights; here it is not.

    Where the weights are dealt over processes (`shard`), the network that computes is a whole copy, in each process, of
    what all of them keep. It is filled once a step, so that rollouts decode without a word between processes, and each
    process may take as many passes as its documents need; its gradients go back to the shards once a step.

    Where only adapters are trained (`model`, see forethought.models.lora), the weights are their factors alone, and
    the network that computes repeats them as its trainable parameters, in the same order. To compute with others', such
    as the teacher's, is to switch adapters.
    """

    def __init__(self, weights: Any, precision: str, model: Any = None):
        self.weights, self.has_adapters = weights, model is not None
        self.model = model or (weights if precision == "fp32" else compute_copy(copy.deepcopy(weights), precision))
        self._repeated = [one for one in self.model.parameters() if one.requires_grad or not self.has_adapters]
        self._sums: list[Any] = []  # who holds the sum of the gradients of all passes, for each parameter
        self._hooks: list[Any] = []
        if self.model is not weights:
            self._add_up(list(weights.parameters()))

    def shard(self, others: Sequence[Any]) -> None:
        """Deal the fp32 weights over the processes, and those of other networks, such as the teacher, in place."""
        if self.model is self.weights:
            self.weights = copy.deepcopy(self.weights)
            self._sums = list(self._repeated)
        else:
            self._add_up([_Sum(parameter.dtype) for parameter in self.weights.parameters()])
        for network in (self.weights, *others):
            sharding.shard(network)

    @property
    def sharded(self) -> bool:
        """Whether each process keeps only its part of the weights."""
        return sharding.is_sharded(self.weights)

    @property
    def num_trainable(self) -> int:
        """How many weights are trained, over all processes."""
        return sum(parameter.numel() for parameter in self.weights.parameters())

    def reduce_gradients(self, limit: float) -> float:
        """Add up the gradients of all processes, once all passes are done, and clip them; their norm before that."""
        masters = list(self.weights.parameters())
        if not self.sharded:
            distributed.all_reduce_gradients(masters)
            return float(torch.nn.utils.clip_grad_norm_(masters, limit))
        known = distributed.any_rank_has_gradient(self._sums)
        for master, own, held in zip(masters, self._repeated, self._sums, strict=True):
            if known.pop(0):
                sharding.reduce_scatter(
                    torch.zeros_like(own, dtype=master.dtype) if held.grad is None else held.grad, master
                )
            held.grad = None
        return sharding.clip_gradients(masters, limit)

    @torch.no_grad()
    def sync(self) -> None:
        """Compute with the weights of now."""
        self._copy(self.weights)

    @contextlib.contextmanager
    def swapped_weights(self, other: Any) -> Iterator[Any]:
        """Compute with another network's fp32 weights, such as the teacher's, for a while; no copy is kept of them.

        Where the other is sharded, all processes must ask together.
        """
        low = any(parameter.dtype != torch.float32 for parameter in self._repeated)
        if not low and not self.has_adapters and not sharding.is_sharded(other):
            yield other
            return
        kept = [parameter.detach().clone() for parameter in self._repeated] if self.sharded else None
        self._copy(other)
        try:
            yield self.model
        finally:
            self._copy(self.weights) if kept is None else self._put(kept)

    def as_model(self, other: Any) -> contextlib.AbstractContextManager[Any]:
        """A network of other weights, to be called as it is: that network itself, or `swapped_weights`, if adapters."""
        return self.swapped_weights(other) if self.has_adapters else contextlib.nullcontext(other)

    @torch.no_grad()
    def _copy(self, source: Any) -> None:
        if sharding.is_sharded(source):
            sharding.gather_into(self.model, source)
        elif self.model is not self.weights:
            self._put([parameter.detach() for parameter in source.parameters()])

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._repeated, values)

    def _add_up(self, sums: list[Any]) -> None:
        """Let gradients of the copy move to `sums`, in fp32, after each pass."""
        for hook in self._hooks:
            hook.remove()
        self._sums = sums
        pairs = zip(self._repeated, sums, strict=True)
        self._hooks = [low.register_post_accumulate_grad_hook(_adder(held)) for low, held in pairs]


class Teacher:
    """phi <- tau * phi + (1 - tau) * theta after every optimizer step; phi = theta at the start.

    Kept in float32: in bf16 (1 - 0.999) * delta rounds to nothing for almost every weight, and the teacher never
    moves. Its score is the same for all thoughts of one position, so it cancels out of a group-relative update: it
    gives the reward its meaning (the information gain that is logged), not its gradient.
    """

    def __init__(self, policy: Any, decay: float):
        self.model = copy.deepcopy(policy).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, policy: Any) -> None:
        """Move towards the policy by 1 - tau, each process the rows that it keeps."""
        ours, theirs = ([local_shard(parameter) for parameter in one.parameters()] for one in (self.model, policy))
        torch._foreach_lerp_(ours, theirs, 1 - self.decay)


def compute_copy(model: Any, precision: str, device: torch.device | None = None) -> Any:
    """An fp32 model, turned into one that computes in this precision and is not trained itself; the same object.

    Buffers, such as rotary angles, stay fp32, and so do weights that the family wants in fp32. With a device it is
    moved there once its precision is right, so that fp32 weights need no room there.
    """
    if precision == "bf16":
        kept = getattr(model, "_keep_in_fp32_modules", None) or ()
        for name, parameter in model.named_parameters():
            if not any(part in name for part in kept):
                parameter.data = parameter.data.to(torch.bfloat16)
    if device is not None:
        model.to(device)
    if precision == "bf16" and model.device.type == "cuda":
        fuse(model)
    return model


@dataclass(slots=True)
class _Sum:
    """A gradient whose weights are elsewhere."""

    dtype: torch.dtype
    grad: Tensor | None = None


def _adder(own: Any) -> Any:
    """A hook that moves a gradient to `own`, in fp32."""

    def add(low: Tensor) -> None:
        assert low.grad is not None
        if own.grad is None:
            own.grad = low.grad.to(own.dtype)
        else:
            own.grad.add_(low.grad)
        low.grad = None

    return add
