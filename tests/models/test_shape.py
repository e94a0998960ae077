"""Shapes read off configs, against the models that transformers builds of them."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma3Config, Qwen3Config

from forethought.config import UserError
from forethought.models.compute_copy import Teacher
from forethought.models.shape import FAMILIES, Attention, Shape, memory
from helpers.architectures import CONFIGS, model
from helpers.models import gpt2


def floats(value: Any) -> int:
    """Bytes of all tensors of floating-point numbers somewhere in a cache."""
    if torch.is_tensor(value):
        return value.nbytes if value.dtype.is_floating_point else 0
    if isinstance(value, dict):
        return sum(map(floats, value.values()))
    return sum(map(floats, value)) if isinstance(value, list) else 0


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name: str):
    assert Shape.of(CONFIGS[name]).parameters == sum(one.numel() for one in model(name).parameters())


def test_every_family_has_a_model_here():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


def test_other_architectures_are_refused_by_name():
    for config in (gpt2().config, Gemma3Config()):
        with pytest.raises(
            UserError, match=rf"^model_type = '{config.model_type}': its FLOPs are not known; known are bamba"
        ):
            Shape.of(config)
        assert Shape.known(config) is None
    assert Shape.known(CONFIGS["llama"]) == Shape.of(CONFIGS["llama"])


def test_windows_follow_the_layers():
    def windows(name: str) -> list[int | None]:
        return [one.window for one in Shape.of(CONFIGS[name]).attention]

    assert windows("llama") == windows("mixtral") == [None, None, None]
    assert windows("mistral") == [5, 5, 5]
    assert windows("qwen2") == windows("qwen3") == [None, None, 5]
    assert windows("gemma2") == windows("gemma3_text") == [5, None, 5]


def test_a_config_without_head_dim_divides_its_width():
    [one, *_] = Shape.of(CONFIGS["smollm3"]).attention
    assert one == Attention(heads=4, kv_heads=2, head_dim=6, window=None)


def test_qwen3_1_7b_by_hand():
    """The published shape: 28 layers of 16 heads of 128 with 8 key heads, 2048 wide, MLP 6144, tied."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    shape = Shape.of(config)
    layer = 2048 * 2048 * 2 + 2048 * 1024 * 2 + 3 * 2048 * 6144
    assert shape.multiplied == 28 * layer == 1_409_286_144
    assert shape.parameters == 28 * (layer + 2 * 2048 + 2 * 128) + 151936 * 2048 + 2048 == 1_720_574_976
    assert memory(shape, 1024, element=2).cache == 1024 * 28 * 2 * 8 * 128 * 2


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [2, 11])
def test_cache_bytes_are_those_of_the_tensors(name: str, tokens: int):
    policy = model(name)
    cache = DynamicCache(config=policy.config)
    with torch.no_grad():
        policy(input_ids=torch.ones(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert memory(Shape.of(policy.config), tokens).cache == sum(floats(vars(layer)) for layer in cache.layers)


@pytest.mark.parametrize("name", ["llama-biased-tied", "nemotron_h"])
def test_training_bytes_are_those_of_the_tensors(name: str):
    policy = model(name)
    teacher = Teacher(policy, 0.9)
    optimizer = torch.optim.AdamW(policy.parameters())
    policy(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False).logits.sum().backward()
    optimizer.step()
    moments = [one[name] for one in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    expected = memory(Shape.of(policy.config), 0)
    assert expected.weights == sum(one.nbytes for one in policy.parameters())
    assert expected.gradients == sum(one.grad.nbytes for one in policy.parameters())
    assert expected.optimizer == sum(one.nbytes for one in moments)
    assert expected.teacher == sum(one.nbytes for one in teacher.model.parameters())
    assert expected.training == 20 * Shape.of(policy.config).parameters
