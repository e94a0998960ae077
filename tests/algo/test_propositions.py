"""Propositions and estimators, on models small enough to enumerate every thought by plain one-row forwards."""

from collections import Counter
from typing import Any

import pytest
import torch

from forethought.algo.rewards import information_gain
from forethought.config import Method
from forethought.data.positions import ThoughtFormat, at_positions, make_generator
from forethought.models.compute_copy import Teacher
from forethought.models.logprobs import no_think_logp
from forethought.rollout import Thoughts, draw_noise
from forethought.rollout.native import NativeEngine
from helpers.enumerate import CLOSE, FORM, OPEN, VOCAB, Enumerated, every_thought, expected_group_gradient, tiny
from helpers.models import (
    assert_close,
    closed_by_force,
    gradients,
    patient,
    plain_logits,
    plain_targets,
    window,
)
from helpers.rewards import inputs

TWO = ThoughtFormat(before=(), after=(), open=(OPEN,), close=(CLOSE, 1), bos=None, pad=0)


def every_next(model: Any, tokens: list[int]) -> torch.Tensor:
    return plain_logits(model, tokens)[-1].detach().log_softmax(-1)


FORMATS = pytest.mark.parametrize(
    ("form", "count"),
    [(FORM, 84), (TWO, 100), (patient(FORM, 2), 4 * 4 * 5), (patient(TWO, 2), 3 * 3 * 5)],
    ids=["one-token close", "two-token close", "one-token close, patient", "two-token close, patient"],
)


@FORMATS
def test_probabilities_of_all_thoughts_sum_to_one(form: ThoughtFormat, count: int):
    thoughts = every_thought(tiny(), [0, 1, OPEN], form, limit=3, temperature=0.7)
    assert len({tuple(one.thought) for one in thoughts}) == len(thoughts) == count
    assert sum(float(one.probability.detach()) for one in thoughts) == pytest.approx(1, abs=1e-6)


@FORMATS
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_engine_samples_the_enumerated_distribution(form: ThoughtFormat, count: int, temperature: float):
    model = tiny()
    thoughts = every_thought(model, [0, 1, OPEN], form, limit=3, temperature=temperature)
    assert len(thoughts) == count
    engine, draws = NativeEngine(model, form, Method(temperature=temperature, thought_length=3)), 20_000
    positions = at_positions([window(0, 1, 2)], [[2]], horizon=1)
    sampled = engine.sample(positions, torch.rand(1, draws, 3, generator=make_generator(7)))
    seen = Counter(tuple(row[real].tolist()) for row, real in zip(sampled.tokens[0], sampled.mask[0], strict=True))
    expected = {tuple(one.thought): float(one.probability.detach()) * draws for one in thoughts}
    assert set(seen) <= set(expected)
    common = [key for key, number in expected.items() if number >= 5]
    rest = draws - sum(seen[key] for key in common), draws - sum(expected[key] for key in common)
    chi2 = sum((seen[key] - expected[key]) ** 2 / expected[key] for key in common) + (rest[0] - rest[1]) ** 2 / rest[1]
    freedom = len(common)
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def rewards_of(model: Any, teacher: Any, context: list[int], thought: Enumerated, target: int) -> torch.Tensor:
    """r(c) through the library's own reward and teacher score, with evidence from a plain forward."""
    evidence = plain_targets(model, [*context, OPEN, *thought.closed], [target]).detach().float()
    shape = torch.ones(1, 1, len(thought.thought), dtype=torch.bool)
    thoughts = Thoughts(
        tokens=torch.tensor(thought.thought)[None, None],
        mask=shape,
        closed=torch.tensor([[thought.closed is thought.thought]]),
        logp=thought.logp.detach().float()[None, None],
        evidence=evidence[None, None],
        hit=torch.zeros(1, 1, 1, dtype=torch.bool),
    )
    with torch.no_grad():
        nothink = no_think_logp(teacher, at_positions([window(*context, target)], [[len(context)]], 1), 512)[0]
    total = information_gain(inputs(thoughts, nothink)).total
    assert total is not None
    return total[0, 0]


def test_proposition_1_expected_reward_is_the_reduction_of_cross_entropy():
    model, teacher, context = tiny(), tiny(seed=1), [0, 2, 1]
    truth = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.double)
    for thought in every_thought(model, [*context, OPEN], FORM, limit=2)[::5]:
        expected = sum(float(truth[x]) * rewards_of(model, teacher, context, thought, x) for x in range(VOCAB))
        without = -(truth * every_next(teacher, context)).sum()
        within = -(truth * every_next(model, [*context, OPEN, *thought.closed])).sum()
        assert float(expected) == pytest.approx(float(without - within), abs=1e-5)
        assert abs(float(expected)) > 1e-2


def test_proposition_2_mean_evidence_is_a_lower_bound():
    model, context = tiny(), [0, 2, 1]
    thoughts = every_thought(model, [*context, OPEN], FORM, limit=2)
    weights = torch.stack([one.probability.detach() for one in thoughts])
    for target in range(VOCAB):
        evidence = engine_evidence(model, context, thoughts, target)
        mean, marginal = (weights * evidence).sum(), (weights * evidence.exp()).sum().log()
        assert mean < marginal - 1e-5


def test_proposition_2_is_tight_when_the_thought_is_ignored():
    model, context = tiny(), [0, 2, 1]
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    thoughts = every_thought(model, [*context, OPEN], FORM, limit=2)
    weights = torch.stack([one.probability.detach() for one in thoughts])
    assert weights.std() > 1e-3
    evidence = engine_evidence(model, context, thoughts, target=2)
    mean, marginal = (weights * evidence).sum(), (weights * evidence.exp()).sum().log()
    assert float(mean) == pytest.approx(float(marginal), abs=1e-6)


def engine_evidence(model: Any, context: list[int], thoughts: list[Enumerated], target: int) -> torch.Tensor:
    """S_pred of every thought as the engine reads it: noise that makes the sampler draw just these thoughts."""
    noise = torch.zeros(1, len(thoughts), 2)
    for i, one in enumerate(thoughts):
        for u, token in enumerate(one.thought):
            logits = plain_logits(model, [*context, OPEN, *one.thought[:u]])[-1].detach()
            if u == 0:
                logits[CLOSE] = -torch.inf
            share = logits.softmax(-1)
            noise[0, i, u] = float(share[:token].sum() + share[token] / 2)
    positions = at_positions([window(*context, target)], [[len(context)]], horizon=1)
    sampled = NativeEngine(model, FORM, Method(temperature=1.0, thought_length=2)).sample(positions, noise)
    assert [row[real].tolist() for row, real in zip(sampled.tokens[0], sampled.mask[0], strict=True)] == [
        one.thought for one in thoughts
    ]
    return sampled.evidence[0, :, 0].double()


def test_proposition_3_mean_token_reward_is_the_per_token_gain_of_the_sequence():
    model, tokens = tiny(), [0, 2, 1, 1, 2, 0]
    teacher = Teacher(tiny(seed=1), 0.9).model
    places = list(range(1, len(tokens)))
    positions = at_positions([window(*tokens)], [places], horizon=1)
    noise = draw_noise((1, 2), [make_generator(0, i) for i in places])
    sampled = NativeEngine(model, FORM, Method(temperature=1.0, thought_length=2)).sample(positions, noise)
    rewards = information_gain(inputs(sampled, no_think_logp(teacher, positions, 512)[0])).total
    assert rewards is not None
    with_thoughts, without = 0.0, -float(plain_targets(teacher, tokens[:1], tokens[1:]).sum())
    for i, t in enumerate(places):
        thought = closed_by_force(sampled.tokens[i, 0][sampled.mask[i, 0]].tolist(), FORM)
        with_thoughts -= float(plain_targets(model, [*tokens[:t], OPEN, *thought], [tokens[t]]).detach())
    gain = (without - with_thoughts) / len(places)
    assert float(rewards.mean()) == pytest.approx(gain, abs=1e-5)
    assert abs(gain) > 1e-2


@pytest.mark.parametrize("limit", [2, 3])
def test_group_estimator_has_exactly_this_expectation(limit):
    """E[gradient] = -sum_c pi(c) (S(c) - E[S]) (1/|c|) grad log pi(c), whatever the lengths."""
    model, context, target = tiny(), [0, 2, 1], 2
    thoughts = every_thought(model, [*context, OPEN], FORM, limit)
    chance = torch.stack([one.probability for one in thoughts])
    lengths = torch.tensor([len(one.thought) for one in thoughts])
    scores = torch.stack(
        [plain_targets(model, [*context, OPEN, *one.closed], [target])[0] for one in thoughts]
    ).detach()
    logp = torch.stack([one.logp.sum() for one in thoughts])
    centred = scores - (chance * scores).sum().detach()
    exact = gradients(model, -(chance.detach() * centred / lengths * logp).sum())
    assert_close(expected_group_gradient(model, context, thoughts, scores), exact)
    baseline = gradients(model, (chance.detach() / lengths * logp).sum())
    free = max(float(one.abs().max()) for one in baseline) < 1e-5
    assert free == (limit == 2)  # where lengths differ, E[(1/|c|) grad log pi] is not zero: a baseline is not free


def test_group_estimator_is_the_policy_gradient_when_lengths_are_equal():
    """With L = 2 every thought has two tokens: E[gradient] = -(1/2) grad E_c[S(c)], S held constant."""
    model, context, target = tiny(), [0, 2, 1], 2
    thoughts = every_thought(model, [*context, OPEN], FORM, limit=2)
    assert {len(one.thought) for one in thoughts} == {2}
    scores = torch.stack(
        [plain_targets(model, [*context, OPEN, *one.closed], [target])[0] for one in thoughts]
    ).detach()
    expected_score = sum(one.probability * score for one, score in zip(thoughts, scores, strict=True))
    exact = gradients(model, -expected_score / 2)
    assert_close(expected_group_gradient(model, context, thoughts, scores), exact)
