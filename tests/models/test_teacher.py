import dataclasses

import pytest
import torch

from forethought.config import Model
from forethought.models.teacher import Teacher
from helpers.models import WINDOWS, collected, config, qwen3, rlp


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
