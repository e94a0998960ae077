"""Multiple choice by likelihood: which continuation of a prompt the model finds likeliest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from forethought.data.positions import pad_rows
from forethought.models.logprobs import forward, log_probabilities
from forethought.tools.questions.answers import LETTERS
from forethought.tools.questions.prompts import Examples, cloze
from forethought.tools.questions.tasks import Question

Row = tuple[Sequence[int], Sequence[int]]  # context and continuation, in tokens
Step = Callable[[int], None]  # told of rows that are done


def continuation(tokenizer: Any, prompt: str, text: str) -> list[int]:
    """The tokens that a space and `text` add to a prompt, as the tokenizer joins them to it where it does."""
    whole, head = (list(tokenizer(part)["input_ids"]) for part in (f"{prompt} {text}", prompt))
    if whole[: len(head)] == head and len(whole) > len(head):
        return whole[len(head) :]
    return list(tokenizer.encode(f" {text}", add_special_tokens=False))


@torch.no_grad()
def continuation_logp(model: Any, rows: Sequence[Row], batch: int, progress: Step = lambda done: None) -> list[float]:
    """log p(continuation | context) at temperature 1 of each row, summed over its tokens, in nats.

    Rows that the model reads alike, such as one prompt before several single letters, are read once. `batch` rows are
    read at a time; `progress` is told after each how many rows of the input it settled.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, (context, tokens) in enumerate(rows):
        alike.setdefault((*context, *tokens[:-1]), []).append(i)
    found = [0.0] * len(rows)
    order = sorted(alike, key=len, reverse=True)
    for start in range(0, len(order), batch):
        read = order[start : start + batch]
        members = [alike[tokens] for tokens in read]
        width = max(len(rows[i][1]) for some in members for i in some)
        tokens, mask = (part.to(model.device) for part in pad_rows(read, 0, left=True))
        logits = forward(model, tokens, mask, keep=width)
        for place, some in enumerate(members):
            for i in some:
                wanted = torch.tensor(rows[i][1], device=logits.device)
                found[i] = float(log_probabilities(logits[place, -len(wanted) :], wanted).sum())
        progress(sum(map(len, members)))
    return found


def pick_letters(
    model: Any, questions: Sequence[Question], rows: Sequence[Sequence[Row]], batch: int, progress: Step
) -> list[dict[str, str]]:
    """The likeliest letter of each question, under `loglik_letter`; rows[i][j] asks question i for its j-th letter."""
    flat = [row for some in rows for row in some]
    scores = iter(continuation_logp(model, flat, batch, progress))
    return [{"loglik_letter": _best([next(scores) for _ in question.choices])} for question in questions]


def pick_texts(
    model: Any, tokenizer: Any, questions: Sequence[Question], asked: tuple[int, Examples, int], progress: Step
) -> list[dict[str, str]]:
    """The choice whose text is likeliest after the question without its choices, plain and per byte of the text.

    `asked` holds the worked examples to show, at most, those of the task's own file, and the rows to read at a time.
    """
    shots, examples, batch = asked
    prompts = [cloze(question, shots, examples) for question in questions]
    rows = [
        (list(tokenizer(prompt)["input_ids"]), continuation(tokenizer, prompt, choice))
        for prompt, question in zip(prompts, questions, strict=True)
        for choice in question.choices
    ]
    scores = iter(continuation_logp(model, rows, batch, progress))
    picks = []
    for question in questions:
        plain = [next(scores) for _ in question.choices]
        per_byte = [score / len(f" {choice}".encode()) for score, choice in zip(plain, question.choices, strict=True)]
        picks.append({"loglik_plain": _best(plain), "loglik_normalised": _best(per_byte)})
    return picks


def _best(scores: Sequence[float]) -> str:
    return LETTERS[max(range(len(scores)), key=lambda i: scores[i])]
