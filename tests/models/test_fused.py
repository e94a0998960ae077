"""Fused and prepacked modules give the same numbers and gradients; others are left alone."""

import copy
import platform
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from forethought.config import Method
from forethought.data.positions import at_positions, make_generator
from forethought.models import fused as module
from forethought.models.fused import fuse, prepacked
from forethought.rollout import draw_noise
from forethought.rollout.decoder import EagerBackend
from forethought.rollout.native import NativeEngine
from helpers import architectures as tiny
from helpers.models import FORM, WINDOWS, qwen3
from helpers.operations import Operations


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


class Gated(torch.nn.Module):
    """A gated MLP of a width and scale at which the activations saturate."""

    def __init__(self, activation: nn.Module, width: int, std: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down_proj, self.act_fn = nn.Linear(2 * width, width, bias=False), activation
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [0.02, 0.06, 0.2])
def test_only_silu_is_taken_for_silu(std: float, dtype: torch.dtype):
    known = [ACT2FN["silu"], ACT2FN["swish"]]
    assert [fuse(Gated(one, 512, std).to(dtype)) for one in known] == [1, 1]
    others = [ACT2FN["gelu"], ACT2FN["gelu_pytorch_tanh"], nn.ReLU(), nn.Mish()]
    assert [fuse(Gated(one, 512, std).to(dtype)) for one in others] == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Mish()])
def test_a_silu_that_is_another_function_is_found_by_the_probe(activation: nn.Module, dtype: torch.dtype):
    class Named(nn.SiLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return activation(x)

    assert [fuse(Gated(Named(), 512, std).to(dtype)) for std in (0.02, 0.06)] == [0, 0]


def test_a_copy_computes_with_its_own_weights():
    """The teacher under FSDP2 is filled into a copy of the network that computes."""
    model, tokens = tiny.model("qwen3", "sdpa"), torch.arange(1, 9)[None]
    fuse(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = twin(input_ids=tokens).logits
        for name, parameter in model.named_parameters():
            if "proj" in name or "norm" in name:
                parameter.zero_()
        assert torch.equal(twin(input_ids=tokens).logits, before)
        assert not torch.allclose(model(input_ids=tokens).logits, before)


@pytest.mark.parametrize("name", ["llama", "llama-biased-tied", "qwen3"])
def test_projections_of_one_input_are_one_product(name: str):
    """Of a layer and of the head; two products of each in the backward pass. Nothing is kept afterwards."""
    counts, model = [], tiny.model(name, "sdpa")
    for _ in range(2):
        with Operations("mm", "addmm") as forward:
            loss = model(input_ids=torch.arange(1, 9)[None]).logits.sum()
        with Operations("mm", "addmm") as backward:
            loss.backward()
        counts.append((forward.count, backward.count))
        fuse(model)
    assert counts == [(7 * 3 + 1, 2 * (7 * 3 + 1)), (4 * 3 + 1, 2 * (4 * 3 + 1))]
    joint = [layer.joint for layer in model.modules() if hasattr(layer, "joint")]
    assert len(joint) == 5 * 3 and not any(one.parts or one.x is not None for one in joint)


def same_outputs_and_gradients(attention: Any, plain: Any, calls: str) -> bool:
    """Of projections called one after the other, such as "q1 k1 v2": the number is that of the input."""
    results: list[list[torch.Tensor]] = []
    for one in (attention, plain):
        one.zero_grad()
        inputs = torch.randn(3, 2, 5, 24, generator=torch.Generator().manual_seed(0)).unbind()
        rows = [row.requires_grad_() for row in inputs]
        outputs = [getattr(one, f"{call[0]}_proj")(rows[int(call[1])]) for call in calls.split()]
        sum(((1 + output) * output).sum() for output in outputs).backward()
        tensors = [*rows, *one.parameters()]
        results.append(outputs + [torch.zeros(1) if tensor.grad is None else tensor.grad for tensor in tensors])
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("calls", ["q1 k1 v1", "k1", "v1 q1 k1", "q1 k2 v2", "q1 q1 k1 v1", "q1 k1 q2 v1 k2 v2"])
@pytest.mark.parametrize("name", ["llama", "llama-biased-tied"])
def test_a_projection_can_be_called_in_any_way(name: str, calls: str):
    attention = tiny.model(name, "sdpa").model.layers[0].self_attn
    plain = copy.deepcopy(attention)
    fuse(attention)
    assert same_outputs_and_gradients(attention, plain, calls)


@pytest.mark.parametrize("change", ["in place", "data", "parameter", "bias", "frozen"])
def test_a_projection_computes_with_its_current_weight(change: str):
    attention = tiny.model("llama-biased-tied", "sdpa").model.layers[0].self_attn
    plain = copy.deepcopy(attention)
    fuse(attention)
    other = torch.randn(plain.k_proj.weight.shape, generator=torch.Generator().manual_seed(3))
    for layer in (attention.k_proj, plain.k_proj):
        if change == "in place":
            layer.weight.data.copy_(other)
        elif change == "data":
            layer.weight.data = other.clone()
        elif change == "bias":
            layer.bias.data = other[:, 0].clone()
        elif change == "parameter":
            layer.weight = nn.Parameter(other.clone())
        else:
            layer.weight.requires_grad_(False)
    assert same_outputs_and_gradients(attention, plain, "q1 k1 v1")


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


x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="weights are prepacked on x86 CPUs only",
)


@pytest.fixture
def small(monkeypatch):
    """Even the smallest model is prepacked."""
    monkeypatch.setattr(module, "PREPACK_MIN_WEIGHTS", 0)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 8, bias=False))


@x86
@pytest.mark.parametrize("shape", [(1, 24), (16, 24), (5, 3, 24), (300, 24)])
def test_prepacked_weights_give_the_same_products(small, shape):
    model, x = mlp(), torch.randn(shape)
    with torch.no_grad():
        wanted = model(x)
        for rows in (1, 16, 128):
            with prepacked(model, rows) as count:
                found = model(x)
            assert count == 2 and found.shape == wanted.shape
            assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-5)


@x86
def test_prepacked_weights_are_the_current_ones_and_gone_afterwards(small):
    """An optimizer step between two batches of thoughts takes effect, and gradients flow outside the context."""
    model, x = mlp(), torch.randn(4, 24)
    with torch.no_grad(), prepacked(model, 4):
        before = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        with prepacked(model, 4):
            after = model(x)
        assert torch.allclose(after, model(x), atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-2)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@x86
def test_layers_are_restored_after_an_error(small):
    model = mlp()
    with pytest.raises(RuntimeError, match="full"), prepacked(model, 4):
        raise RuntimeError("full")
    assert not any("forward" in vars(layer) for layer in model.modules())


@x86
def test_layers_that_are_not_prepacked(small):
    """bf16 weights, subclasses, and layers whose forward pass has been replaced."""

    class Other(nn.Linear):
        pass

    changed = nn.Linear(8, 8)
    changed.forward = lambda input: input
    with prepacked(nn.Sequential(nn.Linear(8, 8).bfloat16(), Other(8, 8), changed), 4) as count:
        assert count == 0
    assert "forward" in vars(changed)


@x86
def test_small_models_are_not_prepacked():
    with prepacked(mlp(), 4) as count:
        assert count == 0
    with prepacked(nn.Linear(1000, 1000), 4) as count:
        assert count == 1


@x86
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "copied"])
def test_thoughts_over_prepacked_weights_are_the_same(small, monkeypatch, shared):
    model, layers, product = qwen3(scale=0.1), [], module._product
    positions = at_positions(WINDOWS, [[1, 3], [2, 4, 5], [1], [2]], 2)
    noise = draw_noise((5, 6), [make_generator(0, i) for i in range(len(positions))])
    wanted = NativeEngine(model, FORM, Method(), 7, shared, backend=EagerBackend(model, prepack=False)).sample(
        positions, noise
    )
    monkeypatch.setattr(module, "_product", lambda layer, rows: layers.append(layer) or product(layer, rows))
    found = NativeEngine(model, FORM, Method(), 7, shared).sample(positions, noise)
    assert len(layers) == sum(type(layer) is nn.Linear for layer in model.modules())
    assert torch.equal(wanted.tokens, found.tokens) and torch.equal(wanted.closed, found.closed)
    assert torch.allclose(wanted.logp, found.logp, atol=1e-5)
    assert torch.allclose(wanted.evidence, found.evidence, atol=1e-5)
