"""Families whose layers, heads or caches are odd: read right both ways, or refused with a hint that works."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forethought.config import Config, Model, UserError
from forethought.data.positions import at_positions, make_generator
from forethought.prefix import enable
from forethought.rollout import check_prefixes, draw_noise
from forethought.rollout.native import NativeEngine
from helpers.models import FORM, WINDOWS, collected, config, plain_targets, rlp

SMALL = {
    "vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DENSE = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 40, "head_dim": 8}
SEES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {**SMALL, "ffn_dim": 40, "word_embed_proj_dim": 24},
    "gemma3": {
        "text_config": {**DENSE, "sliding_window": 5}, "vision_config": {**SEES, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4, "image_token_id": 28, "boi_token_index": 27, "eoi_token_index": 26,
    },
    "llama4_text": {**DENSE, "num_local_experts": 2, "intermediate_size_mlp": 40, "attention_chunk_size": 8},
    "zamba2": {
        **SMALL, "intermediate_size": 40, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8,
        "n_mamba_heads": 4, "num_mem_blocks": 1,
    },
    "recurrent_gemma": {
        **DENSE, "lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"],
    },
}  # fmt: skip
EXPERTS = {**DENSE, "num_experts_per_tok": 2, "sliding_window": 20}
WINDOWED: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        **EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "use_sliding_window": True, "max_window_layers": 1,
    },
    "phimoe": {**EXPERTS, "num_local_experts": 4},
    "olmoe": {**EXPERTS, "num_experts": 4},
}  # fmt: skip
BOTH = [(name, prefix) for name in ("opt", "gemma3", "zamba2") for prefix in ("shared", "replicated")]


def family(name: str) -> Any:
    """Weights that are large enough for attention to matter."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**FAMILIES, **WINDOWED}[name]))
            .float()
            .eval()
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def options(prefix: Any) -> Config:
    return Config(model=Model(prefix=prefix))


@pytest.mark.parametrize(("name", "prefix"), [*BOTH, ("llama4_text", "replicated")])
def test_thoughts_and_their_scores_are_those_of_plain_passes(name: str, prefix: str):
    model = family(name)
    check_prefixes(model, options(prefix))
    positions = at_positions(WINDOWS[:2], [[1, 2], [2, 4]], 1)
    noise = draw_noise((3, 5), [make_generator(0, i) for i in range(4)])
    thoughts = NativeEngine(model, FORM, config().method, 128, prefix == "shared").sample(positions, noise)
    rows = zip(positions.contexts(), positions.targets().tolist(), thoughts.evidence, strict=True)
    for i, (context, targets, evidence) in enumerate(rows):
        for g in range(3):
            said = thoughts.tokens[i, g][thoughts.mask[i, g]].tolist()
            read = [*FORM.prompt_tokens(context), *FORM.content(said, bool(thoughts.closed[i, g])), *FORM.close]
            with torch.no_grad():
                assert torch.allclose(evidence[g], plain_targets(model, read, targets), atol=1e-4)


@pytest.mark.parametrize("name", ["zamba2", "gemma3"])
def test_gradients_with_layers_inside_layers_and_beside_the_text_model(name: str):
    """Activation checkpointing recomputes the text model's outermost layers, each with its own cache."""
    found = []
    for checkpointing in (False, True):
        model = family(name)
        enable(model)
        settings = config(group=3, thought_length=5, positions=2)
        update = dataclasses.replace(settings.update, checkpointing=checkpointing)
        method = rlp(model, dataclasses.replace(settings, update=update))
        for piece in collected(method, WINDOWS[:2], 1).microbatches:
            method.forward_backward(piece)
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    plain, recomputed = found
    assert len(plain) == len(recomputed) > 4 and any(float(one.abs().max()) > 0 for one in plain)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize(
    ("name", "prefix", "message"),
    [
        ("recurrent_gemma", "shared", "model.path: RecurrentGemmaForCausalLM cannot be trained (its logits differ"),
        (
            "recurrent_gemma",
            "replicated",
            "model.prefix = 'replicated': RecurrentGemmaForCausalLM cannot be trained (its",
        ),
        (
            "llama4_text",
            "shared",
            "model.prefix = 'shared': Llama4ForCausalLM cannot read a document once for all its thoughts (its "
            "attention is chunked, which shared prefixes do not support); set model.prefix to 'replicated'",
        ),
    ],
)
def test_a_model_that_would_compute_something_else_is_refused(name: str, prefix: str, message: str):
    with pytest.raises(UserError) as refused:
        check_prefixes(family(name), options(prefix))
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_that_the_mask_or_the_attention_alone_has_is_refused(name: str):
    """The probe is shorter than the window."""
    model = family(name)
    with pytest.raises(UserError, match=r"logits differ by .* when rows share a prefix\); set model.prefix to 'repl"):
        check_prefixes(model, options("shared"))
    assert model.config.sliding_window == 20
    check_prefixes(model, options("replicated"))


def test_a_window_that_both_have_is_shared_and_left_as_it_was():
    architecture = AutoConfig.for_model("mistral", **DENSE, sliding_window=20)
    model = AutoModelForCausalLM.from_config(architecture).float().eval()
    enable(model)
    assert model.config.sliding_window == 20
