"""Faster forward passes for modules of a Hugging Face model: fused kernels on a GPU, prepacked weights on a CPU.

`fuse` replaces the forward pass of norms, gated MLPs and rotary positions by one with fewer kernels and fewer saved
activations, where both agree on a probe up to the rounding of the dtype. Linear layers that read the same input become
one product. `prepacked` lets linear layers multiply with weights that are already in the layout that a CPU's matrix
product of few rows uses. A BLAS packs the weights in every call, which takes most of the time of a decoding step once
they exceed a core's cache. The weights are packed anew for each batch of thoughts, so they are never stale.
"""

import contextlib
import functools
import inspect
import platform
import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu
from transformers.activations import SiLUActivation

from forethought.flops import PREPACK_MIN_WEIGHTS

KERNEL_DEVICES = ("cuda",)
"""Devices that run Triton kernels."""

_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse(model: nn.Module) -> int:
    """Fuse RMS norms, SiLU-gated MLPs, projections of the same input and rotary positions.

    The weights of projections become parts of one tensor, which in-place updates change as before. Rotary positions are
    a function of the family's module in transformers: it is replaced for all models of the family on a GPU.

    Returns:
        how many norms and MLPs were changed.
    """
    changed = 0
    for space in {type(module).__module__ for module in model.modules()}:
        _fuse_rotary(sys.modules[space], next(model.parameters()))
    for module in model.modules():
        for names in _SAME_INPUT:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if all(type(layer) is nn.Linear for layer in layers) and _alike(layers):
                _Joint(layers)
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


def _alike(layers: list[Any]) -> bool:
    """Whether linear layers can be parts of one."""
    kinds = {(one.in_features, one.weight.dtype, one.weight.device, one.bias is None) for one in layers}
    return len(kinds) == 1


class _Joint:
    """Linear layers that read the same input, as one product over weights that lie side by side.

    The first layer that is called computes the outputs of all, and the others take theirs if their input is the same
    tensor. A layer whose weight was replaced, as in a deep copy of the model, computes its own.
    """

    def __init__(self, layers: list[Any]):
        self.layers, self.sizes = layers, [layer.out_features for layer in layers]
        self.weight: Any = self._side_by_side("weight")
        self.bias: Any = self._side_by_side("bias")
        self.x: Tensor | None = None
        self.parts: dict[int, Tensor] = {}
        for index, layer in enumerate(layers):
            layer.joint, layer.index, layer.forward = self, index, MethodType(_part_of_joint, layer)

    def __deepcopy__(self, memo: Any) -> None:
        """Nothing: the weights of a copy are tensors of their own."""

    def _side_by_side(self, name: str) -> Tensor | None:
        tensors = [getattr(layer, name) for layer in self.layers]
        if tensors[0] is None:
            return None
        joint = torch.cat([tensor.detach() for tensor in tensors])
        for tensor, part in zip(tensors, joint.split(self.sizes), strict=True):
            tensor.data = part
        return joint

    def holds(self, index: int) -> bool:
        """Whether weight and bias of a layer are still the parts of this one."""
        layer, before = self.layers[index], sum(self.sizes[:index])
        pairs = [(layer.weight, self.weight, layer.in_features), (layer.bias, self.bias, 1)]
        places = [(part, whole, before * width) for part, whole, width in pairs if whole is not None]
        return all(part.data_ptr() == whole.data_ptr() + at * whole.itemsize for part, whole, at in places)

    def part(self, index: int, x: Tensor) -> Tensor:
        """The output of one layer."""
        if self.x is not x or index not in self.parts:
            weights = [layer.weight for layer in self.layers]
            biases = [] if self.bias is None else [layer.bias for layer in self.layers]
            found = _Product.apply(x, self.weight, self.bias, self.sizes, *weights, *biases)
            self.x, self.parts = x, dict(enumerate(found))
        part = self.parts.pop(index)
        if not self.parts:
            self.x = None
        return part


def _part_of_joint(layer: Any, x: Tensor) -> Tensor:
    joint = layer.joint
    if joint is not None and (torch.compiler.is_compiling() or joint.holds(layer.index)):
        return joint.part(layer.index, x)
    return linear(x, layer.weight, layer.bias)


class _Product(torch.autograd.Function):
    """x W^T + b, in parts of some sizes; the gradients of W and b go to the parts of both, which are given last."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        x, weight, bias, sizes, *_ = args
        ctx.save_for_backward(x, weight)
        ctx.sizes, ctx.biased = sizes, bias is not None
        return linear(x, weight, bias).split(sizes, -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weight = ctx.saved_tensors
        grad = torch.cat(grad_outputs, -1)
        of_x, _, _, _, *needed = ctx.needs_input_grad
        parts: list[Tensor | None] = [None] * len(needed)
        if any(needed):
            rows = grad.flatten(0, -2)
            parts = [*(rows.mT @ x.flatten(0, -2)).split(ctx.sizes)]
            parts += rows.sum(0).split(ctx.sizes) if ctx.biased else ()
        return grad @ weight if of_x else None, None, None, None, *parts


def _fuse_rotary(space: Any, like: Tensor) -> None:
    """Let a family's models rotate queries and keys in one kernel, if its function does what the kernel does."""
    original = getattr(space, "apply_rotary_pos_emb", None)
    if original is None or hasattr(original, "fused") or like.device.type not in KERNEL_DEVICES:
        return
    if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return
    from forethought.prefix.kernels import rotary

    @functools.wraps(original)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        full = cos.dim() == 3 and cos.shape[1:] == (q.shape[2], q.shape[3]) and len(cos) in (1, len(q))
        known = full and cos.stride() == sin.stride() and q.shape[3] == k.shape[3] and q.dtype != torch.float64
        other = args or kwargs or torch.compiler.is_compiling() or q.device.type not in KERNEL_DEVICES
        return original(q, k, cos, sin, *args, **kwargs) if other or not known else rotary(q, k, cos, sin)

    noise = torch.randn(2, 7, 3, 16, generator=torch.Generator().manual_seed(0))
    q, cos, sin = (one.to(like.device, like.dtype) for one in (noise, noise[:, 0].cos(), noise[:, 0].sin()))
    probe = (q, q[:, :2], cos, sin)
    if all(_close(a, b) for a, b in zip(original(*probe), rotate(*probe), strict=True)):
        vars(rotate)["fused"] = True
        space.apply_rotary_pos_emb = rotate


def _agree(module: Any, other: Callable[[Tensor], Tensor]) -> bool:
    """Whether both give the same for inputs of the scale of normalized hidden states."""
    weight = next(module.parameters())
    noise = torch.randn(8, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    probe = noise.to(weight.device, weight.dtype)
    return _close(module(probe), other(probe))


def _close(wanted: Tensor, found: Tensor) -> bool:
    wanted, found = wanted.detach().float(), found.detach().float()
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
