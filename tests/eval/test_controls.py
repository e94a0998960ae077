"""Controls and contents of thoughts: against plain forwards of one row, and by hand."""

import dataclasses
import json
import math
import random
from collections import Counter
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from forethought.algo.metrics import leakage
from forethought.config import Notice
from forethought.data.corpus import spread_windows
from forethought.data.positions import ThoughtFormat, at_positions, make_generator, uniform
from forethought.data.token_bytes import Closing
from forethought.eval import controls, heldout
from forethought.models.loading import load_tokenizer
from forethought.models.logprobs import no_think_distribution, thought_evidence
from forethought.rollout import Thoughts, draw_noise, thought_tokens
from helpers.heldout import EVALUATION, TEXTS, documents, quiet, setup, subject, write_controls
from helpers.models import (
    FORM,
    LONG,
    MODELS,
    REPEATING,
    WORDS,
    config,
    engine,
    plain_logits,
    plain_targets,
    qwen3,
    window,
    word_tokenizer,
)
from helpers.runs import end, environments
from helpers.tokenizers import byte_level


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "replicated"])
@pytest.mark.parametrize("form", [FORM, LONG, REPEATING], ids=["short", "long", "repeating"])
@pytest.mark.parametrize("name", MODELS)
def test_evidence_of_sampled_thoughts_is_what_the_engine_reports(name: str, form: ThoughtFormat, shared: bool):
    model, positions = MODELS[name](), at_positions(TEXTS, [[1, 4], [1, 3], [5]], horizon=1)
    noise = draw_noise((3, 6), [make_generator(2, i) for i in range(5)])
    thoughts = engine(model, config(), form).sample(positions, noise)
    with torch.no_grad():
        logp = thought_evidence(model, positions, form, thought_tokens(thoughts, form), shared)
    assert logp.shape == (5, 3, len(WORDS))
    assert torch.allclose(logp.exp().sum(-1), torch.ones(5, 3), atol=1e-5)
    found = logp.gather(-1, positions.targets()[:, None].expand(-1, 3, 1))
    assert torch.allclose(found, thoughts.evidence, atol=1e-5)
    if form is FORM:
        assert thoughts.closed.any() and not thoughts.closed.all()


@pytest.mark.parametrize("name", MODELS)
def test_the_plain_distribution_is_that_of_one_row(name: str):
    model, positions = MODELS[name](), at_positions(TEXTS, [[1, 4], [3], [5]], horizon=1)
    with torch.no_grad():
        found = no_think_distribution(model, positions, tokens=100)[:, 0]
        for row, context in zip(found, positions.contexts(), strict=True):
            assert torch.allclose(row, plain_logits(model, context)[-1].log_softmax(-1), atol=1e-5)


@pytest.mark.parametrize("form", [FORM, LONG], ids=["short", "long"])
def test_controls_are_those_computed_one_row_at_a_time(form: ThoughtFormat):
    model, windows = qwen3(), documents()
    measured = heldout.sample_groups(subject(model, form=form), windows, quiet)["all"]
    generic = [5, 9, 6]
    records = controls.measure(subject(model, form=form), windows, quiet, generic)["all"]
    source = controls.derangement(measured.records.document, make_generator(0, "shuffled", "all"))
    vocabulary = controls.ordinary_tokens(word_tokenizer(), form)
    thoughts, drawn = measured.thoughts, controls.random_thoughts(measured.thoughts, vocabulary, "all")
    contexts, targets = measured.positions.contexts(), measured.positions.targets().tolist()

    def naive(given: list[list[list[int]]]) -> list[float]:
        means = []
        for context, target, group in zip(contexts, targets, given, strict=True):
            with torch.no_grad():
                rows = [[*form.prompt_tokens(context), *one, *form.close] for one in group]
                means.append(sum(float(plain_targets(model, row, target)) for row in rows) / len(rows))
        return means

    assert records.think == pytest.approx(naive(thoughts), abs=1e-5)
    assert records.empty == pytest.approx(naive([[[]]] * 6), abs=1e-5)
    assert records.shuffled == pytest.approx(naive([thoughts[i] for i in source]), abs=1e-5)
    assert records.random == pytest.approx(naive(drawn), abs=1e-5)
    assert records.generic == pytest.approx(naive([[generic]] * 6), abs=1e-5)
    assert thoughts != drawn
    figures = heldout.summarize({"all": records}, {"all": records})
    assert figures["all/ce_generic"] == pytest.approx(-sum(records.generic or []) / 6)
    assert figures["all/gain_generic"] == pytest.approx(figures["all/ce_nothink"] - figures["all/ce_generic"])


def test_the_generic_thought_is_the_best_of_all_candidates_one_row_at_a_time():
    """Duplicates and empty thoughts among them, and more than are compared."""
    model, form = qwen3(seed=3), dataclasses.replace(FORM, close=(8,), closing=Closing.of_tokens((8,)).with_minimum(0))
    one = subject(model, thoughts=15, form=form)
    settings = dataclasses.replace(one.config, method=dataclasses.replace(one.config.method, temperature=0.6))
    one = dataclasses.replace(one, config=settings, engine=engine(model, settings, form))
    windows = [dataclasses.replace(some, document=f"{i}") for i, some in enumerate(TEXTS * 5)]
    at = [uniform(some, 1, one.config.method, make_generator(0, "generic", i)) for i, some in enumerate(windows)]
    groups = []
    for i in range(3):  # 16 of 80 windows are a fifth
        noise = draw_noise((15, 4), [make_generator(0, "generic thought", i)])
        groups += thought_tokens(one.engine.sample(at_positions(windows[i : i + 1], [at[i]], 1), noise), form)
    ordered = [group[turn] for turn in range(15) for group in groups]
    different = [some for i, some in enumerate(ordered) if some and some not in ordered[:i]]
    assert len(different) > 16 and [] in ordered and len(ordered) > len({*map(tuple, ordered)})
    means = []
    for candidate in different:
        rows = [
            ([*FORM.prompt_tokens(some.tokens[:t]), *candidate, *form.close], some.tokens[t : t + 1])
            for some, [t] in zip(windows[3:], at[3:], strict=True)
        ]
        with torch.no_grad():
            means.append(sum(float(plain_targets(model, row, target)) for row, target in rows) / len(rows))
    phases: list[tuple[str, int, int]] = []
    found = controls.best_thought(one, windows, lambda *told: phases.append(told))
    assert found == different[means.index(max(means[:16]))]
    assert max(means[1:16]) > means[0] and max(means) > max(means[:16])  # the best comes too late
    assert phases[-1] == ("choosing a generic thought", 15, 15)
    assert controls.best_thought(one, windows[:1], quiet) is None
    assert controls.best_thought(one, [], quiet) is None


def test_the_generic_thought_is_chosen_on_text_that_is_not_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS[5:], k=12)) for _ in range(30)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    one = subject(qwen3())
    options = dataclasses.replace(one.config.corpus, path=str(tmp_path / "text.jsonl"))
    one = dataclasses.replace(one, config=dataclasses.replace(one.config, corpus=options))
    windows = spread_windows(options, one.tokenizer, 0, 30)
    monkeypatch.chdir(tmp_path)
    held_out = [
        dataclasses.replace(some, document=Path(some.document).name) for some in windows[:10]
    ]  # by another name
    assert controls.generic_thought(one, [], quiet) == controls.best_thought(one, windows, quiet)
    kept = controls.generic_thought(one, held_out, quiet)
    assert kept == controls.best_thought(one, windows[10:], quiet) != controls.best_thought(one, windows, quiet)
    assert controls.generic_thought(one, windows, quiet) is None
    (tmp_path / "text.jsonl").unlink()
    with pytest.warns(Notice, match=r"^the control `generic` is left out: corpus.path = .*: no such file"):
        assert controls.generic_thought(one, held_out, quiet) is None


@pytest.mark.distributed
def test_two_processes_choose_and_measure_what_one_does(tmp_path: Path, processes: ForkServerContext):
    write_controls({}, tmp_path / "alone.json")
    alone = json.loads((tmp_path / "alone.json").read_text())
    files = [tmp_path / f"{rank}.json" for rank in range(2)]
    started = [processes.Process(target=write_controls, args=pair) for pair in zip(environments(2), files, strict=True)]
    for one in started:
        one.start()
    assert end(started) == [0, 0]
    assert [json.loads(file.read_text()) for file in files] == [alone, alone]
    assert alone[0] and alone[1]["generic"]


def test_the_controls_leave_everything_else_as_it_is():
    model, windows = qwen3(), documents()
    phases: list[tuple[str, int, int]] = []
    full = controls.measure(subject(model), windows, lambda *told: phases.append(told))
    quick = heldout.measure(subject(model), windows, quiet)
    for name, one in quick.items():
        assert dataclasses.replace(full[name], empty=None, shuffled=None, random=None) == one
    assert [phases[0][0], phases[-1]] == ["evaluating", ("controls", 6, 6)]
    assert [done for name, done, _ in phases if name == "controls"] == [2, 4, 6]


def test_one_position_has_no_other_to_trade_with():
    (one,) = (controls.measure(subject(qwen3()), [window(5, 6)], quiet)).values()
    assert one.shuffled is None and one.empty is not None and one.random is not None
    assert "all/ce_shuffled" not in heldout.summarize({"all": one}, {"all": one})


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.integers(0, 99))
def test_a_derangement_leaves_documents_wherever_that_can_be(owners: list[int], seed: int):
    source = controls.derangement(owners, make_generator(seed))
    assert sorted(source) == list(range(len(owners)))
    assert all(i != place for i, place in enumerate(source))
    stay = sum(owners[i] == owners[place] for i, place in enumerate(source))
    largest = max(Counter(owners).values())
    assert stay == max(0, 2 * largest - len(owners))


def test_a_derangement_is_drawn_and_takes_two():
    owners = list(range(10))
    assert controls.derangement(owners, make_generator(1)) == controls.derangement(owners, make_generator(1))
    assert len({tuple(controls.derangement(owners, make_generator(seed))) for seed in range(20)}) == 20
    with pytest.raises(ValueError, match="at least 2 positions, got 1"):
        controls.derangement([0], make_generator(0))


def test_random_thoughts_are_as_long_and_of_ordinary_tokens():
    vocabulary = controls.ordinary_tokens(word_tokenizer(bos=True), FORM)
    assert [WORDS[token] for token in vocabulary] == ["a", "b", "c", "d", "e", "f", "g"]
    assert controls.ordinary_tokens(word_tokenizer(), LONG) == [2, 7, 8, 9, 10, 11]  # <bos> is a word there
    thoughts = [[[5] * 400, [5]], [[5] * 300, [5] * 3]]
    drawn = controls.random_thoughts(thoughts, vocabulary, "all")
    assert [[len(one) for one in group] for group in drawn] == [[400, 1], [300, 3]]
    assert {token for group in drawn for one in group for token in one} == set(vocabulary)
    assert drawn[0][0][:300] != drawn[1][0]
    assert drawn == controls.random_thoughts(thoughts, vocabulary, "all")
    assert drawn != controls.random_thoughts(thoughts, vocabulary, "answer")
    counts = Counter(drawn[0][0])
    assert max(counts.values()) < 2 * min(counts.values()) + 20


def test_the_inside_of_a_thought_is_without_its_sampled_delimiter():
    thoughts = Thoughts(
        tokens=torch.tensor([[[5, 4, 0, 0], [5, 6, 7, 8]], [[6, 7, 4, 0], [4, 6, 4, 4]]]),
        mask=torch.tensor([[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 1]]]).bool(),
        closed=torch.tensor([[True, False], [True, False]]),
        logp=torch.zeros(2, 2, 4),
        evidence=torch.zeros(2, 2, 1),
        hit=torch.zeros(2, 2, 1).bool(),
    )
    assert thought_tokens(thoughts, FORM) == [[[5], [5, 6, 7, 8]], [[6, 7], [4, 6, 4, 4]]]
    closed = dataclasses.replace(thoughts, closed=torch.tensor([[False, False], [True, False]]))
    assert thought_tokens(closed, dataclasses.replace(FORM, close=(7, 4)))[1][0] == [6]


def test_marginal_is_below_the_mean_and_equal_where_there_is_one_thought():
    """Prop. 2: the mean of log p is at most log of the mean p."""
    many = heldout.measure(subject(qwen3(), thoughts=5), documents(), quiet)["all"]
    assert many.marginal is not None
    assert all(bound > mean for bound, mean in zip(many.marginal, many.think, strict=True))
    single = heldout.measure(subject(qwen3(), thoughts=1), documents(), quiet)["all"]
    assert single.marginal == pytest.approx(single.think, abs=1e-6)
    measured = heldout.sample_groups(subject(qwen3(), thoughts=5), documents(), quiet)["all"]
    prompt, target = FORM.prompt_tokens(measured.positions.contexts()[0]), measured.positions.targets()[0].tolist()
    with torch.no_grad():
        rows = [[*prompt, *one, *FORM.close] for one in measured.thoughts[0]]
        p = [math.exp(float(plain_targets(qwen3(), row, target))) for row in rows]
    assert many.marginal[0] == pytest.approx(math.log(sum(p) / 5), abs=1e-5)


def test_the_teacher_is_scored_without_a_thought():
    other = qwen3(seed=7)
    mine = heldout.measure(subject(qwen3(), teacher=other), documents(), quiet)["all"]
    assert mine.teacher == pytest.approx(heldout.measure(subject(other), documents(), quiet)["all"].nothink, abs=1e-6)
    assert mine.teacher != mine.nothink
    assert heldout.measure(subject(qwen3()), documents(), quiet)["all"].teacher is None


def test_leakage_looks_for_the_text_of_the_target():
    tokenizer = byte_level(["the cat sat"], trim=False)
    targets = tokenizer.convert_tokens_to_ids(["Ġcat", "c", "Ċ", "Å", "cat"])
    assert tokenizer.batch_decode([[token] for token in targets]) == [" cat", "c", "\n", "\ufffd", "cat"]
    said = [["the cat", "dog"], ["a", "b"], ["any", "\n"], ["\ufffd", "x"], ["CAT", "concatenate"]]
    assert leakage(tokenizer, targets, said) == [0.5, 0.0, None, None, 0.5]


def test_leakage_of_a_word_that_goes_on():
    """WordPiece decodes a token at the beginning with its `##`; other tokenizers have tokens that are `##`."""
    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2, "a": 3}
    words = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    said = [[tokenizer.decode([1, 2]), tokenizer.decode([3])]]
    assert said == [["playing", "a"]] and leakage(tokenizer, [2], said) == [0.5]
    plain = byte_level(["## a ##"] * 9, trim=True)
    assert leakage(plain, plain("##")["input_ids"], [["x ## y", "y#"]]) == [0.5]


def test_leakage_is_measured_at_the_target_of_each_position():
    found = heldout.measure(subject(qwen3(), thoughts=8), documents(), quiet)["all"].leakage
    measured = heldout.sample_groups(subject(qwen3(), thoughts=8), documents(), quiet)["all"]
    targets = [WORDS[target] for target in measured.positions.targets()[:, 0].tolist()]
    said = [[" ".join(WORDS[token] for token in one) for one in group] for group in measured.thoughts]
    naive = [sum(target in one for one in group) / 8 for target, group in zip(targets, said, strict=True)]
    assert found == naive and 0 < sum(naive) < 6


def test_statements_are_checked_against_the_whole_window():
    seen: list[tuple[str, str]] = []

    def truth(document: str, thought: str) -> tuple[int, int]:
        seen.append((document, thought))
        return thought.count("a"), len(thought)

    cut = dataclasses.replace(TEXTS[1], start=9)
    positions = at_positions([TEXTS[0], cut], [[1, 2], [3]], horizon=1)
    right, stated = heldout.statements(truth, word_tokenizer(), positions, [["a", "b"], ["aa", "ab"], ["", "a"]])
    assert (right, stated) == ([0.5, 1.5, 0.5], [1.0, 2.0, 0.5])
    assert [document for document, _ in seen] == ["a b c d e f"] * 4 + [""] * 2


def test_only_worlds_bring_a_checker():
    assert heldout.checker("texts/world.jsonl") is None
    assert heldout.checker("hub:cups") is None
    checker = heldout.checker("world:cups/heldout")
    assert checker is not None
    assert checker("ball under red . swap 1 blue red , 2 red white", "1 blue 2 red") == (1, 2)


def test_truth_of_a_world_is_measured(tmp_path: Path):
    embedded = {"path": "embedded", "init": "pretrained"}
    model, sampler, settings = setup(tmp_path, model=embedded, method={"thought_length": 20})
    tokenizer = load_tokenizer(settings.model)
    one = heldout.Subject(model=model, engine=sampler, form=sampler.form, tokenizer=tokenizer, config=settings)
    records = heldout.measure(one, heldout.held_out(settings, tokenizer), quiet)["answer"]
    assert records.stated is not None and records.right is not None
    assert max(records.stated) > 3  # the base writes a track about half of the time, and hardly ever a wrong one
    assert 0.8 < sum(records.right) / sum(records.stated) <= 1
    assert EVALUATION["documents"] == len(records.at)


def test_domains_and_languages_are_groups_of_the_uniform_positions():
    domains = ["books", "web/x", "books", None]
    windows = [
        dataclasses.replace(one, domain=domain, language="en", document=f"d{i}")
        for i, (one, domain) in enumerate(zip([*TEXTS, TEXTS[0]], domains, strict=True))
    ]
    groups = controls.measure(subject(qwen3()), windows, quiet)
    assert list(groups) == ["all", "domain:books", "domain:web-x"]  # one language tells nothing apart
    assert groups["all"].document == [0, 0, 1, 1, 2, 2, 3, 3]
    assert groups["domain:books"].document == [0, 0, 2, 2]
    for field in dataclasses.fields(heldout.Records):
        whole, part = (getattr(groups[name], field.name) for name in ("all", "domain:books"))
        assert part == (whole and [whole[i] for i in (0, 1, 4, 5)])
    figures = heldout.summarize(groups, groups)
    assert figures["domain:books/positions"] == 4 and figures["domain:books/documents"] == 2
    assert figures["domain:web-x/ce_think"] == pytest.approx(-sum(groups["all"].think[2:4]) / 2)


def test_windows_of_one_document_are_one_draw_of_the_bootstrap():
    cut = [dataclasses.replace(one, document="d", start=10 * i) for i, one in enumerate(TEXTS)]
    records = heldout.measure(subject(qwen3()), cut, quiet)["all"]
    apart = heldout.measure(subject(qwen3()), documents(), quiet)["all"]
    assert records.document == [0] * 6 and apart.document == [0, 0, 1, 1, 2, 2]
    assert records.at == [at + 10 * (i // 2) for i, at in enumerate(apart.at)]
    assert len(set(records.at)) == 6
