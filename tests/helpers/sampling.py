"""The same thoughts by two engines."""

import dataclasses
from typing import Any

import torch

from forethought.config import Config, Method
from forethought.data.positions import ThoughtFormat, draw_positions, make_generator
from forethought.rollout import Thoughts, draw_noise
from forethought.rollout.cuda_graphs import CUDAGraphDecoder
from forethought.rollout.native import NativeEngine
from helpers.models import (
    WINDOWS,
    engine,
    qwen3,
)


def biased(bias: dict[int, float]) -> Any:
    """A model whose logits of some tokens are moved by a constant."""
    model = qwen3(scale=0.1)
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        for token, amount in bias.items():
            head.bias[token] = amount
    model.lm_head = head
    return model


def both(model: Any, form: ThoughtFormat, settings: Config, rows: int, horizon: int = 1) -> tuple[Thoughts, Thoughts]:
    options = dataclasses.replace(settings.method, horizon=horizon)
    positions = draw_positions(WINDOWS, options, make_generator(1))
    noise = draw_noise((options.group, options.thought_length), [make_generator(2, i) for i in range(len(positions))])
    eager = engine(model, settings, form).sample(positions, noise)
    return eager, cuda_graphs(model, form, options, rows).sample(positions, noise)


def cuda_graphs(model: Any, form: ThoughtFormat, options: Method, rows: int = 256) -> NativeEngine:
    """An engine that decodes as with CUDA graphs; on a CPU nothing is captured."""
    decoder = CUDAGraphDecoder(model, form, options, rows, compiled=False)
    return NativeEngine(model, form, options, rows, graphs=decoder)


def assert_same(one: Thoughts, other: Thoughts) -> None:
    for name in ("tokens", "mask", "closed", "hit"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("logp", "evidence"):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-5), name
