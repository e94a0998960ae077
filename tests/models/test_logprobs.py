import math

import pytest
import torch

from forethought.config import Method
from forethought.data.positions import at_positions, make_generator
from forethought.models.logprobs import (
    ScoringOptions,
    ThoughtBatch,
    log_probabilities,
    mask_tokens,
    no_think_entropy,
    no_think_logp,
    no_think_scores,
    position_ids,
    thought_logp,
)
from forethought.rollout import draw_noise
from forethought.rollout.native import NativeEngine
from helpers.models import (
    FORM,
    LONG,
    MODELS,
    closed_by_force,
    plain_logits,
    plain_targets,
    plain_thought,
    qwen3,
    window,
)

WINDOWS = [window(5, 6, 7, 8, 9, 10, 11, 5, 6), window(9, 8, 5, 7), window(11, 8, 10, 5, 6, 6)]
POSITIONS = [[1, 4, 6], [1], [2, 3]]
SCORING = [
    ScoringOptions(temperature=0.8, tokens=tokens, shared=shared)
    for tokens in (10**6, 40, 1)
    for shared in (True, False)
]


def test_log_probabilities_by_hand():
    logits = torch.tensor([[0.0, 1.0], [2.0, 2.0]]).log()
    assert log_probabilities(logits + 5, torch.tensor([1, 0])).tolist() == pytest.approx([0.0, -0.6931472])
    cold = log_probabilities(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), temperature=0.5)
    assert float(cold) == pytest.approx(-2.126928)


def test_log_probabilities_of_many_rows_are_those_of_each_row():
    logits = torch.randn(3, 3000, 7, generator=make_generator(0))
    tokens = torch.randint(7, (3, 3000), generator=make_generator(1))
    wanted = (logits / 0.7).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    assert torch.allclose(log_probabilities(logits, tokens, 0.7), wanted, atol=1e-6)


def test_log_probabilities_are_float32_whatever_the_logits():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for dtype in (torch.bfloat16, torch.float64):
        logp = log_probabilities(logits.to(dtype), torch.tensor([1]))
        assert logp.dtype == torch.float32
        assert float(logp) == pytest.approx(-0.4076059, abs=1e-6)


def test_mask_token_takes_one_token_away_and_leaves_the_argument():
    logits = torch.zeros(2, 3)
    assert mask_tokens(logits, torch.tensor([1])).softmax(-1).tolist() == [[0.5, 0.0, 0.5]] * 2
    assert mask_tokens(logits, torch.tensor([0, 1, 3])).softmax(-1).tolist() == [[0.0, 0.0, 1.0]] * 2  # 3: no such
    assert mask_tokens(logits, torch.tensor([1]), torch.tensor([False, True])).softmax(-1)[1].tolist() == [
        0.5,
        0.0,
        0.5,
    ]
    assert mask_tokens(logits, torch.tensor([1]), torch.tensor([False, True]))[0].tolist() == [0.0] * 3
    assert (
        mask_tokens(logits, torch.tensor([1]), torch.tensor([False, False])).tolist()
        == logits.tolist()
        == [[0.0] * 3] * 2
    )


def test_position_ids_count_real_tokens():
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


@pytest.mark.parametrize("form", [FORM, LONG], ids=["short", "long"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "copied"])
@pytest.mark.parametrize("name", MODELS)
def test_engine_and_trainer_and_plain_forward_agree_on_thoughts(name, form, shared):
    """A cache, a pass over shared or copied prefixes in chunks of any size, and one row alone give the same numbers."""
    model, temperature = MODELS[name](), 0.8
    positions = at_positions(WINDOWS, POSITIONS, horizon=3)
    noise = draw_noise((3, 6), [make_generator(1, i) for i in range(len(positions))])
    thoughts = NativeEngine(model, form, Method(temperature=temperature), shared=shared).sample(positions, noise)
    assert not thoughts.closed.all()
    prompts = [form.prompt_tokens(context) for context in positions.contexts()]
    rows = ThoughtBatch.from_positions(form, positions, thoughts.tokens, thoughts.mask)
    assert [rows.prompts(form)[i] for i in rows.position_index.tolist()] == [one for one in prompts for _ in range(3)]
    with torch.no_grad():
        trained = [thought_logp(model, form, rows, reading) for reading in SCORING if reading.shared == shared]
        targets = positions.targets()
        for i, prompt in enumerate(prompts):
            for g in range(3):
                thought = thoughts.tokens[i, g][thoughts.mask[i, g]].tolist()
                plain = plain_thought(model, prompt, thought, temperature, form.close[0])
                width = len(thought)
                assert torch.allclose(thoughts.logp[i, g, :width], plain, atol=1e-5)
                for scored in trained:
                    assert torch.allclose(scored[3 * i + g, :width], plain, atol=1e-5)
                after = prompt + closed_by_force(thought, form)
                evidence = plain_targets(model, after, targets[i].tolist())
                assert torch.allclose(thoughts.evidence[i, g], evidence, atol=1e-5)
                likeliest = plain_logits(model, after + targets[i].tolist())[len(after) - 1 : -1].argmax(-1)
                assert thoughts.hit[i, g].tolist() == (likeliest == targets[i]).tolist()
    assert all((scored[~rows.mask] == 0).all() for scored in trained)
    assert (thoughts.logp[~thoughts.mask] == 0).all()


@pytest.mark.parametrize("reading", SCORING, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_one_padded_row_scores_as_it_does_alone(name, reading):
    """A row alone, or beside one of another document and length, keeps the padding of the batch it was cut from."""
    model = MODELS[name]()
    tokens, mask = torch.tensor([[6, 7, 0, 0], [8, 9, 10, 11]]), torch.tensor([[True, True, False, False], [True] * 4])
    alone = [
        plain_thought(model, [5, 6, 3], [6, 7], 0.8, 4),
        plain_thought(model, [7, 8, 9, 10, 11, 5, 3], [8, 9, 10, 11], 0.8, 4),
    ]
    for pick in ([0], [1], [0, 1]):
        rows = ThoughtBatch(
            documents=[[5, 6], [7, 8, 9, 10, 11, 5]],
            prefix_lengths=[[2], [6]],
            position_index=torch.tensor(pick),
            tokens=tokens[pick],
            mask=mask[pick],
        )
        scored = thought_logp(model, FORM, rows, reading)
        for row, i in zip(scored, pick, strict=True):
            assert torch.allclose(row[mask[i]], alone[i], atol=1e-5)
            assert not row[~mask[i]].any()


@pytest.mark.parametrize("tokens", [512, 18, 1])
@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_plain_evidence_is_that_of_a_plain_forward(name, horizon, tokens):
    model = MODELS[name]()
    positions = at_positions(WINDOWS, POSITIONS, horizon)
    with torch.no_grad():
        evidence, hit = no_think_logp(model, positions, tokens)
        assert evidence.shape == (6, horizon)
        for i, (context, targets) in enumerate(zip(positions.contexts(), positions.targets().tolist(), strict=True)):
            assert torch.allclose(evidence[i], plain_targets(model, context, targets), atol=1e-5)
            likeliest = plain_logits(model, context + targets)[len(context) - 1 : -1].argmax(-1)
            assert hit[i].tolist() == (likeliest == torch.tensor(targets)).tolist()


@pytest.mark.parametrize("tokens", [512, 1])
@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_entropy_is_that_of_the_plain_next_token_distribution(name, horizon, tokens):
    model, positions = MODELS[name](), at_positions(WINDOWS, POSITIONS, horizon)
    with torch.no_grad():
        *scores, entropy = no_think_scores(model, positions, tokens)
        for mine, plain in zip(scores, no_think_logp(model, positions, tokens), strict=True):
            assert torch.equal(mine, plain)
        rows = [plain_logits(model, context)[-1].double().log_softmax(-1) for context in positions.contexts()]
    wanted = [-sum(math.exp(logp) * logp for logp in row.tolist()) for row in rows]
    assert entropy.tolist() == pytest.approx(wanted, abs=1e-5)
    assert torch.equal(entropy, no_think_entropy(model, positions, tokens))


@pytest.mark.parametrize("horizon", [1, 2])
def test_what_stands_behind_the_targets_changes_nothing(horizon):
    """Not the rest of the window, nor the windows beside it, nor what shorter rows are filled up with."""
    model = qwen3()
    ends = [places[-1] + horizon for places in POSITIONS]
    others = [window(*one.tokens[:end], *[9, 4, 7, 7] * 3) for one, end in zip(WINDOWS, ends, strict=True)]
    with torch.no_grad():
        evidence, hit = no_think_logp(model, at_positions(WINDOWS, POSITIONS, horizon), 512)
        changed = no_think_logp(model, at_positions(others, POSITIONS, horizon), 512)
        assert torch.equal(evidence, changed[0]) and torch.equal(hit, changed[1])
        alone = [
            no_think_logp(model, at_positions([one], [some], horizon), 512)
            for one, some in zip(WINDOWS, POSITIONS, strict=True)
        ]
    assert torch.allclose(torch.cat([one[0] for one in alone]), evidence, atol=1e-6)
    assert torch.equal(torch.cat([one[1] for one in alone]), hit)
