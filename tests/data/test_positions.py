import re
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from forethought.config import Method, UserError
from forethought.data.positions import (
    Positions,
    at_positions,
    draw_positions,
    make_generator,
    marked,
    pad_rows,
    stride,
    thought_format,
    uniform,
)
from helpers.models import CLOSE, LONG, OPEN, A, window, word_tokenizer

LONG_WINDOW = window(*range(5, 25), marks=(3, 7, 12))


def chances(counts: torch.Tensor) -> float:
    """Chi-square of counts that should be equal, in standard deviations from what it should be."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("policy", ["uniform", "stride"])
def test_every_position_is_equally_likely(policy, count):
    options, generator = Method(position_policy=policy, horizon=3), make_generator(0)
    counts = torch.zeros(17)
    for _ in range(4000):
        for place in POLICIES[policy](LONG_WINDOW, count, options, generator):
            counts[place - 1] += 1
    assert counts.sum() == 4000 * count
    assert abs(chances(counts)) < 4


POLICIES = {"uniform": uniform, "stride": stride, "marked": marked}
METHODS = st.builds(
    Method,
    position_policy=st.sampled_from(sorted(POLICIES)),
    positions=st.integers(1, 14),
    horizon=st.integers(1, 3),
    marked_share=st.sampled_from([0.0, 0.5, 1.0]),
)


@given(options=METHODS, size=st.integers(4, 12), marks=st.sets(st.integers(0, 11)), seed=st.integers(0, 99))
@example(options=Method(position_policy="marked", positions=9, marked_share=1.0), size=6, marks={3}, seed=1)
def test_positions_are_distinct_and_in_range_and_as_many_as_there_are(options, size, marks, seed):
    count, horizon = options.positions, options.horizon
    places = tuple(mark for mark in sorted(marks) if mark < size)
    positions = draw_positions([window(*range(size), marks=places)], options, make_generator(seed))
    at = positions.at.tolist()
    assert len(at) == min(count, size - horizon)
    assert at == sorted(set(at))
    assert all(1 <= t <= size - horizon for t in at)
    assert positions.contexts() == [list(range(t)) for t in at]
    assert positions.targets().tolist() == [list(range(t, t + horizon)) for t in at]


def test_stride_is_evenly_spaced():
    options = Method(position_policy="stride")
    starts = set()
    for seed in range(50):
        places = POLICIES["stride"](window(*range(21)), 4, options, make_generator(seed))
        assert [b - a for a, b in pairwise(places)] == [5, 5, 5]
        starts.add(places[0])
    assert starts == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_marked_share_is_the_chance_of_a_marked_token(share):
    options, generator, draws = Method(marked_share=share), make_generator(0), 4000
    hits = sum(POLICIES["marked"](LONG_WINDOW, 1, options, generator)[0] in (3, 7, 12) for _ in range(draws))
    expected = share + (1 - share) * 3 / 19
    assert abs(hits / draws - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5 + 1e-9


def test_marked_ignores_marks_that_cannot_be_predicted_in_full():
    options = Method(marked_share=1.0, horizon=2)
    text = window(*range(10), marks=(0, 9))
    seen = {POLICIES["marked"](text, 1, options, make_generator(seed))[0] for seed in range(200)}
    assert seen == set(range(1, 9))


def test_streams_are_repeatable_and_independent():
    def numbers(*keys: object) -> list[float]:
        return torch.rand(4, generator=make_generator(*keys)).tolist()

    assert numbers(0, "thoughts", 3, 1) == numbers(0, "thoughts", 3, 1)
    keys = [(0, "thoughts", 3, 1), (1, "thoughts", 3, 1), (0, "positions", 3, 1), (0, "thoughts", 1, 3), (0, "x", 31)]
    assert len({tuple(numbers(*key)) for key in keys}) == len(keys)
    draws = torch.stack([torch.rand(64, generator=make_generator(seed, "thoughts", 1)) for seed in range(64)])
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.6


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any), st.integers(1, 9))
def test_chunks_keep_windows_whole_and_lose_nothing(counts, size):
    windows = [window(*range(10 * i, 10 * i + 9)) for i in range(len(counts))]
    positions = at_positions(windows, [list(range(1, 1 + count)) for count in counts], horizon=2)
    chunks = list(positions.chunks(size))
    assert [context for chunk in chunks for context in chunk.contexts()] == positions.contexts()
    assert torch.equal(torch.cat([chunk.targets() for chunk in chunks]), positions.targets())
    owners = [{chunk.windows[w].tokens[0] for w in chunk.window.tolist()} for chunk in chunks]
    assert sum(len(owner) for owner in owners) == len(set().union(*owners)) == sum(count > 0 for count in counts)
    assert all(len(chunk) <= size or len(owner) == 1 for chunk, owner in zip(chunks, owners, strict=True))
    for one, following in pairwise(chunks):
        first = int((following.window == following.window[0]).sum())
        assert len(one) + first > size


def test_positions_example():
    positions = Positions(windows=(window(7, 8, 9),), window=torch.tensor([0]), at=torch.tensor([2]), horizon=1)
    assert positions.contexts() == [[7, 8]]
    assert positions.targets().tolist() == [[9]]


def test_the_end_of_the_context_is_repeated_after_the_delimiter():
    form = thought_format(word_tokenizer(), Method(close="</think> b", repeat_context=2))
    assert form.bridge([7, 8, 9]) == [CLOSE, 6, 8, 9]
    assert form.bridge([7]) == [CLOSE, 6, 7, 7]  # as long at the second token of a text
    assert form.overhead == 5


def test_thought_format_encodes_delimiters_and_template():
    options = Method(open="<think> a", close="</think> b", prompt="c d {context} e")
    form = thought_format(word_tokenizer(), options)
    assert (form.before, form.after) == ((7, 8), (9,))
    assert (form.open, form.close) == ((OPEN, A), (CLOSE, 6))
    assert (form.bos, form.pad, form.overhead) == (None, 0, 7)
    assert thought_format(word_tokenizer(bos=True), Method()).bos == 2


def letters() -> PreTrainedTokenizerFast:
    """Knows the letter a, has no unknown token and leaves out what it does not know."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0}, [])))


@pytest.mark.parametrize("option", ["open", "close", "prompt"])
@pytest.mark.parametrize("make", [word_tokenizer, letters], ids=["unknown token", "no unknown token"])
def test_text_that_the_tokenizer_cannot_encode_is_refused(option, make):
    texts = {"open": "a", "close": "a", "prompt": "{context}"}
    texts[option] = "none {context}" if option == "prompt" else "none"
    with pytest.raises(UserError, match=re.escape(f"method.{option} = 'none")):
        thought_format(make(), Method(**texts))


def test_ids_that_the_tokenizer_lacks_are_holes():
    vocabulary = {"<u>": 0, "a": 1, "b": 4, "]": 6}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [], unk_token="<u>")))
    form = thought_format(tokenizer, Method(open="a", close="]", prompt="", end="b"))
    assert (form.vocabulary, form.holes, form.pad) == (7, (2, 3, 5), 0)
    known = form.decodable(torch.zeros(2, 9)).isfinite()
    assert known.tolist() == [[True, True, False, False, True, False, True]] * 2
    assert torch.equal(form.decodable(torch.ones(4)), torch.tensor([1, 1, -torch.inf, -torch.inf]))


def test_a_template_may_hold_the_unknown_token_by_name():
    """GPT-2 has one token for unknown text and the end of a text."""
    tokenizer = word_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token = "g"
    form = thought_format(tokenizer, Method(open="<think>", close="</think>", prompt="{context} g", end="g"))
    assert form.after == form.end == (tokenizer.eos_token_id,)


def test_blank_delimiter_is_refused():
    with pytest.raises(UserError, match=re.escape("method.close = '  '")):
        thought_format(word_tokenizer(), Method(close="  "))


def test_template_goes_behind_a_leading_bos():
    assert LONG.prompt_tokens([2, 9, 10]) == [2, 6, 7, 9, 10, 8, OPEN, 5, 6]
    assert LONG.prompt_tokens([9, 2]) == [6, 7, 9, 2, 8, OPEN, 5, 6]
    form = thought_format(word_tokenizer(), Method(prompt="c {context} d"))
    assert form.prompt_tokens([2, 9]) == [7, 2, 9, 8, OPEN]


def test_pad_rows_by_hand():
    tokens, mask = pad_rows([[1, 2], [3]], pad=9, left=True)
    assert tokens.tolist() == [[1, 2], [9, 3]]
    assert mask.tolist() == [[True, True], [False, True]]
    tokens, mask = pad_rows([[1, 2], [3]], pad=9, left=False)
    assert tokens.tolist() == [[1, 2], [3, 9]]
    assert mask.tolist() == [[True, True], [True, False]]
