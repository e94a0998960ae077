"""One document, many thoughts: a document is read once, and rows of suffix tokens continue it at any of its positions.

What a cache layer's `update` returns is passed to the attention function unchanged, so a layer may return a
`PrefixSuffixKV`, which the attention registered here handles. Mamba layers keep a state for each continued position.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from forethought.prefix.attention import PrefixSuffixKV, merged_attention
from forethought.prefix.checkpointing import activation_checkpointing, layers_of
from forethought.prefix.reading import LayerState, Prefix, backbone, decoder_of, lm_head, read
from forethought.prefix.suffix_cache import CacheCapacity, StaticCache, StaticKV, SuffixCache, static_kv_attention

__all__ = [
    "CacheCapacity",
    "LayerState",
    "Prefix",
    "StaticCache",
    "SuffixCache",
    "activation_checkpointing",
    "attention_only",
    "backbone",
    "check_logits",
    "decoder_of",
    "enable",
    "has_experts",
    "layers_of",
    "lm_head",
    "read",
]

ATTENTION = "shared_prefix"
_merged_attention = torch.compiler.disable(merged_attention)  # stays outside of compiled layers (update.compile)
_KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


def attention_only(model: Any) -> bool:
    """Whether all layers are attention and dense MLPs: what was compiled and captured so far."""
    return not has_experts(model) and all(type(one) in _KNOWN[:2] for one in DynamicCache(config=model.config).layers)


def has_experts(model: Any) -> bool:
    """Whether a model is a mixture of experts."""
    return any(name.endswith("experts") for name, _ in model.named_modules())


def enable(model: Any) -> None:
    """Let a model's attention accept shared prefixes; otherwise it computes as before (scaled dot product).

    Raises ValueError for a model that cannot share prefixes, by its cache layers or by a probe against separate rows.
    """
    layers = DynamicCache(config=model.config).layers
    if odd := sorted({type(layer).__name__ for layer in layers if type(layer) not in _KNOWN}):
        raise ValueError(f"its cache has layers of type {', '.join(odd)}, which cannot share a prefix")
    if "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        raise ValueError("its attention is chunked, which shared prefixes do not support")
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        with _short_windows(model):
            _probe(model)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        model.set_attn_implementation(before)
        known = isinstance(error, ValueError)
        raise ValueError(str(error) if known else f"a shared prefix cannot be read: {error}") from error


@contextlib.contextmanager
def _short_windows(model: Any, width: int = 5) -> Iterator[None]:
    """Sliding windows that a probe reaches: OLMoE passes one that its mask lacks, Qwen2-MoE and PhiMoE the reverse."""
    owners = (model.config.get_text_config(), *model.modules())
    found = [(owner, vars(owner).get("sliding_window")) for owner in owners]
    windows = [(owner, window) for owner, window in found if isinstance(window, int)]
    try:
        for owner, window in windows:
            owner.sliding_window = min(window, width)
        yield
    finally:
        for owner, window in windows:
            owner.sliding_window = window


@torch.no_grad()
def _probe(model: Any) -> None:
    """Compare two rows that share a prefix, read in one pass and one token later, with separate rows."""
    size = model.get_input_embeddings().num_embeddings
    document, suffix = ([i % size for i in some] for some in (range(105, 114), range(117, 120)))  # no special tokens
    prefix_lengths, tokens = [4, 9], torch.tensor([suffix, suffix], device=model.device)
    cache = SuffixCache(read(model, [document], [prefix_lengths]), (0, 1), len(suffix))
    hidden = [backbone(model, tokens[:, :-1], cache, cache.position_ids(len(suffix) - 1))]
    cache.length += len(suffix) - 1
    hidden.append(backbone(model, tokens[:, -1:], cache, cache.position_ids(1)))
    shared = lm_head(model, torch.cat(hidden, dim=1))
    for row, length in zip(shared, prefix_lengths, strict=True):
        wanted = model(input_ids=torch.tensor([document[:length] + suffix], device=model.device), use_cache=False)
        check_logits(model, row, wanted.logits[0, -len(suffix) :], "when rows share a prefix")


def check_logits(model: Any, found: Tensor, wanted: Tensor, when: str) -> None:
    """Raise ValueError where logits differ by more than rounding from those of a plain forward pass."""
    gap = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    if not gap < (1e-4 if model.dtype == torch.float32 else 0.1):  # some families give fp32 logits of bf16 weights
        raise ValueError(f"its logits differ by {gap:.1e} (relative) {when}")


def _attend(
    module: Any, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The attention function: merged over both parts for shared prefixes, else scaled dot product."""
    if not isinstance(key, PrefixSuffixKV | StaticKV):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if odd := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise ValueError(f"its attention uses {', '.join(odd)}, which shared prefixes do not support")
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    attention: Any = static_kv_attention if isinstance(key, StaticKV) else _merged_attention
    out = attention(query, key, value, scale, options.get("sliding_window"))
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
