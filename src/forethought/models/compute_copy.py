"""The policy: fp32 master weights, and the model that computes with them or with a copy; the EMA teacher."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forethought.models import sharding
from forethought.models.fused import fuse
from forethought.models.sharding import local_shard
from forethought.run import distributed


class Network:
    """The fp32 weights that are trained (`weights`), and the `model` of every forward and backward pass.

    In fp32 on one rank both are the same. In bf16 `model` is a copy, updated by `sync` after each optimizer step, since
    a step of 1e-6 would be lost on bf16 weights. Its gradients are added to those of the fp32 weights as soon as a
    backward pass has them, so they accumulate in fp32.

    With `shard` each rank keeps its shard of the weights, and `model` is a full copy on each rank, gathered once per
    step. Rollouts then need no communication, ranks may run different numbers of passes, and gradients are
    reduce-scattered once per step.

    With LoRA (a `model` is given, see forethought.models.lora) `weights` are the adapters' factors alone, in the order
    of the trainable parameters of `model`. Computing with the weights of another network then means to swap factors.
    """

    def __init__(self, weights: Any, precision: str, model: Any = None):
        self.weights, self.has_adapters = weights, model is not None
        self.model = model or (weights if precision == "fp32" else compute_copy(copy.deepcopy(weights), precision))
        self._parameters = [one for one in self.model.parameters() if one.requires_grad or not self.has_adapters]
        self._accumulators: list[Any] = []  # what holds the summed gradient of each parameter
        self._hooks: list[Any] = []
        if self.model is not weights:
            self._accumulate_into(list(weights.parameters()))

    def shard(self, others: Sequence[Any]) -> None:
        """Shard the fp32 weights, and those of other networks such as the teacher, over the ranks, in place."""
        if self.model is self.weights:
            self.weights = copy.deepcopy(self.weights)
            self._accumulators = list(self._parameters)
        else:
            self._accumulate_into([_Accumulator(parameter.dtype) for parameter in self.weights.parameters()])
        for network in (self.weights, *others):
            sharding.shard(network)

    @property
    def sharded(self) -> bool:
        """Whether each rank keeps only its shard of the weights."""
        return sharding.is_sharded(self.weights)

    @property
    def num_trainable(self) -> int:
        """The number of trained weights, over all ranks."""
        return sum(parameter.numel() for parameter in self.weights.parameters())

    def reduce_gradients(self, max_norm: float) -> float:
        """Sum the gradients of all ranks after the last pass of a step and clip them; returns their norm before."""
        masters = list(self.weights.parameters())
        if self.sharded:
            present = distributed.any_rank_has_gradient(self._accumulators)
            rows = zip(masters, self._parameters, self._accumulators, present, strict=True)
            for master, parameter, accumulator, has_gradient in rows:
                if has_gradient:
                    grad = accumulator.grad
                    grad = torch.zeros_like(parameter, dtype=master.dtype) if grad is None else grad
                    sharding.reduce_scatter(grad, master)
                accumulator.grad = None
        else:
            distributed.all_reduce_gradients(masters)
        with distributed.communication_errors():
            return float(sharding.whole(torch.nn.utils.clip_grad_norm_(masters, max_norm)))

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the current weights into `model`."""
        self._copy_from(self.weights)

    @contextlib.contextmanager
    def swapped_weights(self, other: Any) -> Iterator[Any]:
        """`model` with the fp32 weights of another network, such as the teacher, inside a `with` block.

        If the other is sharded, all ranks must call it together.
        """
        low_precision = any(parameter.dtype != torch.float32 for parameter in self._parameters)
        if not low_precision and not self.has_adapters and not sharding.is_sharded(other):
            yield other
            return
        saved = [parameter.detach().clone() for parameter in self._parameters] if self.sharded else None
        self._copy_from(other)
        try:
            yield self.model
        finally:
            self._copy_from(self.weights) if saved is None else self._set(saved)

    def as_model(self, other: Any) -> contextlib.AbstractContextManager[Any]:
        """A model that can be called with other weights: `other` itself, or with adapters `swapped_weights`."""
        return self.swapped_weights(other) if self.has_adapters else contextlib.nullcontext(other)

    @torch.no_grad()
    def _copy_from(self, source: Any) -> None:
        if sharding.is_sharded(source):
            sharding.gather_into(self.model, source)
        elif self.model is not self.weights:
            self._set([parameter.detach() for parameter in source.parameters()])

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._parameters, values)

    def _accumulate_into(self, accumulators: list[Any]) -> None:
        """Move gradients of `model` to the accumulators, in their precision, during each backward pass."""
        for hook in self._hooks:
            hook.remove()
        self._accumulators = accumulators
        pairs = zip(self._parameters, accumulators, strict=True)
        self._hooks = [parameter.register_post_accumulate_grad_hook(_move_to(held)) for parameter, held in pairs]


class Teacher:
    """The EMA teacher: phi <- tau * phi + (1 - tau) * theta after every optimizer step; phi = theta at the start.

    Kept in fp32: in bf16 (1 - 0.999) * delta rounds to zero for almost every weight, and the teacher never moves. Its
    score is the same for all thoughts of a position, so it cancels out of a group-relative update: it gives the reward
    its meaning (the logged information gain), not its gradient.
    """

    def __init__(self, policy: Any, decay: float):
        self.model = copy.deepcopy(policy).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, policy: Any) -> None:
        """Move towards the policy by 1 - tau, on each rank its shard."""
        ours, theirs = ([local_shard(parameter) for parameter in one.parameters()] for one in (self.model, policy))
        torch._foreach_lerp_(ours, theirs, 1 - self.decay)


def compute_copy(model: Any, precision: str, device: torch.device | None = None) -> Any:
    """Turn an fp32 model, in place, into one that computes in this precision and is not trained itself.

    Buffers, such as rotary frequencies, and weights that the architecture wants in fp32 stay so. It is moved to
    `device` after the conversion, so that fp32 weights take no memory there.
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
class _Accumulator:
    """Holds the gradient of a weight that is sharded."""

    dtype: torch.dtype
    grad: Tensor | None = None


def _move_to(accumulator: Any) -> Callable[[Tensor], None]:
    """A hook that adds a gradient to that of `accumulator`, in its precision."""

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if accumulator.grad is None:
            accumulator.grad = parameter.grad.to(accumulator.dtype)
        else:
            accumulator.grad.add_(parameter.grad)
        parameter.grad = None

    return move
