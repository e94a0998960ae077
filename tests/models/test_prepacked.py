import platform

import pytest
import torch
from torch import nn

from forethought.config import Method
from forethought.data.positions import at_positions, make_generator
from forethought.models import prepacked as module
from forethought.models.prepacked import SMALL, packed
from forethought.rollout import draw_noise
from forethought.rollout.native import NativeEngine
from forethought.tools.plan.memory import PREPACK_MIN_WEIGHTS
from helpers.models import FORM, WINDOWS, qwen3

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="weights are put into order on x86 CPUs only",
)


@pytest.fixture
def small(monkeypatch):
    """Even the smallest model is packed."""
    monkeypatch.setattr(module, "SMALL", 0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 8, bias=False))


@pytest.mark.parametrize("shape", [(1, 24), (16, 24), (5, 3, 24), (300, 24)])
def test_ordered_weights_give_the_same_products(small, shape):
    model, x = network(), torch.randn(shape)
    with torch.no_grad():
        wanted = model(x)
        for rows in (1, 16, 128):
            with packed(model, rows) as count:
                found = model(x)
            assert count == 2 and found.shape == wanted.shape
            assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-5)


def test_ordered_weights_are_those_of_now_and_gone_afterwards(small):
    """A step of the optimizer between two batches of thoughts is seen, and outside a layer has its gradients."""
    model, x = network(), torch.randn(4, 24)
    with torch.no_grad(), packed(model, 4):
        before = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        with packed(model, 4):
            after = model(x)
        assert torch.allclose(after, model(x), atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-2)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_layers_come_back_after_an_error(small):
    model = network()
    with pytest.raises(RuntimeError, match="full"), packed(model, 4):
        raise RuntimeError("full")
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_what_is_left_as_it_is(small):
    """bf16 weights, subclasses, and layers whose forward somebody else has changed."""

    class Other(nn.Linear):
        pass

    changed = nn.Linear(8, 8)
    changed.forward = lambda input: input
    with packed(nn.Sequential(nn.Linear(8, 8).bfloat16(), Other(8, 8), changed), 4) as count:
        assert count == 0
    assert "forward" in vars(changed)


def test_small_models_are_left_as_they_are():
    assert SMALL == PREPACK_MIN_WEIGHTS  # what the planner counts with
    with packed(network(), 4) as count:
        assert count == 0
    with packed(nn.Linear(1000, 1000), 4) as count:
        assert count == 1


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "copied"])
def test_thoughts_are_those_of_the_plain_way(small, monkeypatch, shared):
    model, layers, product = qwen3(scale=0.1), [], module._product
    positions = at_positions(WINDOWS, [[1, 3], [2, 4, 5], [1], [2]], 2)
    noise = draw_noise((5, 6), [make_generator(0, i) for i in range(len(positions))])
    plain = NativeEngine(model, FORM, Method(), 7, shared, ordered=False).sample(positions, noise)
    monkeypatch.setattr(module, "_product", lambda layer, rows: layers.append(layer) or product(layer, rows))
    ordered = NativeEngine(model, FORM, Method(), 7, shared).sample(positions, noise)
    assert len(layers) == sum(type(layer) is nn.Linear for layer in model.modules())
    assert torch.equal(plain.tokens, ordered.tokens) and torch.equal(plain.closed, ordered.closed)
    assert torch.allclose(plain.logp, ordered.logp, atol=1e-5)
    assert torch.allclose(plain.evidence, ordered.evidence, atol=1e-5)
