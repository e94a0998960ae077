"""When a thought closes: by the text that its tokens spell, in byte-level, SentencePiece and word vocabularies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forethought.config import Method
from forethought.data.positions import thought_format
from forethought.data.token_bytes import Closing
from helpers.models import FORM, LONG, word_tokenizer
from helpers.tokenizers import byte_level

CORPUS = ["so it is ]. and [ that ]} or ]) then ]," * 3, "a </think>\n b </think>. c"] * 9


def sentencepiece() -> PreTrainedTokenizerFast:
    """Unigram pieces with a space before the first word, as in Llama 2 and Gemma."""
    pieces = [
        ("<unk>", 0.0),
        ("\u2581", -2.0),
        ("\u2581]", -3.0),
        ("]", -3.0),
        ("].", -3.5),
        ("a", -4.0),
        ("\u2581a", -4.0),
    ]
    plain = Tokenizer(models.Unigram([*pieces, *((f"<0x{byte:02X}>", -9.0) for byte in range(256))], 0, True))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")


@given(
    st.lists(st.text("ab<", max_size=3), min_size=1, max_size=6),
    st.text("ab<", min_size=1, max_size=4),
    st.lists(st.integers(0, 6), max_size=12),
)
def test_a_thought_closes_where_its_text_contains_the_delimiter(texts: list[str], delimiter: str, tokens: list[int]):
    """Tokens beyond the texts add nothing."""
    closing = Closing([*texts, ""], delimiter, (0,))
    spelled = [texts[token] if token < len(texts) else "" for token in tokens]
    wanted = [n for n in range(1, len(tokens) + 1) if delimiter in "".join(spelled[:n])]
    assert closing.length(tokens) == (wanted[0] if wanted else None)
    state = torch.zeros(1, dtype=torch.long)
    for n, token in enumerate(tokens, 1):
        state = closing.step(state, torch.tensor([token]))
        assert bool(state == closing.done) == (bool(wanted) and n >= wanted[0])
    assert set(closing.first.tolist()) == {i for i, text in enumerate(texts) if delimiter in text} | {0}


@pytest.mark.parametrize("form", [FORM, LONG], ids=["one", "three"])
def test_without_texts_a_thought_closes_with_the_delimiter_itself(form):
    assert form.closing.length([5, 6, *form.close]) == 2 + len(form.close)
    assert form.closing.length([5, 10_000, *form.close[:-1], 10_000, *form.close[1:-1]]) is None
    assert form.closing.first.tolist() == [form.close[0]]


@pytest.mark.parametrize("close", ["]", "</think>"])
def test_byte_level_tokens_that_hold_the_delimiter(close: str):
    tokenizer = byte_level(CORPUS, trim=False)
    form = thought_format(tokenizer, Method(close=close))
    for text in (f"so{close}. then", f"so {close}", f"a{close}\n", f"{close}, b"):
        tokens = tokenizer.encode(text)
        length = form.closing.length(tokens)
        assert length is not None
        assert close in tokenizer.decode(tokens[:length])
        assert close not in tokenizer.decode(tokens[: length - 1])
        inside = form.content(tokens[:length], closed=True)
        assert close not in tokenizer.decode(inside)
        assert tokens[: len(inside)] == inside
    assert form.closing.length(tokenizer.encode("nothing [ of < / think > the kind")) is None


def test_what_begins_the_delimiter_is_read_once():
    tokenizer = byte_level(["x"], trim=False)  # single bytes
    form = thought_format(tokenizer, Method(close="</t>"))
    tokens = tokenizer.encode("so</t>")
    assert form.content(tokens, closed=True) == tokenizer.encode("so")
    assert form.content(tokens[:-2], closed=False) == tokens[:-2]


def test_a_delimiter_that_is_encoded_with_a_space_of_its_own():
    """Running text never has the piece `_]`."""
    tokenizer = sentencepiece()
    form = thought_format(tokenizer, Method(open="a", close="]"))
    assert tokenizer.convert_ids_to_tokens(form.close) == ["\u2581]"]
    for written in (["a", "]"], ["a", "]."], ["a", "\u2581]"], ["a", "<0x5D>"]):
        assert form.closing.length([*tokenizer.convert_tokens_to_ids(written), 5]) == 2


def test_words_and_delimiters_that_the_tokenizer_changes():
    form = thought_format(word_tokenizer(), Method())
    assert form.closing.length([5, 6, 4, 5]) == 3
    assert form.closing.first.tolist() == [4]
    lower = Tokenizer(models.WordLevel({"<unk>": 0, "end": 1, "a": 2, "the": 3}, unk_token="<unk>"))
    lower.pre_tokenizer, lower.normalizer = pre_tokenizers.WhitespaceSplit(), None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=lower, unk_token="<unk>")
    assert thought_format(tokenizer, Method(open="a", close=" end ")).closing.length([2, 3, 1]) == 3
