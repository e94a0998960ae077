"""fp32 weights, the bf16 copy that computes for them, and the EMA teacher."""

import copy
import dataclasses

import pytest
import torch

from forethought.config import Model
from forethought.models.compute_copy import Network, Teacher
from helpers.models import WINDOWS, collected, config, qwen3, rlp, update


def test_fp32_computes_with_the_weights_themselves():
    model, other = qwen3(), qwen3()
    network = Network(model, "fp32")
    assert network.model is network.weights is model
    with network.swapped_weights(other) as held:
        assert held is other


def test_bf16_gradients_of_several_passes_add_up_in_fp32_and_bf16_keeps_none():
    model = qwen3()
    network, tokens = Network(model, "bf16"), torch.arange(1, 7)[None]
    assert {p.dtype for p in network.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(b.dtype == torch.float32 for b in network.model.buffers() if b.is_floating_point())
    twin = copy.deepcopy(network.model)
    single = []
    for scale in (1.0, 1e-4):
        twin.zero_grad()
        (twin(input_ids=tokens).logits.float().square().mean() * scale).backward()
        single.append([p.grad.float() for p in twin.parameters()])
        (network.model(input_ids=tokens).logits.float().square().mean() * scale).backward()
    assert all(p.grad is None for p in network.model.parameters())
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
    before = network.model(input_ids=tokens).logits.detach()
    network.sync()
    after = network.model(input_ids=tokens).logits.detach()
    assert not torch.equal(before, after)
    with network.swapped_weights(other) as held:
        assert held is network.model
        lent = held(input_ids=tokens).logits.detach()
    assert not torch.equal(lent, after)
    assert torch.equal(network.model(input_ids=tokens).logits, after)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_an_update_in_bf16_is_near_the_one_in_fp32(weight: float):
    plain = config(prediction_weight=weight)
    low = dataclasses.replace(plain, model=dataclasses.replace(plain.model, precision="bf16"))
    pieces = collected(rlp(qwen3(), plain), WINDOWS, 1).microbatches
    exact, half = (torch.cat([g.flatten() for g in update(rlp(qwen3(), some), pieces)]) for some in (plain, low))
    assert not torch.equal(exact, half)
    assert float(torch.nn.functional.cosine_similarity(exact, half, dim=0)) > 0.98


def test_teacher_starts_as_a_copy_that_learns_nothing():
    model = qwen3()
    teacher = Teacher(model, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(teacher.model.parameters(), model.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not torch.equal(next(teacher.model.parameters()), next(model.parameters()))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_average_follows_its_closed_form(tied):
    """phi_n = tau^n theta_0 + (1 - tau) sum_k tau^(n-k) theta_k, here with theta_k = theta_0 + k delta."""
    model, decay, steps = qwen3(tied=tied), 0.97, 200
    assert len({id(one) for one in model.parameters()}) == len(list(model.parameters()))
    teacher = Teacher(model, decay)
    start = [parameter.detach().double() for parameter in model.parameters()]
    delta = 0.01 * torch.randn(len(start), generator=torch.Generator().manual_seed(0)).double()
    for k in range(1, steps + 1):
        with torch.no_grad():
            for parameter, first, move in zip(model.parameters(), start, delta, strict=True):
                parameter.copy_(first + k * move)
        teacher.update(model)
    travelled = sum((1 - decay) * decay ** (steps - k) * k for k in range(1, steps + 1))
    for averaged, first, move in zip(teacher.model.parameters(), start, delta, strict=True):
        assert torch.allclose(averaged.double(), first + travelled * move, atol=1e-5)
        assert averaged.dtype == torch.float32
    assert (teacher.model.lm_head.weight is teacher.model.model.embed_tokens.weight) == tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_weights_and_teacher_move_under_bf16_at_a_small_learning_rate():
    """In bf16 storage neither would: one step is 1e-6, and the teacher takes a thousandth of it."""
    settings = dataclasses.replace(config(freeze_teacher=False), model=Model(precision="bf16", device="cpu"))
    model = qwen3(scale=0.0)
    method = rlp(model, settings)
    assert method.teacher is not None
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    for step in range(1, 9):
        optimizer.zero_grad()
        for piece in collected(method, WINDOWS, step).microbatches:
            method.forward_backward(piece)
        optimizer.step()
        method.network.sync()
        method.after_step()
    count = sum(one.numel() for one in start)
    for network, least in ((model, 0.95), (method.teacher.model, 0.75)):
        parameters = list(network.parameters())
        assert all(parameter.dtype == torch.float32 for parameter in parameters)
        moved = sum(int((now != then).sum()) for now, then in zip(parameters, start, strict=True))
        assert moved / count > least
    for network, most in ((model, 1e-5), (method.teacher.model, 2e-7)):
        gaps = [float((now.detach() - then).abs().max()) for now, then in zip(network.parameters(), start, strict=True)]
        assert max(gaps) < most


def test_a_frozen_teacher_stays():
    model = qwen3()
    for freeze in (False, True):
        method = rlp(model, config(freeze_teacher=freeze))
        assert method.teacher is not None
        before = next(method.teacher.model.parameters()).clone()
        with torch.no_grad():
            next(model.parameters()).add_(1)
        method.after_step()
        assert torch.equal(next(method.teacher.model.parameters()), before) == freeze
