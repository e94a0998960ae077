import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forethought.config import Method
from forethought.data.positions import ThoughtFormat, at_positions, make_generator
from forethought.models.logprobs import ScoringOptions, ThoughtBatch, thought_logp
from forethought.rollout import Thoughts, draw_noise
from forethought.rollout.decoder import sample
from forethought.rollout.native import NativeEngine
from helpers.models import (
    CLOSE,
    FORM,
    LONG,
    MERGED,
    REPEATING,
    TEXTS,
    WINDOWS,
    A,
    closed_by_force,
    collected,
    config,
    engine,
    patient,
    plain_targets,
    plain_thought,
    qwen3,
    read_through,
    rlp,
    window,
)
from helpers.sampling import assert_same, biased, cuda_graphs

PLACES = [[1, 3], [2, 4, 5], [1], [2]]
THREE = ThoughtFormat(before=(), after=(), open=(3,), close=(CLOSE, 5, 6), bos=None, pad=0)
FORMS = {FORM: "short", LONG: "long", THREE: "three", MERGED: "merged", REPEATING: "repeating"}


WAYS = pytest.mark.parametrize("way", [(128, True), (5, True), (5, False)], ids=["shared", "few at once", "copied"])


def think(
    model: Any,
    form: ThoughtFormat = FORM,
    group: int = 5,
    length: int = 6,
    way: tuple[int, bool] = (128, True),
    **method: Any,
) -> Thoughts:
    """`way`: how many rows decode at once, and whether they share prefixes."""
    positions, options = at_positions(WINDOWS, PLACES, method.pop("horizon", 1)), Method(**method)
    noise = draw_noise((group, length), [make_generator(0, i) for i in range(len(positions))])
    return NativeEngine(model, form, options, *way).sample(positions, noise)


def texts(thoughts: Thoughts) -> list[list[int]]:
    flat = zip(thoughts.tokens.flatten(0, 1), thoughts.mask.flatten(0, 1), strict=True)
    return [tokens[mask].tolist() for tokens, mask in flat]


def same(one: Thoughts, other: Thoughts) -> None:
    assert texts(one) == texts(other)
    assert torch.equal(one.closed, other.closed)
    assert torch.equal(one.hit, other.hit)
    assert torch.allclose(one.logp[one.mask], other.logp[other.mask], atol=1e-5)
    assert torch.allclose(one.evidence, other.evidence, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "copied"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_split_into_calls_changes_no_thought(size, shared):
    model, options = biased({CLOSE: 2.0}), Method(temperature=0.9)
    positions = at_positions(WINDOWS, PLACES, horizon=2)
    noise = draw_noise((4, 7), [make_generator(0, i) for i in range(len(positions))])
    engine = NativeEngine(model, FORM, options, shared=shared)
    whole, done, parts = engine.sample(positions, noise), 0, []
    for chunk in positions.chunks(size):
        parts.append(engine.sample(chunk, noise[done : done + len(chunk)]))
        done += len(chunk)
    assert len(parts) > 1
    assert [text for part in parts for text in texts(part)] == texts(whole)
    assert torch.allclose(torch.cat([part.evidence for part in parts]), whole.evidence, atol=1e-5)
    assert torch.equal(torch.cat([part.closed for part in parts]), whole.closed)
    assert 1 < whole.lengths.float().mean() < 7
    for rows in (1, 9, 16):
        same(NativeEngine(model, FORM, options, rows, shared).sample(positions, noise), whole)


def test_noise_of_a_position_does_not_depend_on_the_others():
    both = draw_noise((3, 4), [make_generator(0, 1), make_generator(0, 2)])
    assert torch.equal(both[1:], draw_noise((3, 4), [make_generator(0, 2)]))
    assert not torch.equal(both[0], both[1])


@WAYS
@pytest.mark.parametrize("form", [FORM, THREE], ids=["one-token close", "three-token close"])
def test_an_empty_thought_cannot_occur(form, way):
    """Even where the model wants nothing but to close."""
    thoughts = think(biased({CLOSE: 60.0}), form, way=way)
    assert all(text[0] != CLOSE for text in texts(thoughts))
    if form is FORM:
        assert {len(text) for text in texts(thoughts)} == {2}
        assert thoughts.closed.all()


@WAYS
@pytest.mark.parametrize(
    ("form", "closing"),
    [(FORM, [CLOSE]), (THREE, [CLOSE, 5, 6]), (MERGED, [7, 8, 9])],
    ids=["short", "three", "merged"],
)
def test_a_thought_has_its_minimum_length(form: ThoughtFormat, closing: list[int], way: tuple[int, bool]):
    """Even where the model wants nothing but to close, in whatever tokens; CUDA graphs do the same."""
    form, model = patient(form, 4), biased(dict.fromkeys(closing, 60.0))
    positions = at_positions(WINDOWS, PLACES, 1)
    noise = draw_noise((5, 8), [make_generator(0, i) for i in range(len(positions))])
    thoughts = NativeEngine(model, form, Method(), *way).sample(positions, noise)
    assert not set(thoughts.tokens[..., :4].flatten().tolist()) & set(form.closing.early.tolist())
    assert int(thoughts.lengths.min()) > 4 and thoughts.closed.any()
    if form.close == FORM.close:
        assert set(thoughts.lengths.flatten().tolist()) == {5} and thoughts.closed.all()
    assert_same(cuda_graphs(model, form, Method()).sample(positions, noise), thoughts)


@WAYS
def test_a_thought_ends_with_its_whole_closing_sequence(way):
    thoughts = think(biased({CLOSE: 4.0, 5: 4.5, 6: 4.5}), THREE, group=60, length=12, way=way)
    lengths = set()
    for text, closed in zip(texts(thoughts), thoughts.closed.flatten().tolist(), strict=True):
        ends = [i for i in range(4, len(text) + 1) if tuple(text[i - 3 : i]) == THREE.close]
        assert ends == ([len(text)] if closed else [])
        assert closed or len(text) == 12
        lengths.add(len(text))
    assert len(lengths) > 3
    assert 0.1 < thoughts.closed.float().mean() < 1


@WAYS
@pytest.mark.parametrize("form", [FORM, LONG, THREE, MERGED, REPEATING], ids=lambda form: FORMS[form])
@pytest.mark.parametrize("horizon", [1, 3])
def test_evidence_follows_the_closing_delimiter_forced_or_not(form, horizon, way):
    """With `merged` a thought closes by its text: the closing token is credited as sampled, `close` is read."""
    model = biased({CLOSE: 2.0, 7: 2.0} if form is MERGED else {CLOSE: 4.0, 5: 5.0, 6: 4.0})
    places = [[1, 2], [2, 4], [1]]
    positions = at_positions(WINDOWS[:2] + WINDOWS[3:], places, horizon)
    noise = draw_noise((8, 9), [make_generator(0, i) for i in range(5)])
    thoughts = NativeEngine(model, form, Method(), *way).sample(positions, noise)
    assert 0 < thoughts.closed.float().mean() < 1
    endings = set()
    with torch.no_grad():
        for i, (context, targets) in enumerate(zip(positions.contexts(), positions.targets().tolist(), strict=True)):
            for g in range(8):
                text = thoughts.tokens[i, g][thoughts.mask[i, g]].tolist()
                prompt = form.prompt_tokens(context)
                evidence = plain_targets(model, prompt + read_through(text, form, context), targets)
                assert torch.allclose(thoughts.evidence[i, g], evidence, atol=1e-5)
                plain = plain_thought(model, prompt, text, 0.7, form.closing.first.tolist())
                assert torch.allclose(thoughts.logp[i, g, : len(text)], plain, atol=1e-5)
                if form is MERGED:
                    said = ["</think>" in "".join(TEXTS[token] for token in text[:n]) for n in range(1, len(text) + 1)]
                    assert said == [False] * (len(text) - 1) + [bool(thoughts.closed[i, g])]
                    assert closed_by_force(text, form) == [*form.content(text, said[-1]), *form.close]
                    endings.add(text[-1] if said[-1] else None)
    assert form is not MERGED or {A, 8, 9, 11, None} <= endings


@WAYS
def test_forced_closing_is_not_part_of_a_thought(way):
    thoughts = think(biased({CLOSE: -60.0}), length=4, way=way)
    assert not thoughts.closed.any()
    assert thoughts.tokens.shape[-1] == 4
    assert thoughts.mask.all()
    assert not (thoughts.tokens == CLOSE).any()


@WAYS
def test_a_delimiter_cut_off_by_the_limit_counts_as_not_closed(way):
    thoughts = think(biased({CLOSE: 60.0, 5: 59.0}), THREE, length=3, way=way)
    assert not thoughts.closed.any()
    assert all(len(text) == 3 for text in texts(thoughts))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "copied"])
def test_dropping_finished_rows_disturbs_nobody(monkeypatch, shared):
    model = biased({CLOSE: 2.0})
    results = []
    for share in (0.0, 0.75, 2.0):  # only at the end; the default; at every step
        monkeypatch.setattr("forethought.rollout.decoder.COMPACT", share)
        for rows in (128, 16):
            results.append(think(model, group=8, length=10, way=(rows, shared), horizon=2))
    assert results[0].lengths.unique().numel() > 4
    for other in results[1:]:
        same(results[0], other)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_positions_that_take_the_place_of_finished_ones_disturb_nobody(monkeypatch, share):
    """Nearly when none is left; the default; as soon as one fits."""
    model = biased({CLOSE: 2.0})
    whole = think(model, group=8, length=10, horizon=2)
    monkeypatch.setattr("forethought.rollout.decoder._REFILL", share)
    for rows in (8, 24, 40):
        same(think(model, group=8, length=10, way=(rows, True), horizon=2), whole)


@pytest.mark.parametrize(("rows", "group", "length"), [(4, 1, 6), (8, 2, 8)])
def test_finished_rows_that_stay_in_the_cache_take_no_room_from_the_others(rows: int, group: int, length: int):
    """Many rows end at once, so that younger ones take their place and outnumber the last old ones."""
    model = qwen3(scale=0.05)
    windows = [window(5, 6 + i % 5, 7) for i in range(40)]
    positions = at_positions(windows, [[2]] * len(windows), 1)
    for seed in range(3):
        coarse = draw_noise((group, length), [make_generator(seed, i) for i in range(40)])
        noise = (coarse * 5).round() / 5 * 0.99
        few, many = (
            engine(model, config(rows=size, thought_length=length, temperature=1.5)).sample(positions, noise)
            for size in (rows, 1000)
        )
        assert torch.equal(few.tokens, many.tokens)
        assert torch.allclose(few.evidence, many.evidence, atol=1e-5)


def test_top_p_keeps_to_the_nucleus_and_reports_untruncated_log_probabilities():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(4000, -1)
    noise = torch.rand(4000, generator=make_generator(0))
    counts = torch.bincount(sample(logits, noise, 1.0, top_p=0.6), minlength=4) / 4000
    assert counts[2:].tolist() == [0.0, 0.0]
    assert float(counts[0]) == pytest.approx(2 / 3, abs=0.04)
    assert set(sample(logits, noise, 1.0, top_p=0.1).tolist()) == {0}
    model, context = qwen3(), FORM.prompt_tokens(WINDOWS[0].tokens[:1])
    thoughts = think(model, top_p=0.5, temperature=1.0)
    with torch.no_grad():
        plain = plain_thought(model, context, texts(thoughts)[0], 1.0, CLOSE)
    assert torch.allclose(thoughts.logp[0, 0][thoughts.mask[0, 0]], plain, atol=1e-5)
    assert (thoughts.logp[thoughts.mask] < -1e-3).any()


LOGIT = st.floats(-6, 6, width=32)


@given(st.lists(LOGIT, min_size=2, max_size=7), st.sampled_from([0.3, 0.7, 1.0, 1.5]))
def test_sample_switches_tokens_at_the_edges_of_the_distribution(logits, temperature):
    """Token i is drawn by noise in [F(i-1), F(i)): checked just inside both edges."""
    probability = (torch.tensor(logits, dtype=torch.double) / temperature).softmax(-1)
    upper = probability.cumsum(-1)
    for i, (share, edge) in enumerate(zip(probability.tolist(), upper.tolist(), strict=True)):
        margin = 1e-6
        if share < 4 * margin:
            continue
        noise = torch.tensor([edge - share + margin, edge - margin], dtype=torch.double)
        rows = torch.tensor(logits).expand(2, -1)
        assert sample(rows, noise, temperature, 1.0).tolist() == [i, i]


def test_sample_never_draws_what_is_impossible():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(4, -1)
    noise = torch.tensor([0.0, 0.49999997, 0.5, 1 - 2**-24])
    assert sample(logits, noise, 1.0, 1.0).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("prefix", ["shared", "replicated"])
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.5])
@pytest.mark.parametrize(
    "form",
    [FORM, THREE, MERGED, patient(FORM, 4), patient(MERGED, 3)],
    ids=["one-token close", "three-token close", "merged close", "one-token close, patient", "merged close, patient"],
)
def test_ratios_to_the_sampler_are_one_before_the_first_step(form, temperature, prefix):
    model = biased({CLOSE: 3.0, 5: 3.0, 6: 3.0})
    method = rlp(model, config(temperature=temperature, prefix=prefix, group=8, thought_length=8), form)
    pieces = collected(method, WINDOWS, step=1).microbatches
    for piece in pieces:
        with torch.no_grad():
            ratio = (thought_logp(model, form, piece.batch, method.scoring) - piece.logp_sampler).exp()
        assert float((ratio - 1).abs().max()) < 1e-5
        lengths = piece.batch.mask.sum(-1)
        assert lengths.min() < lengths.max() == 8
    ends = [bool((piece.batch.tokens == form.close[-1]).any()) for piece in pieces]
    assert any(ends)


def test_positions_and_members_and_steps_think_with_noise_of_their_own():
    method = rlp(biased({}), config(group=2, thought_length=8, temperature=1.5))
    seen = [
        row.tolist()
        for step in (1, 2)
        for row in collected(method, [WINDOWS[3]] * 4, step).microbatches[0].batch.tokens
    ]
    assert len({tuple(thought[:5]) for thought in seen}) == len(seen) == 16


@WAYS
@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_tokens_without_a_text_are_never_sampled(temperature: float, way: tuple[int, bool]):
    """Where the head has more rows than the tokenizer has tokens; sampler and trainer leave them out alike."""
    holes = (5, 7)  # and where it has none for some smaller ids
    form = dataclasses.replace(FORM, vocabulary=9, holes=holes)
    model = biased({5: 4.0, 7: 5.0, 9: 5.0, 10: 5.0, 11: 5.0})
    positions = at_positions(WINDOWS[:2], [[1, 2], [2, 4]], 1)
    noise = draw_noise((16, 9), [make_generator(0, i) for i in range(4)])
    thoughts = NativeEngine(model, form, Method(temperature=temperature), *way).sample(positions, noise)
    assert int(thoughts.tokens.max()) < 9 and not set(thoughts.tokens[thoughts.mask].tolist()) & set(holes)
    batch = ThoughtBatch.from_positions(form, positions, thoughts.tokens, thoughts.mask)
    options = ScoringOptions(temperature=temperature, tokens=500, shared=way[1])
    assert torch.allclose(thought_logp(model, form, batch, options), thoughts.logp.flatten(0, 1), atol=1e-5)
    graphs = cuda_graphs(model, form, Method(temperature=temperature))
    assert_same(graphs.sample(positions, noise), thoughts)
