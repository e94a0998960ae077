"""A few held-out windows with thoughts at every position: RUN/documents.json, for the thought viewer of a page."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forethought.algo.metrics import decode_thoughts
from forethought.algo.objective import group_advantages
from forethought.algo.rewards import discounted
from forethought.data.corpus import Window, labels
from forethought.data.positions import Positions, at_positions, make_generator
from forethought.eval.controls import Progress
from forethought.eval.heldout import Subject
from forethought.models.logprobs import chunk_tokens, no_think_distribution, no_think_logp, thought_evidence
from forethought.rollout import draw_noise, thought_tokens

VERSION = 1
TOP = 5
"""Most likely tokens shown for each prediction."""


def documents(
    subject: Subject,
    reference: Any,
    windows: Sequence[Window],
    name: str,
    progress: Progress,
    *,
    every: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of documents.json (docs/metrics.md) for the first `evaluate.view` windows.

    `reference` is the model whose prediction without a thought is the baseline of the rewards: the EMA teacher of a
    run, else the base. `name` is the model that sampled the thoughts, at every `every`-th token from the second on.
    """
    chosen = windows[: subject.config.evaluate.view]
    chunked = [_chunks(subject, window, every) for window in chosen]
    total, done, shown = sum(len(chunk) for chunks in chunked for chunk in chunks), 0, []
    for window, label, chunks in zip(chosen, labels(chosen), chunked, strict=True):
        pieces = token_texts(subject.tokenizer, window.tokens)
        positions = []
        for chunk in chunks:
            positions += _positions(subject, reference, chunk, pieces, (seed, "view", label))
            done += len(chunk)
            progress("documents", done, total)
        shown.append({"document": label, "domain": window.domain, "tokens": pieces, "positions": positions})
    return {"version": VERSION, "model": name, "documents": shown}


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds. Joined, they are the text without what the tokenizer put before it (BOS).

    A token that completes no character adds nothing; the one that completes it adds the whole character.
    """
    found, start, shown = [], 0, 0
    for end, token in enumerate(tokens, start=1):
        if end == 1 and token == tokenizer.bos_token_id:
            found.append("")
            start = shown = 1
            continue
        before, after = _decode(tokenizer, tokens[start:shown]), _decode(tokenizer, tokens[start:end])
        if after.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            found.append("")
            continue
        found.append(after.removeprefix(before))
        start, shown = shown, end
    return found


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)


def _chunks(subject: Subject, window: Window, every: int) -> list[Positions]:
    """Every `every`-th position of a window, in chunks that decode together."""
    config = subject.config
    indices = list(range(1, len(window.tokens) - config.method.horizon + 1, every))
    size = max(1, config.train.rows // config.evaluate.view_thoughts)
    pieces = [indices[start : start + size] for start in range(0, len(indices), size)]
    return [at_positions([window], [piece], config.method.horizon) for piece in pieces]


@torch.no_grad()
def _positions(
    subject: Subject, reference: Any, chunk: Positions, pieces: list[str], keys: tuple[int, str, str]
) -> list[dict[str, Any]]:
    config, form, window = subject.config, subject.form, chunk.windows[0]
    at = chunk.at.tolist()
    shape = (config.evaluate.view_thoughts, config.method.thought_length)
    noise = draw_noise(shape, [make_generator(*keys, window.start + t) for t in at])
    thoughts = subject.engine.sample(chunk, noise)
    tokens = thought_tokens(thoughts, form)
    with subject.as_model(reference) as plainly:
        tokens_at_once = chunk_tokens(plainly, config.update.tokens_per_chunk)
        plain, _ = no_think_logp(plainly, chunk, tokens_at_once)
        before = no_think_distribution(plainly, chunk, tokens_at_once)
    value = discounted(thoughts.evidence, config.method.discount)
    columns = {
        "text": decode_thoughts(subject.tokenizer, tokens),
        "length": thoughts.lengths.tolist(),
        "closed": thoughts.closed.tolist(),
        "evidence": thoughts.evidence[..., 0].tolist(),
        "reward": (value - discounted(plain, config.method.discount)[:, None]).tolist(),
        "advantage": group_advantages(value).tolist() if shape[0] > 1 else [[None]] * len(at),
    }
    after = thought_evidence(subject.model, chunk, form, tokens, config.model.prefix == "shared")
    rows = []
    for i, t in enumerate(at):
        members = []
        for g in range(shape[0]):
            figures = {name: column[i][g] for name, column in columns.items()}
            members.append({**figures, "top": _top(subject, after[i, g], window.tokens[t - 1])})
        row = {"at": t, "target": pieces[t], "nothink": float(plain[i, 0])}
        rows.append({**row, "nothink_top": _top(subject, before[i, 0], window.tokens[t - 1]), "thoughts": members})
    return rows


def _top(subject: Subject, logp: Float[Tensor, " vocab"], previous: int) -> list[list[Any]]:
    """The most likely next tokens, as text that follows the previous token, with their probabilities."""
    best = logp.topk(min(TOP, len(logp)))
    lead = _decode(subject.tokenizer, [previous])
    found = []
    for token, value in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True):
        both = _decode(subject.tokenizer, [previous, token])
        alone = both.removeprefix(lead) if both.startswith(lead) else _decode(subject.tokenizer, [token])
        found.append([alone, value])
    return found
