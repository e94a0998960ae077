"""Modules of a Hugging Face model whose arithmetic takes fewer kernels, and keeps less for the backward pass, on a GPU.

Nothing of a model is rewritten: a module is changed where the other way gives what its own code gives on a probe, up to
the rounding of its dtype, and left alone where not.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu


def fuse(model: nn.Module) -> int:
    """Change root-mean-square norms and SiLU-gated networks; how many modules were."""
    changed = 0
    for module in model.modules():
        other = _norm(module) or _gated(module)
        if other is not None and _agree(module, other):
            module.forward = other
            changed += 1
    return changed


# Methods bound to the module, not closures over its parts: a deep copy of a model then computes with its own weights.


def _norm(module: Any) -> Callable[[Tensor], Tensor] | None:
    """A norm in one kernel that keeps its input, where it was six that keep as many."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if eps is None or not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor):
        return None
    return MethodType(_one_norm, module)


def _one_norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _gated(module: Any) -> Callable[[Tensor], Tensor] | None:
    """down(silu(gate(x)) * up(x)), of which the two factors are kept and their product's parts computed again."""
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    linear = (getattr(part, "base_layer", part) for part in parts)  # with an adapter or without
    return MethodType(_one_gate, module) if all(isinstance(part, nn.Linear) for part in linear) else None


def _one_gate(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(_Gate.apply(gate, up) if torch.is_grad_enabled() else silu(gate) * up)


def _agree(module: Any, other: Callable[[Tensor], Tensor]) -> bool:
    weight = next(module.parameters())
    probe = torch.linspace(-3, 5, 2 * weight.shape[-1], device=weight.device, dtype=weight.dtype).view(2, -1)
    wanted, found = module(probe).detach(), other(probe).detach()
    scale = float(wanted.abs().max())
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= 1e-2 * scale


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
