"""Generation of texts: against transformers' own, whatever the batch, and where it stops."""

from typing import Any

import pytest
import torch

from forethought.data.positions import make_generator
from forethought.inference import Sampling, generate
from helpers.models import FORM, MODELS, qwen3

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 5, 6], [7, 7], [5, 6, 7]]


def never(tokens: Any) -> bool:
    return False


def streams(count: int) -> list[torch.Generator]:
    return [make_generator(0, i) for i in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_texts_are_those_of_transformers(name: str):
    model = MODELS[name]()
    texts = generate(model, FORM, PROMPTS, Sampling(limit=8, temperature=0.0), never, streams(5))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        row = torch.tensor([prompt])
        expected = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert text == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_sampled_texts_do_not_depend_on_the_batch(name: str):
    model = MODELS[name]()
    many = [[5 + (7 * i + j * j) % 7 for j in range(1 + i * 5 % 12)] for i in range(14)] + PROMPTS

    def texts(rows: int, order: list[int]) -> list[list[int]]:
        every, found = streams(len(many)), {}
        sampling = Sampling(limit=10, temperature=0.9, top_p=0.9)
        for start in range(0, len(order), rows):
            some = order[start : start + rows]
            drawn = generate(
                model, FORM, [many[i] for i in some], sampling, lambda tokens: tokens[-1] in (0, 1, 5),
                [every[i] for i in some],
            )  # fmt: skip
            found |= zip(some, drawn, strict=True)
        return [found[i] for i in range(len(many))]

    there, back = list(range(len(many))), list(range(len(many)))[::-1]
    whole = texts(len(many), there)
    assert whole == texts(1, there) == texts(4, back)
    assert whole[-5] != whole[-1], "one prompt, two streams"
    assert len({len(text) for text in whole}) > 2


def test_a_row_stops_with_the_token_that_stopped_it():
    model = qwen3()
    free = generate(model, FORM, PROMPTS, Sampling(limit=12, temperature=0.0), never, streams(5))
    ends = {text[3] for text in free}
    texts = generate(
        model, FORM, PROMPTS, Sampling(limit=12, temperature=0.0), lambda some: some[-1] in ends, streams(5)
    )
    for text, whole in zip(texts, free, strict=True):
        first = next(i for i, token in enumerate(whole) if token in ends)
        assert text == whole[: first + 1]


def test_the_limit():
    model = qwen3()
    sampling = Sampling(limit=3, temperature=0.0)
    texts = generate(model, FORM, PROMPTS, sampling, never, streams(5))
    assert [len(text) for text in texts] == [3] * 5
    assert generate(model, FORM, [], sampling, never, []) == []


@torch.no_grad()
def test_sampling_follows_the_distribution():
    model = qwen3()
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.8
    texts = generate(model, FORM, [[5, 6, 7]] * 3000, Sampling(limit=1, temperature=0.8), never, streams(3000))
    counts = torch.bincount(torch.tensor([text[0] for text in texts]), minlength=len(logits)) / 3000
    assert float((counts - logits.softmax(-1)).abs().max()) < 0.03
