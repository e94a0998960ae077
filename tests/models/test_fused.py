"""Modules that are computed another way give the same numbers and gradients; others are left alone."""

import copy
from typing import Any

import pytest
import tiny
import torch

from forethought.models.fused import fuse


class Odd(torch.nn.Module):
    """A norm that scales by 1 + weight, as some families do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = OddRMSNorm()


class OddRMSNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(0.1 * torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def gradients(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = model(input_ids=tokens).logits
    logits.square().mean().backward()
    return logits.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", ["llama", "llama-biased-tied", "qwen3", "smollm3"])
def test_same_logits_and_gradients(name: str):
    model, tokens = tiny.model(name, "sdpa"), torch.arange(1, 9)[None]
    other = copy.deepcopy(model)
    norms = sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    assert fuse(other) == norms + model.config.num_hidden_layers
    (logits, slopes), (found, others) = gradients(model, tokens), gradients(other, tokens)
    assert torch.allclose(logits, found, atol=1e-5)
    scale = max(float(one.abs().max()) for one in slopes)
    assert all(torch.allclose(a, b, atol=1e-5 * scale) for a, b in zip(slopes, others, strict=True))


def test_a_copy_computes_with_its_own_weights():
    """The teacher under FSDP2 is filled into a copy of the network that computes."""
    model, tokens = tiny.model("qwen3", "sdpa"), torch.arange(1, 9)[None]
    fuse(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = twin(input_ids=tokens).logits
        for name, parameter in model.named_parameters():
            if "mlp" in name or "norm" in name:
                parameter.zero_()
        assert torch.equal(twin(input_ids=tokens).logits, before)
        assert not torch.allclose(model(input_ids=tokens).logits, before)


def test_the_gate_keeps_one_tensor_less_for_the_backward_pass():
    kept = []
    for fused in (False, True):
        network, found = tiny.model("qwen3", "sdpa").model.layers[0].mlp, {}
        if fused:
            assert fuse(network) == 1
        weights = {parameter.data_ptr() for parameter in network.parameters()}

        def note(tensor: torch.Tensor, found: dict[int, int] = found) -> torch.Tensor:
            found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = network(torch.randn(7, 24))
        kept.append(sum(size for place, size in found.items() if place not in weights))
        assert out.requires_grad
    assert kept[0] - kept[1] == 7 * 40 * 4


def test_what_computes_something_else_is_left_alone():
    assert fuse(Odd()) == 0
    gelu = tiny.model("gemma")  # its gate is a GELU, its norms scale by 1 + weight
    with torch.no_grad():
        for parameter in gelu.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    assert fuse(gelu) == 0
