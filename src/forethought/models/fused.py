"""Faster forward passes for modules of a Hugging Face model: fused kernels on a GPU, prepacked weights on a CPU.

`fuse` replaces the forward pass of norms and gated MLPs by one with fewer kernels and fewer saved activations, where
both agree on a probe up to the rounding of the dtype. `prepacked` lets linear layers multiply with weights that are
already in the layout that a CPU's matrix product of few rows uses. A BLAS packs the weights in every call, which
takes most of the time of a decoding step once they exceed a core's cache. The weights are packed anew for each batch
of thoughts, so they are never stale.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers.activations import SiLUActivation

from forethought.flops import PREPACK_MIN_WEIGHTS


def fuse(model: nn.Module) -> int:
    """Fuse RMS norms and SiLU-gated MLPs; returns how many modules were changed."""
    changed = 0
    for module in model.modules():
        other = _norm(module) or _gated(module)
        if other is not None and _agree(module, other):
            module.forward = other
            changed += 1
    return changed


# Methods bound to the module, not closures over its parts: a deep copy of a model then computes with its own weights.


def _norm(module: Any) -> Callable[[Tensor], Tensor] | None:
    """A norm in one kernel that saves only its input, instead of six."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if eps is None or not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor):
        return None
    return MethodType(_fused_norm, module)


def _fused_norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _gated(module: Any) -> Callable[[Tensor], Tensor] | None:
    """down(silu(gate(x)) * up(x)); gate(x) and up(x) are saved, their product is recomputed in the backward pass."""
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    linear = (getattr(part, "base_layer", part) for part in parts)  # with an adapter or without
    known = isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
    return MethodType(_fused_gate, module) if known and all(isinstance(part, nn.Linear) for part in linear) else None


def _fused_gate(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(_Gate.apply(gate, up) if torch.is_grad_enabled() else silu(gate) * up)


class _Gate(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        gate, up = args
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        gate, up = ctx.saved_tensors
        grad = grad_outputs[0]
        return torch.ops.aten.silu_backward(grad * up, gate), grad * silu(gate)


def _agree(module: Any, other: Callable[[Tensor], Tensor]) -> bool:
    """Whether both give the same for inputs of the scale of normalized hidden states."""
    weight = next(module.parameters())
    noise = torch.randn(8, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    probe = noise.to(weight.device, weight.dtype)
    wanted, found = module(probe).detach().float(), other(probe).detach().float()
    return found.shape == wanted.shape and float((found - wanted).norm()) <= 1e-2 * float(wanted.norm())


@contextlib.contextmanager
def prepacked(model: nn.Module, rows: int, enabled: bool = True) -> Iterator[int]:
    """Let linear layers multiply with prepacked copies of their weights; yields how many layers do.

    For fp32 weights on an x86 CPU and passes without gradients; elsewhere, and for small models, nothing changes. The
    copies take as much memory as the weights, which must not change inside this context.

    Args:
        model: its `nn.Linear` modules are changed on entry and restored on exit.
        rows: the usual number of rows of a product; any number gives correct results.
        enabled: whether to do anything.
    """
    changed = []
    try:
        for layer in _packable(model) if enabled else []:
            layer.forward = _product(layer, rows)
            changed.append(layer)
        yield len(changed)
    finally:
        for layer in changed:
            del layer.forward


def _packable(model: nn.Module) -> list[Any]:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return []
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear  # a subclass may compute something else
        and "forward" not in vars(module)
        and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)
    ]
    return layers if sum(layer.weight.numel() for layer in layers) >= PREPACK_MIN_WEIGHTS else []


def _product(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
    bias = None if layer.bias is None else layer.bias.detach()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
