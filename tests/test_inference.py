"""ThinkingModel: every figure against plain forwards of one row; thoughts that the engine would sample."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from forethought import ThinkingModel, UserError, load
from forethought.config import Method, from_dict, merge
from forethought.data.positions import at_positions, make_generator, thought_format
from forethought.inference import Prediction, Sampling, ScoredToken, mixture
from forethought.models.loading import load_thinking_options, save_thinking_options
from forethought.rollout import check_prefixes, draw_noise, thought_tokens
from helpers import architectures
from helpers.models import (
    CLOSE,
    FORM,
    LONG,
    MODELS,
    WORDS,
    config,
    plain_logits,
    plain_targets,
    qwen3,
    read_through,
    window,
    word_tokenizer,
)
from helpers.sampling import biased
from helpers.tokenizers import byte_level, ending_tokenizer

TEXT = "a b c d e"
TOKENS = [5, 6, 7, 8, 9]
GREEDY = Sampling(limit=1, temperature=0.0)


def thinker(model: Any = None, tokenizer: Any = None, **method: Any) -> ThinkingModel:
    """Repeats two tokens of the context after a thought, unless told otherwise."""
    settings = config(**({"thought_length": 5, "repeat_context": 2} | method))
    return ThinkingModel(model or qwen3(), tokenizer or word_tokenizer(), settings)


def rows(one: ThinkingModel, context: list[int], place: ScoredToken | Prediction) -> list[list[int]]:
    return [
        [*one.form.prompt_tokens(context), *read_through([*thought.tokens, CLOSE], one.form, context)]
        for thought in place.thoughts
    ]


@torch.no_grad()
def mean_of_sequences(model: Any, prompts: list[list[int]], targets: list[int]) -> float:
    """log 1/k sum_i p(targets | prompt i), each by one plain forward."""
    return math.log(sum(math.exp(float(plain_targets(model, one, targets).sum())) for one in prompts) / len(prompts))


@pytest.mark.parametrize("wrong", [{"given": 0}, {"given": -1}, {"given": 6}, {"think_every": 0}])
def test_a_likelihood_given_no_token_or_more_than_the_text_has_is_refused(wrong: dict[str, Any]):
    with pytest.raises(UserError, match="given 1 to 5"):
        thinker().log_likelihood(TOKENS, **wrong)


def test_thinking_less_often_than_the_text_is_long_is_thinking_once():
    one = thinker()
    assert one.log_likelihood(TOKENS, think_every=10_000) == one.log_likelihood(TOKENS, think_every=4)
    assert one.log_likelihood(TOKENS, given=5) == 0


def test_mamba_layers_whose_bias_reaches_padding_are_refused():
    """The bias is 0 in new weights: outputs agree then, gradients do not."""
    model = architectures.model("granitemoehybrid-experts")
    with pytest.raises(UserError, match=r"cannot generate with thoughts \(its Mamba layers have in_proj.bias"):
        thinker(model)
    with pytest.raises(UserError, match=r"model.prefix = 'replicated'.*in_proj.bias"):
        check_prefixes(model, config(prefix="replicated"))


@pytest.mark.parametrize("repeat", [0, 2])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_next_token_is_predicted_by_the_mean_probability_over_thoughts(name: str, repeat: int):
    one = thinker(MODELS[name](), repeat_context=repeat)
    found = one.next_token(TEXT, thoughts=3, seed=4)
    with torch.no_grad():
        wanted = torch.stack([plain_logits(one.model, row)[-1].softmax(-1) for row in rows(one, TOKENS, found)])
        plain = plain_logits(one.model, TOKENS)[-1].log_softmax(-1)
    assert len(found.thoughts) == 3
    assert torch.allclose(found.logp.exp(), wanted.mean(0), atol=1e-5)
    assert torch.allclose(found.nothink, plain, atol=1e-4)
    assert [WORDS.index(text.strip()) for text, _ in found.top] == found.logp.topk(5).indices.tolist()
    assert [chance for _, chance in found.top] == pytest.approx(found.logp.exp().topk(5).values.tolist())


def test_thoughts_are_those_of_the_engine():
    one = thinker()
    noise = draw_noise((3, 5), [make_generator(4, "think", TOKENS)])
    found = one.engine.sample(at_positions([window(*TOKENS, 6)], [[5]], 1), noise)
    told = one.next_token(TOKENS, thoughts=3, seed=4).thoughts
    assert [list(thought.tokens) for thought in told] == thought_tokens(found, one.form)[0]
    assert [thought.closed for thought in told] == found.closed[0].tolist()
    assert [thought.text for thought in told] == one.tokenizer.batch_decode([thought.tokens for thought in told])
    again, other = one.next_token(TEXT, thoughts=3, seed=4), one.next_token(TEXT, thoughts=3, seed=5)
    assert again.thoughts == told != other.thoughts


@pytest.mark.parametrize("prefix", ["shared", "replicated"])
def test_the_gain_of_each_position_of_a_text(prefix: Any):
    one = thinker(prefix=prefix)
    places = one.gains(TEXT, thoughts=3)
    assert [(place.at, place.token) for place in places] == list(enumerate(TOKENS))[1:]
    assert "".join(place.text for place in places) == " b c d e"
    for place in places:
        prompts = rows(one, TOKENS[: place.at], place)
        with torch.no_grad():
            plain = float(plain_targets(one.model, TOKENS[: place.at], [place.token]))
        assert place.logp == pytest.approx(mean_of_sequences(one.model, prompts, [place.token]), abs=1e-5)
        assert place.nothink == pytest.approx(plain, abs=1e-5)
        assert place.gain == pytest.approx(place.logp - plain, abs=1e-5)
    assert places[-1].thoughts == one.next_token(TOKENS[:-1], thoughts=3).thoughts


def test_without_thoughts_everything_is_the_plain_model():
    one = thinker()
    with torch.no_grad():
        plain = plain_targets(one.model, TOKENS[:1], TOKENS[1:])
    places = one.gains(TEXT, thoughts=0)
    assert [place.logp for place in places] == pytest.approx(plain.tolist(), abs=1e-5)
    assert all(place.gain == 0 and place.thoughts == () for place in places)
    for every in (1, 3):
        found = one.log_likelihood(TEXT, thoughts=0, think_every=every)
        assert found == pytest.approx(float(plain.sum()), abs=1e-5)
    predicted = one.next_token(TEXT, thoughts=0)
    assert torch.equal(predicted.logp, predicted.nothink)
    [(scored, _)] = one.score([(TOKENS[:2], TOKENS[2:])], thoughts=0)
    assert scored == pytest.approx(float(plain[1:].sum()), abs=1e-5)


@pytest.mark.parametrize("every", [1, 2, 3, 9])
def test_the_likelihood_of_a_text_is_the_mean_over_thoughts_of_each_stretch(every: int):
    one = thinker()
    total = 0.0
    for start in range(1, len(TOKENS), every):
        found = one.next_token(TOKENS[:start], thoughts=3)
        prompts = rows(one, TOKENS[:start], found)
        total += mean_of_sequences(one.model, prompts, TOKENS[start : start + every])
    assert one.log_likelihood(TEXT, thoughts=3, think_every=every) == pytest.approx(total, abs=1e-4)
    if every == 1:
        assert sum(place.logp for place in one.gains(TEXT, thoughts=3)) == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("prefix", ["shared", "replicated"])
@pytest.mark.parametrize("rows_at_once", [2, 64])
def test_continuations_are_scored_after_thinking_once(prefix: Any, rows_at_once: int):
    one = thinker(rows=rows_at_once, prefix=prefix)
    pairs = [(TOKENS[:3], [8, 9]), ([6, 5], [10]), (TOKENS[:3], [10]), ([6, 5], [7, 7, 7]), ([9], [5])]
    for (context, continuation), (logp, greedy) in zip(pairs, one.score(pairs, thoughts=3, seed=2), strict=True):
        prompts = rows(one, context, one.next_token(context, thoughts=3, seed=2))
        assert logp == pytest.approx(mean_of_sequences(one.model, prompts, continuation), abs=1e-4)
        assert greedy == is_greedy(one.model, prompts, continuation)


@torch.no_grad()
def is_greedy(model: Any, prompts: list[list[int]], continuation: list[int]) -> bool:
    """Whether each token is the likeliest of the mixture, by weighing rows one token after the other."""
    weights = [1.0] * len(prompts)
    for i, token in enumerate(continuation):
        chances = [plain_logits(model, prompt + continuation[:i])[-1].softmax(-1) for prompt in prompts]
        mixed = sum(weight * chance for weight, chance in zip(weights, chances, strict=True))
        if int(torch.as_tensor(mixed).argmax()) != token:
            return False
        weights = [weight * float(chance[token]) for weight, chance in zip(weights, chances, strict=True)]
    return True


def test_the_greedy_continuation_is_told_from_others():
    one = thinker()
    written = [place.token for place in one.generate(TEXT, max_tokens=3, think_every=3, thoughts=2, temperature=0.0)]
    other = [*written[:-1], 5 if written[-1] != 5 else 6]
    [(likely, greedy), (unlikely, wrong)] = one.score([(TOKENS, written), (TOKENS, other)], thoughts=2)
    assert (greedy, wrong) == (True, False)
    assert likely > unlikely


@pytest.mark.parametrize("every", [1, 2, 5])
def test_what_is_written_follows_the_mixture_of_the_last_thoughts(every: int):
    one = thinker()
    places = list(one.generate(TEXT, max_tokens=5, think_every=every, thoughts=3, seed=1))
    tokens = [*TOKENS, *(place.token for place in places)]
    assert [place.at for place in places] == list(range(5, 10))
    assert [bool(place.thoughts) for place in places] == [i % every == 0 for i in range(5)]
    for start in range(0, 5, every):
        said = one.next_token(tokens[: 5 + start], thoughts=3, seed=1)
        assert places[start].thoughts == said.thoughts
        stretch = places[start : start + every]
        prompts = rows(one, tokens[: 5 + start], said)
        total = mean_of_sequences(one.model, prompts, [place.token for place in stretch])
        assert sum(place.logp for place in stretch) == pytest.approx(total, abs=1e-4)
    with torch.no_grad():
        plain = plain_targets(one.model, TOKENS, tokens[5:])
    assert [place.nothink for place in places] == pytest.approx(plain.tolist(), abs=1e-4)
    assert "".join(place.text for place in places) == " " + one.tokenizer.decode(tokens[5:])


def test_a_text_comes_token_by_token_and_again_with_the_same_seed():
    one = thinker()
    streaming = one.generate(TEXT, max_tokens=50, seed=3)
    first = [next(streaming) for _ in range(3)]
    assert first == list(one.generate(TEXT, max_tokens=3, seed=3))
    assert [place.token for place in first] != [place.token for place in one.generate(TEXT, max_tokens=3, seed=4)]
    assert all(place.logp == place.nothink for place in one.generate(TEXT, max_tokens=3, thoughts=0))


def test_sampled_tokens_have_the_frequencies_of_the_mixture():
    one = thinker()
    wanted = one.next_token(TEXT, thoughts=0).logp.exp()
    drawn = [next(one.generate(TEXT, max_tokens=1, thoughts=0, seed=seed)).token for seed in range(150)]
    found = torch.bincount(torch.tensor(drawn), minlength=len(WORDS)) / 150
    assert float((found - wanted).abs().max()) < 4 * math.sqrt(0.25 / 150)


LONGER = [5, 6, 7, 8, 9, 10, 5, 8, 6, 7]


@torch.no_grad()
def plain_entropies(model: Any, tokens: list[int]) -> list[float]:
    """Of the next token after each prefix, from one plain forward in float64."""
    logp = plain_logits(model, tokens).double().log_softmax(-1)
    return (-(logp.exp() * logp).sum(-1)).tolist()


def bound(entropies: list[float]) -> float:
    """In the middle of two neighbouring values, about half of which are above."""
    values = sorted(entropies)
    return sum(values[len(values) // 2 - 1 : len(values) // 2 + 1]) / 2


def test_a_text_is_thought_about_where_the_model_is_unsure():
    one = thinker(qwen3(scale=0.5))
    entropies = plain_entropies(one.model, LONGER)[:-1]
    least = bound(entropies)
    always, found = (one.gains(LONGER, thoughts=3, think_when=when) for when in (None, f"entropy > {least}"))
    assert [place.entropy for place in found] == pytest.approx(entropies, abs=1e-5)
    assert 0 < sum(value > least for value in entropies) < len(entropies)
    for place, whole, value in zip(found, always, entropies, strict=True):
        assert (place.at, place.token, place.text, place.nothink) == (whole.at, whole.token, whole.text, whole.nothink)
        assert place.thoughts == (whole.thoughts if value > least else ())
        assert place.logp == pytest.approx(whole.logp if value > least else place.nothink, abs=1e-5)
        assert value > least or place.gain == 0


@pytest.mark.parametrize("every", [1, 2, 4, 20])
def test_the_likelihood_of_a_text_that_is_thought_about_where_the_model_is_unsure(every: int):
    """Thoughts hold for `every` tokens; then the next position above the bound is looked for."""
    one = thinker(qwen3(scale=0.5))
    entropies = plain_entropies(one.model, LONGER)
    least, total, at, begun = bound(entropies[1:-1]), 0.0, 2, []
    while at < len(LONGER):
        if entropies[at - 1] > least:
            prompts = rows(one, LONGER[:at], one.next_token(LONGER[:at], thoughts=3))
            total += mean_of_sequences(one.model, prompts, LONGER[at : at + every])
            begun.append(at)
            at += every
        else:
            with torch.no_grad():
                total += float(plain_targets(one.model, LONGER[:at], LONGER[at : at + 1]))
            at += 1
    how = {"thoughts": 3, "think_every": every, "given": 2}
    assert begun
    assert one.log_likelihood(LONGER, think_when=f"entropy > {least}", **how) == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("every", [1, 2])
def test_a_text_is_written_with_thoughts_where_the_model_is_unsure(every: int):
    one = thinker(qwen3(scale=0.5))
    how: dict[str, Any] = {"max_tokens": 14, "think_every": every, "thoughts": 3, "seed": 1}
    least = bound([place.entropy for place in one.generate(TEXT, **how)])
    places = list(one.generate(TEXT, think_when=f"entropy >= {least}", **how))
    tokens = [*TOKENS, *(place.token for place in places)]
    entropies = plain_entropies(one.model, tokens)[len(TOKENS) - 1 : -1]
    with torch.no_grad():
        plain = plain_targets(one.model, TOKENS, tokens[5:]).tolist()
    assert [place.entropy for place in places] == pytest.approx(entropies, abs=1e-4)
    assert [place.nothink for place in places] == pytest.approx(plain, abs=1e-4)
    step, skipped = 0, 0
    while step < len(places):
        context = tokens[: 5 + step]
        if entropies[step] >= least:
            said = one.next_token(context, thoughts=3, seed=1)
            stretch = places[step : step + every]
            assert [place.thoughts for place in stretch] == [said.thoughts, *[()] * (len(stretch) - 1)]
            total = mean_of_sequences(one.model, rows(one, context, said), [place.token for place in stretch])
            assert sum(place.logp for place in stretch) == pytest.approx(total, abs=1e-4)
            step += every
        else:
            assert places[step].thoughts == ()
            assert places[step].gain == 0
            step, skipped = step + 1, skipped + 1
    assert 0 < skipped < len(places)


PAIRS = [(TOKENS[:3], [8, 9]), ([6, 5], [10]), (TOKENS[:3], [10]), ([9, 7, 5], [7, 7, 7]), ([9], [5])]


def everything(one: ThinkingModel, every: int, **how: Any) -> tuple[Any, ...]:
    greedy = Sampling(limit=3, temperature=0.0)
    return (
        one.gains(LONGER, **how),
        one.log_likelihood(LONGER, think_every=every, **how),
        list(one.generate(LONGER, max_tokens=4, think_every=every, **how)),
        one.score(PAIRS, **how),
        one.answer([context for context, _ in PAIRS], greedy, [0] * len(PAIRS), **how),
    )


@pytest.mark.parametrize("every", [1, 3])
def test_a_bound_that_all_or_no_predictions_exceed(every: int):
    """-1 nats: as without a rule. Above log(vocabulary): as without thoughts."""
    one = thinker(qwen3(scale=0.5))
    assert everything(one, every, thoughts=2, think_when="entropy > -1") == everything(one, every, thoughts=2)
    most = f"entropy > {math.log(len(WORDS)) + 1e-3}"
    plain = everything(one, every, thoughts=0)
    assert everything(one, every, thoughts=2, think_when=most) == plain
    assert everything(one, every, thoughts=0, think_when="entropy > -1") == plain
    assert all(place.gain == 0 and place.thoughts == () for place in [*plain[0], *plain[2]])


def test_contexts_are_thought_about_where_the_model_is_unsure():
    one = thinker(qwen3(scale=0.5))
    contexts = [context for context, _ in PAIRS]
    entropies = [plain_entropies(one.model, context)[-1] for context in contexts]
    least = bound(sorted({round(value, 9) for value in entropies}))
    rule, greedy = f"entropy > {least}", Sampling(limit=3, temperature=0.0)
    scores = [one.score(PAIRS, thoughts=count, think_when=when) for count, when in ((3, rule), (3, None), (0, None))]
    answers = one.answer(contexts, greedy, [0] * len(PAIRS), think_when=rule)
    assert len({value > least for value in entropies}) == 2
    for value, answer, (found, with_thoughts, without) in zip(
        entropies, answers, zip(*scores, strict=True), strict=True
    ):
        wanted = with_thoughts if value > least else without
        assert found[0] == pytest.approx(wanted[0], abs=1e-5)
        assert (answer.thought is not None) == (value > least)


def test_where_not_to_think_is_found_in_one_forward_pass_of_the_text():
    one = thinker()
    widths: list[int] = []
    one.model.model.layers[0].register_forward_pre_hook(lambda layer, hidden: widths.append(hidden[0].shape[1]))
    never = {"thoughts": 2, "think_when": "entropy > 9"}
    one.gains(LONGER, **never)
    one.log_likelihood(LONGER, **never)
    assert widths == [len(LONGER) - 1] * 2
    widths.clear()
    written = list(one.generate(LONGER, max_tokens=5, **never))
    assert widths == [len(LONGER), *[1] * (len(written) - 1)]


@torch.no_grad()
def test_greedy_thoughts_are_the_likeliest_tokens():
    """At temperature 0, by plain forwards; and at method.temperature they are those of any other call."""
    one = thinker()
    (thought, again), (same,) = one._think([TOKENS], 2, [0], 0.0)[0], one._think([TOKENS], 1, [7], 0.0)[0]
    assert thought == again == same
    read, first = one.form.prompt_tokens(TOKENS), True
    for token in thought.tokens:
        logits = plain_logits(one.model, read)[-1]
        logits[CLOSE] = -torch.inf if first else logits[CLOSE]
        assert token == int(logits.argmax())
        read, first = [*read, token], False
    assert one._think([TOKENS], 3, [0], one.config.method.temperature) == one._think([TOKENS], 3, [0])
    assert len(set(one._think([TOKENS], 8, [0], 2.0)[0])) > 1


@pytest.mark.parametrize(
    ("options", "shortest"), [({}, 1), ({"allow_empty": True}, 0), ({"min_thought_length": 3}, 3)], ids=str
)
def test_thoughts_are_as_short_as_training_allowed(options: dict[str, Any], shortest: int, tmp_path: Path):
    """With logits that all but close at once, a thought closes as soon as it may."""
    save_thinking_options(tmp_path, config(thought_length=5, **options))
    saved = from_dict(merge(load_thinking_options(str(tmp_path)), {"model": {"device": "cpu"}}))
    one = ThinkingModel(biased({CLOSE: 30.0}), word_tokenizer(), saved)
    [engine] = one.next_token(TEXT).thoughts
    [[greedy]] = one._think([TOKENS], 1, [0], 0.0)
    assert [thought.closed for thought in (engine, greedy)] == [True, True]
    assert [len(thought.tokens) for thought in (engine, greedy)] == [shortest, shortest]


def test_writing_stops_at_an_end_token():
    model = qwen3()
    one = thinker(model)
    whole = [place.token for place in one.generate(TEXT, max_tokens=6, temperature=0.0)]
    model.generation_config.eos_token_id = [whole[2]]
    cut = [place.token for place in thinker(model).generate(TEXT, max_tokens=6, temperature=0.0)]
    assert cut == whole[: whole.index(whole[2]) + 1]


def test_characters_of_several_tokens_come_whole():
    tokenizer = byte_level(["abc"], True)
    one = thinker(qwen3(vocab=len(tokenizer)), tokenizer, open="(", close=")")
    text = "aé😀b"
    places = one.gains(text, thoughts=0)
    assert len(places) + 1 == len(one.encode(text)) > len(text)
    assert "".join(place.text for place in places) == "é😀b"
    tokens = one.encode(text)
    grown = [one._added_text(tokens[:end]) for end in range(1, len(tokens) + 1)]
    assert "".join(grown) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(grown)


def test_a_template_and_long_delimiters():
    one = ThinkingModel(
        qwen3(),
        word_tokenizer(bos=True),
        config(thought_length=5, open="<think> a b", close="</think> a a", prompt="b c {context} d"),
    )
    assert one.form == thought_format(one.tokenizer, one.config.method) == dataclasses.replace(LONG, vocabulary=12)
    found = one.next_token([2, *TOKENS], thoughts=2)
    prompts = [[*one.form.prompt_tokens([2, *TOKENS]), *some.tokens, *one.form.close] for some in found.thoughts]
    assert prompts[0][:8] == [2, 6, 7, *TOKENS]
    [(logp, _)] = one.score([([2, *TOKENS], [6])], thoughts=2)
    assert logp == pytest.approx(float(found.logp[6]), abs=1e-5)
    assert logp == pytest.approx(mean_of_sequences(one.model, prompts, [6]), abs=1e-5)


def test_a_text_does_not_end_where_the_tokenizer_ends_documents():
    one = thinker(tokenizer=ending_tokenizer())
    assert one.tokenizer(TEXT)["input_ids"] == [2, *TOKENS, 11]
    assert one.encode(TEXT) == [2, *TOKENS]
    assert one.encode("") == [2]
    assert one.encode("a g") == [2, 5, 11]  # g is the EOS token here, and written
    found = one.next_token(TEXT, thoughts=0)
    assert torch.allclose(found.logp, plain_logits(one.model, [2, *TOKENS])[-1].log_softmax(-1), atol=1e-5)
    [written] = one.generate(TEXT, max_tokens=1, thoughts=0, temperature=0.0)
    assert (written.at, written.token) == (6, int(found.logp.argmax()))


def test_mixture_worked_by_hand():
    logp = torch.tensor([[0.5, 0.1], [0.25, 0.3]]).log()
    assert mixture(logp).exp().tolist() == pytest.approx([0.375, 0.2])
    assert FORM.open == (3,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: one.next_token([]), "text = ''"),
        (lambda one: one.next_token([5] * 125), "a text of 126 tokens with 9 for a thought takes 135 tokens"),
        (lambda one: one.gains([5] * 122), "a text of 122 tokens"),
        (lambda one: one.generate([5] * 100, max_tokens=40), "a text of 140 tokens"),
        (lambda one: one.generate(TEXT, max_tokens=0), "max_tokens = 0, think_every = 1: must be"),
        (lambda one: one.generate(TEXT, think_every=0), "max_tokens = 64, think_every = 0: must be"),
        (lambda one: one.generate(TEXT, temperature=-1.0), "temperature = -1.0: must be at least 0 and finite"),
        (lambda one: one.generate(TEXT, temperature=float("nan")), "temperature = nan: must be at least 0 and finite"),
        (lambda one: Sampling(limit=0, temperature=1.0), "limit = 0, top_p = 1.0: at least 1 token"),
        (lambda one: Sampling(limit=1, temperature=1.0, top_p=0.0), "limit = 1, top_p = 0.0: at least 1 token"),
        (lambda one: Sampling(limit=1, temperature=-1.0), "temperature = -1.0: must be at least 0 and finite"),
        (lambda one: one.answer([[]], GREEDY, [0]), "text = ''"),
        (lambda one: one.answer([[5, 12]], GREEDY, [0]), "token 12 is none of the model's, which are 0 to 11"),
        (lambda one: one.score([([5], [12])]), "token 12 is none"),
        (lambda one: one.score([([-1], [5])]), "token -1 is none"),
        (lambda one: one.score([([5], [])]), "at least one token each"),
        (lambda one: one.score([([5], [6]), ([5] * 4, [6] * 117)]), "a text of 121 tokens with 9 for a thought"),
        (lambda one: one.next_token("a \ud800"), "contains a lone surrogate"),
        (lambda one: one.gains([5, 12]), "token 12 is none of the model's, which are 0 to 11"),
        (lambda one: one.log_likelihood([5, -1]), "token -1 is none"),
        (
            lambda one: one.score([([5], [6])], thought_temperature=-1.0),
            "thought_temperature = -1.0: must be at least 0",
        ),
        (lambda one: one.gains(TEXT, thoughts=-1), "thoughts = -1: must be at least 0"),
        (lambda one: one.next_token(TEXT, thoughts=-1), "thoughts = -1: must be at least 0"),
        (lambda one: one.gains(TEXT, think_when="entropy < 1"), r"think_when = 'entropy < 1': must be \"entropy > NUM"),
        (lambda one: one.gains(TEXT, thoughts=0, think_when=""), "think_when = '': must be"),
        (lambda one: one.generate(TEXT, think_when="entropy > nan"), "think_when = 'entropy > nan'"),
        (lambda one: one.generate(TEXT, think_when="entropy > 1 or True"), "think_when = 'entropy > 1 or True'"),
        (lambda one: one.log_likelihood(TEXT, think_when="loss > 1"), "think_when = 'loss > 1'"),
        (lambda one: one.score([(TOKENS, [5])], think_when="entropy"), "think_when = 'entropy'"),
        (lambda one: one.answer([TOKENS], Sampling(limit=1, temperature=1.0), [0], think_when="1"), "think_when = '1'"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, message: str):
    with pytest.raises(UserError, match=message):
        call(thinker())


def test_no_contexts_have_no_answers():
    assert thinker().answer([], GREEDY, []) == []


def test_the_longest_text_that_is_taken_can_be_thought_about():
    one = thinker()
    assert len(one.gains([5] * 119, thoughts=1)) == 118
    assert len(list(one.generate([5] * 116, max_tokens=3))) == 3


def test_the_embedded_base_carries_how_it_thinks():
    one = ThinkingModel.load("embedded")
    quickstart = load("quickstart")
    kept = {
        name: getattr(one.config.method, name) for name in ("open", "close", "prompt", "thought_length", "temperature")
    }
    assert kept == {name: getattr(quickstart.method, name) for name in kept}
    changed = ThinkingModel.load("embedded", {"method": {"thought_length": 3}})
    assert changed.config.method.thought_length == 3
    found = changed.next_token("ball under blue . swap 1 blue green . now under", thoughts=2)
    assert all(len(thought.tokens) <= 3 for thought in found.thoughts)
    assert Method().thought_length == 2048
