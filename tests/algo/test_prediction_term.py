"""The prediction term: with it the update is the whole gradient of the expected reward, which autograd gives too."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import forethought
from forethought import trainer
from forethought.config import Method, UserError, load
from forethought.data.positions import ThoughtFormat, at_positions, make_generator
from forethought.models.logprobs import ThoughtBatch
from forethought.rollout.decoder import matching_prefix
from forethought.rollout.native import NativeEngine
from helpers.enumerate import FORM as TINY
from helpers.enumerate import OPEN, every_thought, microbatch, tiny
from helpers.models import (
    FORM,
    LONG,
    MERGED,
    MODELS,
    REPEATING,
    WINDOWS,
    assert_close,
    collected,
    config,
    gradients,
    patient,
    plain_logits,
    plain_targets,
    plain_thought,
    qwen3,
    read_through,
    rlp,
    update,
    window,
    written,
)

TWO = ThoughtFormat(before=(), after=(), open=(OPEN,), close=(4, 1), bos=None, pad=0)
SETTINGS = {"temperature": 1.0, "length_norm": "none", "prediction_weight": 1.0}


@pytest.mark.parametrize("form", [TINY, TWO, patient(TINY, 2)], ids=["one-token close", "two-token close", "patient"])
@pytest.mark.parametrize("horizon", [1, 2])
def test_both_terms_are_the_gradient_of_the_expected_evidence(form: ThoughtFormat, horizon: int):
    """Over all thoughts: sum_c pi(c) [(S(c) - b) grad log pi(c) + grad S(c)] = grad sum_c pi(c) S(c)."""
    model, context, targets = tiny(), [0, 2, 1], [2, 0][:horizon]
    method = rlp(model, config(horizon=horizon, discount=0.5, **SETTINGS), form)
    thoughts = every_thought(model, [*context, OPEN], form, limit=3)
    discount = torch.tensor([1.0, 0.5][:horizon], dtype=torch.double)
    scores = torch.stack([plain_targets(model, [*context, OPEN, *one.closed], targets) @ discount for one in thoughts])
    chance = torch.stack([one.probability for one in thoughts])
    wanted = gradients(model, chance @ scores)
    policy_alone = gradients(model, chance @ scores.detach())

    baseline = float((chance @ scores).detach()) + 0.3  # any baseline: the chances sum to one
    pulls = (chance * (scores - baseline)).detach().float()
    piece = microbatch(context, [one.thought for one in thoughts], pulls, scale=1.0)
    positions = at_positions([window(*context, *targets)], [[len(context)]], horizon)
    contents = [[form.content(one.thought, one.closed is one.thought) for one in thoughts]]
    tokens, mask = piece.batch.tokens[None], piece.batch.mask[None]
    batch = ThoughtBatch.from_positions(form, positions, tokens, mask).with_targets(form, positions, contents)
    piece = dataclasses.replace(piece, batch=batch, prediction_weight=chance.detach().float())
    got = [-one for one in update(method, [piece])]
    assert_close(got, wanted)
    assert max(float((one - other).abs().max()) for one, other in zip(wanted, policy_alone, strict=True)) > 1e-2
    terms = piece.terms()
    assert_close([-one for one in update(method, [terms["policy"]])], policy_alone)
    parts = [update(method, [term]) for term in terms.values()]
    assert_close([-sum(some) for some in zip(*parts, strict=True)], wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [FORM, LONG, MERGED, REPEATING], ids=["short", "long", "merged", "repeating"])
@pytest.mark.parametrize("prefix", ["shared", "replicated"])
@pytest.mark.parametrize("tokens", [0, 40, 1])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_step_adds_the_term_to_that_of_the_paper(name: str, tokens: int, prefix: Any, form: ThoughtFormat):
    model, weight = MODELS[name](), 0.3
    sizes = {"thought_length": 10, "positions": 2, "horizon": 2, "discount": 0.5}
    windows = [one for one in WINDOWS if len(one.tokens) > 3]
    paper = collected(rlp(model, config(tokens=tokens, prefix=prefix, **sizes), form), windows, 1).microbatches
    settings = config(tokens=tokens, prefix=prefix, prediction_weight=weight, **sizes)
    method = rlp(model, settings, form)
    record = method.collect(windows, 1)
    pieces = method.microbatches(record)
    losses, rows = [], [row for piece in paper for row in written(piece, form)]
    closed = record.thoughts.closed.flatten().tolist()
    targets = record.shard.positions.targets().repeat_interleave(4, 0).tolist()
    assert 0 < sum(closed) < len(closed) or form in (LONG, REPEATING)
    contexts = [context for context in record.shard.positions.contexts() for _ in range(4)]
    early = form.closing.early.tolist()
    for piece in paper:
        for advantage, (prompt, thought) in zip(piece.advantage, written(piece, form), strict=True):
            losses.append(-advantage * plain_thought(model, prompt, thought, 0.7, early).mean())
    for (prompt, thought), done, context, true in zip(rows, closed, contexts, targets, strict=True):
        read = [*prompt, *read_through(form.content(thought, done), form, context)]
        losses.append(-weight * plain_targets(model, read, true) @ torch.tensor([1.0, 0.5]))
    assert_close(update(method, pieces), gradients(model, *[loss / len(rows) for loss in losses]))


@pytest.mark.parametrize("form", [FORM, LONG, MERGED, REPEATING], ids=["short", "long", "merged", "repeating"])
@pytest.mark.parametrize(("tokens", "prefix"), [(0, "shared"), (40, "shared"), (1, "shared"), (40, "replicated")])
@pytest.mark.parametrize("name", ["qwen3", "nemotron_h"])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_distillation_predicts_what_the_teacher_would(
    share: float, name: str, tokens: int, prefix: Any, form: ThoughtFormat
):
    """A share of each target is the EMA teacher's distribution without a thought: its cross-entropy over all tokens."""
    model, weight = MODELS[name](), 0.3
    sizes = {"thought_length": 10, "positions": 2, "horizon": 2, "discount": 0.5, "prediction_weight": weight}
    windows = [one for one in WINDOWS if len(one.tokens) > 3]
    method = rlp(model, config(tokens=tokens, prefix=prefix, distillation=share, **sizes), form)
    assert method.teacher is not None
    teacher = method.teacher.model
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=make_generator(5)), alpha=0.1)
    record = method.collect(windows, 1)
    plain, _ = rlp(model, config(tokens=tokens, prefix=prefix, **sizes), form).teacher_scores(record.shard.positions, 1)
    pieces, losses = method.microbatches(record), []
    rows = [row for piece in pieces for row in written(piece, form)]
    closed = record.thoughts.closed.flatten().tolist()
    contexts = [context for context in record.shard.positions.contexts() for _ in range(4)]
    targets = record.shard.positions.targets().repeat_interleave(4, 0).tolist()
    for (prompt, thought), done, context, true in zip(rows, closed, contexts, targets, strict=True):
        read = [*prompt, *read_through(form.content(thought, done), form, context)]
        after = plain_logits(model, [*read, *true])[len(read) - 1 : -1].log_softmax(-1)
        without = plain_logits(teacher, [*context, *true])[len(context) - 1 : -1].detach().softmax(-1)
        text = after.gather(-1, torch.tensor(true)[:, None]).squeeze(-1)
        mean = (1 - share) * text + share * (without * after).sum(-1)
        losses.append(-weight * mean @ torch.tensor([1.0, 0.5]))
    got = update(method, [piece.terms()["prediction"] for piece in pieces])
    assert_close(got, gradients(model, *[loss / len(rows) for loss in losses]))
    assert record.no_think_logp is not None and plain is not None and not torch.allclose(record.no_think_logp, plain)


def test_distillation_leaves_rewards_and_metrics_as_they_are():
    model = qwen3()
    with_it = rlp(model, config(prediction_weight=0.3, distillation=0.5)).collect(WINDOWS, 1)
    without = rlp(model, config(prediction_weight=0.3)).collect(WINDOWS, 1)
    assert without.soft_targets is None and with_it.soft_targets is not None
    assert torch.allclose(with_it.soft_targets.sum(-1), torch.ones(with_it.soft_targets.shape[:-1]), atol=1e-5)
    assert with_it.metrics() == without.metrics()


def test_without_the_weight_nothing_is_read_after_a_thought():
    """The paper's update, to the bit: no target, no forced delimiter."""
    method = rlp(qwen3(), config())
    for piece in collected(method, WINDOWS, 1).microbatches:
        assert piece.batch.read is None and piece.prediction_weight is None and not piece.terms()


@pytest.mark.parametrize("method", [{"unclosed": "drop"}, {"min_gain": 0.1}, {"unclosed": "penalize"}])
def test_dropped_thoughts_train_nothing_and_penalized_ones_are_read_as_they_are(method: dict[str, Any]):
    model, form = qwen3(), FORM
    settings = config(thought_length=10, prediction_weight=0.5, **method)
    record = (ours := rlp(model, settings)).collect(WINDOWS, 1)
    closed, kept = record.thoughts.closed.flatten().tolist(), record.kept.flatten().tolist()
    assert not all(kept) or "penalize" in method.values()
    assert not all(closed)
    pieces = ours.microbatches(record)
    rows = [row for piece in pieces for row in written(piece, form)]
    targets = record.shard.positions.targets().repeat_interleave(4, 0).tolist()
    loss = torch.zeros((), dtype=torch.double)
    for (prompt, thought), done, used, true in zip(rows, closed, kept, targets, strict=True):
        read = [*prompt, *form.content(thought, done), *form.close]
        loss = loss - 0.5 * used * plain_targets(model, read, true).sum() / len(rows)
    assert_close(update(ours, [piece.terms()["prediction"] for piece in pieces]), gradients(model, loss))


def test_the_term_adds_to_a_step_with_kl_and_several_inner_steps():
    """The old and the reference's log-probabilities do not read the targets, so they are those of the paper's step."""
    model, more = qwen3(), {"kl_weight": 0.1, "inner_steps": 2, "thought_length": 10}
    (paper,) = collected(rlp(model, config(**more)), WINDOWS, 1).microbatches
    method = rlp(model, config(prediction_weight=0.5, **more))
    (piece,) = collected(method, WINDOWS, 1).microbatches
    assert paper.logp_old is not None and piece.logp_old is not None
    assert torch.equal(piece.logp_old, paper.logp_old) and torch.equal(piece.logp_reference, paper.logp_reference)
    parts = [update(rlp(model, config(**more)), [paper]), update(method, [piece.terms()["prediction"]])]
    assert_close(update(method, [piece]), [one + other for one, other in zip(*parts, strict=True)])


def test_a_warm_up_trains_only_the_prediction():
    model = qwen3()
    method = rlp(model, config(prediction_weight=0.5, warmup_steps=1))
    for step, trains in ((1, False), (2, True)):
        (piece,) = collected(method, WINDOWS, step).microbatches
        assert bool(piece.advantage.any()) is trains
        both = update(method, [piece])
        alone = update(method, [piece.terms()["prediction"]])
        assert all(torch.equal(one, other) for one, other in zip(both, alone, strict=True)) is not trains


def test_length_norm_none_sums_over_a_thought():
    model = qwen3(scale=0.2)
    (piece,) = collected(rlp(model, config(length_norm="none", thought_length=6)), WINDOWS, 1).microbatches
    lengths = piece.batch.mask.sum(-1)
    assert lengths.min() < lengths.max()
    scaled = dataclasses.replace(piece, advantage=piece.advantage * lengths)
    assert_close(
        update(rlp(model, config(length_norm="none", thought_length=6)), [piece]),
        update(rlp(model, config(thought_length=6)), [scaled]),
    )


def test_a_thought_may_be_empty_where_that_is_allowed():
    """It closes at once as often as the policy says, and the evidence after it is that of the empty thought."""
    model, count = tiny(), 5_000
    form = dataclasses.replace(TINY, closing=TINY.closing.with_minimum(0))
    engine = NativeEngine(model, form, Method(temperature=1.0, thought_length=3))
    positions = at_positions([window(0, 1, 2)], [[2]], horizon=1)
    thoughts = engine.sample(positions, torch.rand(1, count, 3, generator=make_generator(7)))
    lengths = thoughts.lengths[0]
    empty = thoughts.closed[0] & (lengths == 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[0, 1, OPEN]])).logits[0, -1]
    share = float(logits.softmax(-1)[4])
    assert 0.02 < share < 0.98
    assert abs(int(empty.sum()) - count * share) < 4 * (count * share * (1 - share)) ** 0.5
    after = plain_targets(model, [0, 1, OPEN, 4], [2]).detach().float()
    assert torch.allclose(thoughts.evidence[0][empty], after.expand(int(empty.sum()), 1), atol=1e-5)


def test_a_delimiter_that_begins_at_the_first_token_is_no_more_than_that_token():
    tokens = torch.tensor([[7, 0, 0]])
    assert matching_prefix(tokens, torch.tensor([1]), torch.tensor([7, 7, 5])).tolist() == [1]


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_the_gradient_norm_of_each_term_is_logged(inner_steps: int, tmp_path: Path):
    words = "--train.steps 2 --train.batch 4 --train.log_every 1 --method.prediction_weight 0.2 --evaluate.documents 2"
    run = tmp_path / "run"
    chosen = load("quickstart", [*words.split(), f"--method.inner_steps={inner_steps}", f"--run={run}"])
    forethought.train(chosen)
    first, second = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    policy, prediction = (first[f"optim/gradient_norm_{term}"] for term in ("policy", "prediction"))
    assert policy > 0 and prediction > 0
    if inner_steps == 1:  # the norm of the sum, which is that of the step
        assert abs(policy - prediction) < first["optim/gradient_norm"] < policy + prediction
    assert first["objective/prediction_loss"] > 0
    assert "optim/gradient_norm_policy" not in second


def test_norms_that_are_not_logged_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trainer, "TERM_NORMS_EVERY", 2)
    words = "--train.steps 4 --train.batch 4 --train.log_every 3 --method.prediction_weight 0.2 --evaluate.path="
    chosen = load("quickstart", [*words.split(), f"--run={tmp_path / 'run'}"])
    measured, measure = [], trainer.Trainer._term_norms
    monkeypatch.setattr(
        trainer.Trainer,
        "_term_norms",
        lambda self, *given: measured.append(measure(self, *given)) or measured[-1],
    )
    forethought.train(chosen)
    assert [bool(norms) for norms in measured] == [True, False, False, True]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["optim/gradient_norm_policy" in line for line in logged] == [True, False, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method.name warmup", "needs method.prediction_weight"),
        ("--method.warmup_steps 3", "needs a method.prediction_weight above 0"),
        ("--method.name rpt --method.prediction_weight 1", "samples its predictions"),
        ("--method.name cpt --method.prediction_weight 1", "trains on all text"),
        ("--method.prediction_weight -1", "greater than or equal to 0"),
        ("--method.length_norm mean", "'thought' or 'none'"),
        ("--method.distillation 0.5", "needs a method.prediction_weight above 0"),
        ("--method.distillation 1.5 --method.prediction_weight 1", "less than or equal to 1"),
        ("--method.prediction_weight 1 --method.distillation 1 --method.teacher_every 0", "needs the teacher at every"),
        ("--method.min_thought_length 8 --method.thought_length 8", "must be below method.thought_length = 8"),
        ("--method.min_thought_length 2 --method.allow_empty True", "method.allow_empty allows shorter thoughts"),
    ],
)
def test_what_cannot_be_combined_is_refused(words: str, message: str):
    with pytest.raises(UserError, match=message):
        load(None, words.split())
