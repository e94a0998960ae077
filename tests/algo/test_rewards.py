import math

import pytest
import torch

from forethought.algo.policy_gradient import compute_advantages
from forethought.algo.rewards import (
    Rewards,
    apply_unclosed_penalty,
    as_rewards,
    discounted,
    information_gain,
    random_reward,
)
from forethought.config import Method, UserError
from forethought.rollout import Thoughts
from helpers.models import WINDOWS, assert_close, collected, config, qwen3, rlp, update
from helpers.rewards import inputs


def thoughts(evidence: list[list[list[float]]], closed: list[list[bool]] | None = None) -> Thoughts:
    scores = torch.tensor(evidence)
    batch, group, _ = scores.shape
    return Thoughts(
        tokens=torch.full((batch, group, 1), 5),
        mask=torch.ones(batch, group, 1, dtype=torch.bool),
        closed=torch.ones(batch, group, dtype=torch.bool) if closed is None else torch.tensor(closed),
        logp=torch.zeros(batch, group, 1),
        evidence=scores,
        hit=torch.zeros(scores.shape, dtype=torch.bool),
    )


def test_information_gain_by_hand():
    """The target has probability 1/2 and 1/8 with the two thoughts, 1/4 without: gains of ln 2 and -ln 2."""
    sampled = thoughts([[[math.log(1 / 2)], [math.log(1 / 8)]]])
    rewards = information_gain(inputs(sampled, [[math.log(1 / 4)]]))
    assert rewards.total is not None
    assert rewards.total.tolist() == [pytest.approx([math.log(2), -math.log(2)])]


def test_information_gain_over_a_discounted_horizon_by_hand():
    sampled = thoughts([[[-1.0, -2.0, -4.0]], [[-1.0, 0.0, 0.0]]])
    nothink = [[-2.0, -2.0, -8.0], [0.0, 0.0, 0.0]]
    rewards = information_gain(inputs(sampled, nothink, Method(discount=0.5)))
    assert rewards.value.tolist() == [[-3.0], [-1.0]]
    assert rewards.shift is not None
    assert rewards.shift.tolist() == [-5.0, 0.0]
    assert rewards.total is not None
    assert rewards.total.tolist() == [[2.0], [-1.0]]


@pytest.mark.parametrize(("discount", "wanted"), [(1.0, -7.0), (0.5, -3.0), (0.0, -1.0)])
def test_discount_by_hand(discount, wanted):
    assert float(discounted(torch.tensor([-1.0, -2.0, -4.0]), discount)) == wanted


def test_without_a_teacher_the_total_is_not_known():
    rewards = information_gain(inputs(thoughts([[[-1.0], [-2.0]]])))
    assert rewards.value.tolist() == [[-1.0, -2.0]]
    assert rewards.shift is rewards.total is None


def test_random_control_knows_nothing_of_the_evidence():
    one = random_reward(inputs(thoughts([[[0.0]] * 64] * 64)))
    other = random_reward(inputs(thoughts([[[-9.0]] * 64] * 64), [[5.0]] * 64))
    assert torch.equal(one.value, other.value)
    assert one.total is not None
    assert torch.equal(one.total, one.value)
    assert abs(float(one.value.mean())) < 0.06
    assert abs(float(one.value.std()) - 1) < 0.06


def test_random_control_does_not_depend_on_how_a_step_is_split():
    sampled = thoughts([[[0.0]] * 5] * 6)
    whole = random_reward(inputs(sampled)).value
    parts = [[0], [4, 1, 3], [2, 5]]  # of three ranks
    found = {}
    for some in parts:
        value = random_reward(inputs(thoughts([[[0.0]] * 5] * len(some)), global_indices=some)).value
        found |= dict(zip(some, value, strict=True))
    assert torch.equal(torch.stack([found[i] for i in range(6)]), whole)


def compare(value, shift, closed=None, **method):
    """Advantages of rewards that are given by hand, as RLP compares them."""
    settings = config(group=len(value[0]), **method)
    rewards = Rewards(value=torch.tensor(value), shift=torch.tensor(shift))
    sampled = thoughts([[[0.0]] * len(value[0])] * len(value), closed)
    advantages, kept = compute_advantages(rewards, sampled.closed, settings)
    return advantages.tolist(), kept.tolist()


VALUE, SHIFT = [[-1.0, -4.0, -7.0], [-1.0, -1.0, -4.0]], [-3.0, -2.0]  # rewards 2 -1 -4 and 1 1 -2


def test_each_baseline_by_hand():
    assert compare(VALUE, SHIFT)[0] == [[4.5, 0.0, -4.5], [1.5, 1.5, -3.0]]
    assert compare(VALUE, SHIFT, baseline="batch")[0] == [[2.5, -0.5, -3.5], [1.5, 1.5, -1.5]]
    assert compare(VALUE, SHIFT, baseline="none")[0] == [[2.0, -1.0, -4.0], [1.0, 1.0, -2.0]]


def test_clamped_gains_by_hand():
    first, second = compare(VALUE, SHIFT, clamp_gain=True)[0]
    assert first == pytest.approx([2.0, -1.0, -1.0])
    assert second == pytest.approx([0.5, 0.5, -1.0])


def test_min_gain_leaves_out_whole_positions():
    advantages, kept = compare(VALUE, SHIFT, min_gain=1.5)
    assert advantages == [[4.5, 0.0, -4.5], [0.0, 0.0, 0.0]]
    assert kept == [[True] * 3, [False] * 3]


def test_min_gain_filters_by_the_gain_itself_not_by_the_clamped_one():
    losing = [[-9.0, -4.0, -7.0], [-1.0, -1.0, -4.0]]  # rewards -6 -1 -4 and 1 1 -2
    for clamp in (False, True):
        assert compare(losing, SHIFT, min_gain=-0.5, clamp_gain=clamp)[1] == [[False] * 3, [True] * 3]


def test_dropped_thoughts_are_no_ones_sibling():
    advantages, kept = compare(VALUE, SHIFT, [[True, False, True], [True, False, False]], unclosed="drop")
    assert advantages == [[6.0, 0.0, -6.0], [0.0, 0.0, 0.0]]
    assert kept == [[True, False, True], [True, False, False]]
    assert compare(VALUE, SHIFT, [[True, False, True]] * 2, unclosed="score")[0][0] == [4.5, 0.0, -4.5]


def test_scale_divides_by_the_standard_deviation_of_the_group():
    scaled = compare(VALUE, SHIFT, scale="std")[0]
    assert scaled[0] == pytest.approx([4.5 / 3.0001, 0.0, -4.5 / 3.0001])


def test_scale_leaves_out_dropped_thoughts():
    closed = [[True, False, True], [True, False, False]]
    scaled = compare(VALUE, SHIFT, closed, unclosed="drop", scale="std")[0]
    assert scaled[0] == pytest.approx([6 / (math.sqrt(18) + 1e-4), 0.0, -6 / (math.sqrt(18) + 1e-4)])
    assert scaled[1] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("option", [{"baseline": "batch"}, {"baseline": "none"}, {"min_gain": 0.0}])
def test_nan_is_not_filtered_out(option):
    advantages, _ = compare([[1.0, math.nan], [1.0, 2.0]], [0.0, 0.0], **option)
    assert any(map(math.isnan, advantages[0]))


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (torch.tensor([[0.0, math.nan], [math.inf, 1.0]]), "returned NaN or infinity for 2 of 4 thoughts"),
        (Rewards(value=torch.full((2, 2), -math.inf), shift=None), "returned NaN or infinity for 4 of 4 thoughts"),
        ([[0.0, 0.0]] * 2, "returned a list, must be a tensor"),
        (Rewards(value=torch.zeros(2, 3), shift=None), "returned shape"),
        (Rewards(value=torch.zeros(3, 2), shift=torch.zeros(3)), r"returned shape \(3,\), must be \(2,\)"),
        (Rewards(value=torch.zeros(2, 2), shift=torch.tensor([0.0, math.nan])), "returned NaN .* for 1 of 2 positions"),
    ],
)
def test_what_a_reward_may_not_return(found, text):
    given = inputs(thoughts([[[-1.0], [-2.0]]] * 2))
    with pytest.raises(UserError, match=rf"^method.reward = 'mine': {text}"):
        as_rewards(found, given, "mine")


def test_evidence_that_is_nan_is_not_the_rewards_fault():
    given = inputs(thoughts([[[math.nan], [-2.0]]]))
    assert as_rewards(information_gain(given), given, "auto").value.isnan().tolist() == [[True, False]]


def test_a_reward_without_a_shift_is_refused_where_it_is_needed():
    rewards = Rewards(value=torch.zeros(1, 2), shift=None)
    with pytest.raises(UserError, match="returned no shift"):
        compute_advantages(rewards, torch.ones(1, 2, dtype=torch.bool), config(baseline="none"))


def test_penalty_is_taken_from_unclosed_thoughts_only():
    closed = [[True, False], [False, False]]
    sampled = thoughts([[[-1.0], [-1.0]], [[-2.0], [-3.0]]], closed)
    options = Method(unclosed="penalize", unclosed_penalty=0.5)
    rewards = apply_unclosed_penalty(information_gain(inputs(sampled, [[-1.0], [-1.0]])), sampled.closed, options)
    assert rewards.total is not None
    assert rewards.total.tolist() == [[0.0, -0.5], [-1.5, -2.5]]


@pytest.mark.parametrize("option", [{"reward": "random"}, {"unclosed": "drop"}, {"baseline": "batch"}])
@pytest.mark.parametrize("prefix", ["shared", "replicated"])
def test_chunks_change_nothing_with(option, prefix):
    model, results, counts = qwen3(scale=0.1), [], []
    for tokens, rows in ((1, 4), (14, 8), (0, 16)):
        method = rlp(model, config(tokens=tokens, rows=rows, prefix=prefix, thought_length=9, **option))
        pieces = collected(method, WINDOWS, step=1).microbatches
        counts.append(len(pieces))
        results.append(update(method, pieces))
    assert counts == [4, 2, 1]
    assert_close(results[0], results[2])
    assert_close(results[1], results[2])
