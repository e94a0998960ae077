import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forethought.algo.objective import (
    batch_advantages,
    clipped_share,
    clipped_surrogate,
    group_advantages,
    importance_weight,
    kl_to_reference,
    next_token_loss,
    over_thought,
    scale_by_std,
)

CLIP = (0.2, 0.3)
NATS = st.floats(-20, 20, width=32)


def groups(size: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(NATS, min_size=size, max_size=size), min_size=1, max_size=4)


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert group_advantages(rewards).tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


@given(st.integers(2, 9).flatmap(groups))
def test_group_advantages_are_a_leave_one_out_baseline_and_sum_to_zero(rewards):
    values = torch.tensor(rewards)
    advantages = group_advantages(values)
    others = (values.sum(dim=1, keepdim=True) - values) / (values.shape[1] - 1)
    assert torch.allclose(advantages, values - others, atol=1e-4)
    assert advantages.sum(dim=1).abs().max() < 1e-4


def test_group_advantages_of_the_kept_by_hand():
    rewards = torch.tensor([[1.0, 100.0, 3.0, 5.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    kept = torch.tensor([[True, False, True, True], [False, True, False, False], [False] * 4])
    wanted = [[-3.0, 0.0, 0.0, 3.0], [0.0] * 4, [0.0] * 4]
    assert group_advantages(rewards, kept).tolist() == wanted
    assert torch.equal(group_advantages(rewards, torch.ones_like(kept)), group_advantages(rewards))


def test_group_advantages_refuse_one_thought():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        group_advantages(torch.zeros(3, 1))


def test_advantages_carry_no_gradient():
    rewards = torch.tensor([[1.0, 2.0]], requires_grad=True)
    kept = torch.tensor([[True, True]])
    for advantages in (group_advantages(rewards), group_advantages(rewards, kept), batch_advantages(rewards)):
        assert not advantages.requires_grad
        assert not scale_by_std(advantages, rewards).requires_grad


def test_batch_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2.0], [3.0, 10.0]])
    assert batch_advantages(rewards).tolist() == [[-3.0, -2.0], [-1.0, 6.0]]
    kept = torch.tensor([[True, True], [True, False]])
    assert batch_advantages(rewards, kept).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert batch_advantages(rewards, torch.zeros_like(kept)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_scale_by_std_by_hand():
    rewards = torch.tensor([[1.0, 3.0]])
    scaled = scale_by_std(group_advantages(rewards), rewards)
    assert scaled.tolist() == [pytest.approx([-2 / (math.sqrt(2) + 1e-4), 2 / (math.sqrt(2) + 1e-4)])]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -2.6, 0.0),  # clipped above
        (1.25, 2.0, -2.5, -2.0),
        (0.5, 2.0, -1.0, -2.0),  # a bad ratio with good credit is pulled back
        (1.5, -2.0, 3.0, 2.0),  # a bad ratio with bad credit is pulled back
        (0.9, -2.0, 1.8, 2.0),
        (0.5, -2.0, 1.6, 0.0),  # clipped below
    ],
)
def test_clipped_surrogate_in_every_quadrant(ratio, advantage, loss, slope):
    ratios = torch.tensor([[ratio]], requires_grad=True)
    mask = torch.tensor([[True]])
    value = clipped_surrogate(ratios, torch.tensor([advantage]), mask, CLIP)
    assert value.tolist() == [pytest.approx(loss)]
    value.sum().backward()
    assert ratios.grad is not None
    assert ratios.grad.tolist() == [[pytest.approx(slope)]]
    assert bool(clipped_share(ratios, torch.tensor([advantage]), mask, CLIP)) == (slope == 0)


def test_importance_weights_by_hand_and_what_they_multiply():
    old = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    weight = importance_weight(old, torch.tensor([[-1.0, -2.5, -5.0]]), 2.0)
    assert weight[0].tolist() == pytest.approx([1.0, math.exp(0.5), 2.0])
    assert not weight.requires_grad
    ratio, mask = torch.ones(1, 3), torch.tensor([[True, True, False]])
    loss = clipped_surrogate(ratio, torch.tensor([4.0]), mask, CLIP, weight)
    assert float(loss) == pytest.approx(-4.0 * (1 + math.exp(0.5)) / 2)


def test_clipped_surrogate_is_a_mean_inside_each_thought():
    ratio = torch.tensor([[1.0, 1.1, 0.9], [1.2, 7.0, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = clipped_surrogate(ratio, torch.tensor([3.0, -1.0]), mask, CLIP)
    assert loss.tolist() == pytest.approx([-3.0, 1.2])
    loss.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [pytest.approx([-1.0, -1.0, -1.0]), [1.0, 0.0, 0.0]]
    assert clipped_share(ratio, torch.tensor([1.0, 1.0]), mask, CLIP).tolist() == [[False] * 3, [False] * 3]


def test_over_thought_ignores_masked_numbers_that_are_not_finite():
    values = torch.tensor([[1.0, 3.0, math.nan], [math.inf, math.nan, 1.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert over_thought(values, mask).tolist() == [2.0, 0.0]


def test_kl_by_hand():
    logp = torch.tensor([[-2.0, -1.0, 0.0]], requires_grad=True)
    reference = torch.tensor([[-2.0 + math.log(2), -1.0, 50.0]])
    mask = torch.tensor([[True, True, False]])
    kl = kl_to_reference(logp, reference, mask)
    assert kl.tolist() == [pytest.approx((2 - math.log(2) - 1) / 2)]
    kl.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [pytest.approx([-0.5, 0.0, 0.0])]


def test_kl_estimator_is_the_kl_in_expectation():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    estimates = kl_to_reference(p.log()[:, None], q.log()[:, None], torch.ones(3, 1, dtype=torch.bool))
    assert float((p * estimates).sum()) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)


@given(st.lists(st.tuples(NATS, NATS), min_size=1, max_size=8))
def test_kl_estimator_is_never_negative(pairs):
    logp, reference = torch.tensor(pairs).T
    mask = torch.ones(1, len(pairs), dtype=torch.bool)
    assert float(kl_to_reference(logp[None], reference[None], mask)) >= 0


def test_next_token_loss_by_hand():
    logp = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, -8.0, -16.0]])
    mask = torch.tensor([[True, True, False], [False, True, False]])
    assert float(next_token_loss(logp, mask)) == 11.0
