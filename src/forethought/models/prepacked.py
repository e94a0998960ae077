"""Weights of linear layers in the order that a processor's products of few rows read them fastest, for decoding.

A step of decoding multiplies every weight with a few rows. Where the weights do not fit a core's cache, a product that
first brings them into its own order, as BLAS does at each call, spends most of its time on that. oneDNN's products take
weights that were put into order once. They are put into order anew for each batch of thoughts, so they cannot be stale.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 1_000_000  # weights of linear layers that a core's cache holds (4 MB), where ordering them brings nothing


@contextlib.contextmanager
def packed(model: nn.Module, rows: int, asked: bool = True) -> Iterator[int]:
    """Let linear layers multiply with ordered copies of their weights for a while, if `asked`; how many layers do.

    The copies take the memory of the linear layers' weights once more. Without gradients only, and only fp32 on an
    x86 CPU; elsewhere, and with small models, everything stays as it is.

    Args:
        model: its `nn.Linear` modules are changed and changed back; their weights must stay as they are meanwhile.
        rows: how many rows a product will mostly have; any number is right.
    """
    changed = []
    try:
        for layer in _layers(model) if asked else []:
            layer.forward = _product(layer, rows)
            changed.append(layer)
        yield len(changed)
    finally:
        for layer in changed:
            del layer.forward


def _layers(model: nn.Module) -> list[Any]:
    """The layers that it pays for."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return []
    fit = [
        module
        for module in model.modules()
        if type(module) is nn.Linear  # a subclass may compute something else
        and "forward" not in vars(module)
        and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)
    ]
    return fit if sum(layer.weight.numel() for layer in fit) >= SMALL else []


def _product(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
    bias = None if layer.bias is None else layer.bias.detach()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
