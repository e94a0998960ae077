"""Texts from any Hugging Face causal LM: one prefill, then batched decoding with a KV cache until each row stops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from forethought.models.logprobs import mask_token
from forethought.rollout.copies import COMPACT, read_copies
from forethought.rollout.decoder import sample

Stop = Callable[[Sequence[int]], bool]  # whether a row that has generated these tokens is done


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw tokens, how many, and for how many rows at once."""

    limit: int  # longest text, in generated tokens
    temperature: float  # 0 takes the likeliest token
    top_p: float = 1.0
    rows: int = 64  # changes speed and memory, not the result
    not_first: int | None = None  # a token that no text begins with, such as a thought's closing delimiter


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Stop,
    streams: Sequence[torch.Generator],
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The tokens that follow each prompt, with the one that stopped it; at least one each.

    Prompt i draws from streams[i] alone, so its text does not depend on how prompts are split into batches (up to the
    rounding of a row that is padded to another width). `progress` is told after each batch how many prompts it held.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))  # like beside like
    for start in range(0, len(order), sampling.rows):
        batch = order[start : start + sampling.rows]
        noise = torch.stack([torch.rand(sampling.limit, generator=streams[i]) for i in batch])
        found = _batch(model, [prompts[i] for i in batch], sampling, stop, noise.to(model.device))
        for i, tokens in zip(batch, found, strict=True):
            texts[i] = tokens
        progress(len(batch))
    return texts


def _batch(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Stop, noise: Float[Tensor, "row limit"]
) -> list[list[int]]:
    copies, logits = read_copies(model, prompts, pad=0)
    texts: list[list[int]] = [[] for _ in prompts]
    rows, running = list(range(len(prompts))), [True] * len(prompts)  # which rows the cache holds; which go on
    for step in range(sampling.limit):
        if step == 0 and sampling.not_first is not None:
            logits = mask_token(logits, sampling.not_first)
        drawn = _draw(logits, noise[rows, step], sampling)
        for place, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            if running[place]:
                texts[row].append(token)
                running[place] = not stop(texts[row])
        if not any(running) or step + 1 == sampling.limit:
            break
        if sum(running) < COMPACT * len(rows):
            kept = [place for place, goes_on in enumerate(running) if goes_on]
            rows, running = [rows[place] for place in kept], [True] * len(kept)
            drawn = drawn[kept]
            copies.select(torch.tensor(kept, device=model.device))
        logits = copies.step(drawn)
    return texts


def _draw(logits: Float[Tensor, "row vocab"], noise: Float[Tensor, " row"], sampling: Sampling) -> Int[Tensor, " row"]:
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return sample(logits, noise, sampling.temperature, sampling.top_p)
