"""One tiny config of each architecture whose cost is known, with the odd options on, and its model."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronHConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DENSE = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_ENDS,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
_MAMBA = {
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 10,
    "mamba_chunk_size": 4,
    "mamba_d_conv": 3,
}
_NEMOTRON = {
    "vocab_size": 29,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "ssm_state_size": 10,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 4,
    "conv_kernel": 3,
    **_ENDS,
}
_MIXED = ["linear_attention", "full_attention", "linear_attention"]

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_DENSE),
    "llama-biased-tied": LlamaConfig(**_DENSE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**_DENSE, sliding_window=5, head_dim=8),
    "mixtral": MixtralConfig(**_DENSE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": Qwen2Config(**_DENSE, **_SLIDING),
    "qwen3": Qwen3Config(**_DENSE, **_SLIDING, head_dim=8, attention_bias=True),
    "smollm3": SmolLM3Config(**_DENSE),
    "gemma": GemmaConfig(**_DENSE, head_dim=8),
    "gemma2": Gemma2Config(**_DENSE, head_dim=8, sliding_window=5),
    "gemma3_text": Gemma3TextConfig(**_DENSE, head_dim=8, sliding_window=5, sliding_window_pattern=2),
    "nemotron_h": NemotronHConfig(**_NEMOTRON, layers_block_type=["linear_attention", "mlp", "full_attention"]),
    "nemotron_h-biased-experts": NemotronHConfig(
        **_NEMOTRON,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        use_bias=True,
        mlp_bias=True,
        n_routed_experts=4,
        moe_intermediate_size=12,
        moe_shared_expert_intermediate_size=20,
        moe_latent_size=16,
    ),
    "granitemoehybrid": GraniteMoeHybridConfig(
        **_DENSE, **_MAMBA, layer_types=_MIXED, num_local_experts=0, shared_intermediate_size=32
    ),
    "granitemoehybrid-experts": GraniteMoeHybridConfig(
        **_DENSE,
        **_MAMBA,
        layer_types=_MIXED,
        num_local_experts=4,
        shared_intermediate_size=32,
        mamba_proj_bias=True,
        mamba_conv_bias=False,
        attention_bias=True,
    ),
    "bamba": BambaConfig(**_DENSE, **_MAMBA, attn_layer_indices=[1], mlp_bias=True),
    "falcon_h1": FalconH1Config(**_DENSE, **_MAMBA, mamba_d_ssm=48),
    "falcon_h1-normed": FalconH1Config(
        **_DENSE, **_MAMBA, mamba_d_ssm=48, mamba_rms_norm=True, projectors_bias=True, attention_bias=True
    ),
}


def model(name: str, attention: str = "eager") -> Any:
    """Fresh weights. Experts are multiplied one after the other: torch does not count the grouped product."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    made.config._experts_implementation = "eager"
    return made.float().eval()
