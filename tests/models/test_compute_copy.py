"""fp32 weights, and the bf16 copy that computes for them."""

import copy
import dataclasses

import torch

from forethought.models.compute_copy import Network
from helpers.models import WINDOWS, collected, config, qwen3, rlp, update


def test_fp32_computes_with_the_weights_themselves():
    model, other = qwen3(), qwen3()
    network = Network(model, "fp32")
    assert network.compute is network.weights is model
    with network.swapped_weights(other) as held:
        assert held is other


def test_bf16_gradients_of_several_passes_add_up_in_fp32_and_bf16_keeps_none():
    model = qwen3()
    network, tokens = Network(model, "bf16"), torch.arange(1, 7)[None]
    assert {p.dtype for p in network.compute.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(b.dtype == torch.float32 for b in network.compute.buffers() if b.is_floating_point())
    twin = copy.deepcopy(network.compute)
    single = []
    for scale in (1.0, 1e-4):
        twin.zero_grad()
        (twin(input_ids=tokens).logits.float().square().mean() * scale).backward()
        single.append([p.grad.float() for p in twin.parameters()])
        (network.compute(input_ids=tokens).logits.float().square().mean() * scale).backward()
    assert all(p.grad is None for p in network.compute.parameters())
    lost = 0
    for own, first, second in zip(model.parameters(), *single, strict=True):
        assert own.grad.dtype == torch.float32
        assert torch.equal(own.grad, first + second)
        lost += int(((first.bfloat16() + second.bfloat16()).float() != first + second).sum())
    assert lost  # a sum in bf16 would have dropped the small pass somewhere


def test_the_copy_follows_the_weights_and_lends_itself_to_others():
    model, other = qwen3(), qwen3()
    network, tokens = Network(model, "bf16"), torch.arange(1, 7)[None]
    with torch.no_grad():
        for parameter in (*model.parameters(), *other.parameters()):
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
        next(other.parameters()).mul_(2)
    before = network.compute(input_ids=tokens).logits.detach()
    network.sync()
    after = network.compute(input_ids=tokens).logits.detach()
    assert not torch.equal(before, after)
    with network.swapped_weights(other) as held:
        assert held is network.compute
        lent = held(input_ids=tokens).logits.detach()
    assert not torch.equal(lent, after)
    assert torch.equal(network.compute(input_ids=tokens).logits, after)


def test_an_update_in_bf16_is_near_the_one_in_fp32():
    plain = config()
    low = dataclasses.replace(plain, model=dataclasses.replace(plain.model, precision="bf16"))
    pieces = collected(rlp(qwen3(), plain), WINDOWS, 1).microbatches
    exact, half = (torch.cat([g.flatten() for g in update(rlp(qwen3(), some), pieces)]) for some in (plain, low))
    assert not torch.equal(exact, half)
    assert float(torch.nn.functional.cosine_similarity(exact, half, dim=0)) > 0.98
