"""A document read once for all its thoughts: forward, gradient and decode equal plain rows, on every covered family."""

from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from forethought import prefix
from forethought.config import Method
from forethought.data.corpus import Window
from forethought.data.positions import ThoughtFormat, at_positions
from forethought.models.logprobs import ScoringOptions, ThoughtBatch, forward_backward, thought_logp
from forethought.prefix import attention
from forethought.rollout import draw_noise
from forethought.rollout.native import NativeEngine

VOCAB = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
}
KINDS = ["linear_attention", "full_attention", "linear_attention"]
FAMILIES: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, head_dim=8)),
    "mistral, sliding": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SMALL, sliding_window=5)),
    "gemma3, partly sliding": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **SMALL,
            head_dim=8,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)),
    "nemotron_h": lambda: hf.NemotronHForCausalLM(
        hf.NemotronHConfig(
            **{k: v for k, v in SMALL.items() if k != "num_hidden_layers"},
            layers_block_type=["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"],
            head_dim=8,
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=2,
            chunk_size=4,
            mamba_proj_bias=False,
        )
    ),
    "granitemoehybrid": lambda: hf.GraniteMoeHybridForCausalLM(
        hf.GraniteMoeHybridConfig(
            **SMALL, **MAMBA, shared_intermediate_size=48, num_local_experts=0, layer_types=KINDS, logits_scaling=3.0
        )
    ),
    "bamba": lambda: hf.BambaForCausalLM(hf.BambaConfig(**SMALL, **MAMBA, attn_layer_indices=[1])),
    "falcon_h1": lambda: hf.FalconH1ForCausalLM(hf.FalconH1Config(**SMALL, **MAMBA, head_dim=8, mamba_d_ssm=64)),
}

FORM = ThoughtFormat(before=(6, 7), after=(8,), open=(3, 5), close=(4,), bos=None, pad=0)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = FAMILIES[request.param]().eval()
        for parameter in made.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    prefix.enable(made)
    return made


def positions():
    """Two documents; places that are neighbours, at the first token, and apart."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(20, VOCAB, (n,), generator=generator).tolist() for n in (14, 9)]
    windows = [Window(document=str(n), start=0, tokens=some, marks={}) for n, some in enumerate(tokens)]
    return at_positions(windows, [[1, 6, 7, 12], [4, 8]], 1)


def thoughts(group: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(20, VOCAB, (6, group, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (6, group, 1), generator=generator)
    return tokens, torch.arange(longest) < lengths


def close_to(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def test_thoughts_are_scored_as_plain_rows_are(model):
    rows = ThoughtBatch.from_positions(FORM, positions(), *thoughts(3, 7))
    plain = thought_logp(model, FORM, rows, ScoringOptions(temperature=0.7, tokens=10**6, shared=False))
    for tokens in (10**6, 40):
        shared = thought_logp(model, FORM, rows, ScoringOptions(temperature=0.7, tokens=tokens, shared=True))
        assert close_to(shared, plain)
    assert (plain[rows.mask] < 0).all() and (plain[~rows.mask] == 0).all()


@pytest.mark.parametrize("tokens", [10**6, 60, 1])
def test_gradients_are_those_of_plain_rows(model, tokens):
    rows = ThoughtBatch.from_positions(FORM, positions(), *thoughts(3, 7))
    weight = torch.randn(rows.tokens.shape, generator=torch.Generator().manual_seed(3))

    def gradients(shared: bool, tokens: int) -> torch.Tensor:
        model.zero_grad()
        reading = ScoringOptions(temperature=0.7, tokens=tokens, shared=shared)
        forward_backward(
            model, FORM, rows, reading, lambda logp, targets, some: (logp * weight[some, : logp.shape[1]]).sum()
        )
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradients(False, 10**6)
    assert float(plain.abs().max()) > 0.1
    assert close_to(gradients(True, tokens), plain)


@pytest.mark.parametrize("rows", [100, 12, 3])
def test_thoughts_are_those_of_copied_rows_however_many_decode_at_once(model, rows):
    """With 12 rows thoughts of later places join while earlier ones go on, at other tokens of their thoughts."""
    options = Method(temperature=1.0, thought_length=9)
    noise = 0.1 * draw_noise((3, 9), [torch.Generator().manual_seed(i) for i in range(6)])  # the closing token is low
    plain = NativeEngine(model, FORM, options, 100, shared=False).sample(positions(), noise)
    shared = NativeEngine(model, FORM, options, rows, shared=True).sample(positions(), noise)
    assert torch.equal(shared.tokens, plain.tokens) and torch.equal(shared.mask, plain.mask)
    assert torch.equal(shared.closed, plain.closed) and torch.equal(shared.hit, plain.hit)
    assert close_to(shared.logp, plain.logp) and close_to(shared.evidence, plain.evidence)
    assert len(plain.lengths.unique()) > 1


def test_a_family_that_cannot_share_is_refused():
    gemma = hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, head_dim=8))
    with pytest.raises(ValueError, match="softcap"):
        prefix.enable(gemma)
    sinks = hf.GptOssForCausalLM(hf.GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1))
    with pytest.raises(ValueError, match="s_aux"):
        prefix.enable(sinks)
    pure = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match="its logits differ by"):
        prefix.enable(pure)


def test_a_model_whose_logits_change_when_shared_is_refused():
    """Learned positions counted from the cache's length, not from position ids, would be wrong, and the probe tells."""
    model = FAMILIES["llama"]().eval()
    inner = model.model.forward

    def forgetful(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.model.forward = forgetful
    with pytest.raises(ValueError, match="differ by"):
        prefix.enable(model)


@settings(max_examples=60)
@given(data=st.data())
def test_merged_attention_is_attention_over_the_whole_row(data):
    """Fused and plain, masked and call by call, with a window or without: outputs and all gradients."""
    heads, fan, size = data.draw(st.sampled_from([(1, 1, 8), (2, 2, 8), (1, 3, 8)]))
    documents, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    owner = sorted(data.draw(st.lists(st.integers(0, documents - 1), min_size=1, max_size=6)))
    stop = [data.draw(st.integers(1, length)) for _ in owner]
    width, past = data.draw(st.sampled_from([1, 2, 5])), data.draw(st.integers(0, 4))
    window = data.draw(st.sampled_from([None, 1, 3, 30]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    query = random(len(owner), width, heads * fan, size).transpose(1, 2)  # as models hand it over
    keys, values = random(documents, heads, length, size), random(documents, heads, length, size)
    own_keys, own_values = (random(len(owner), heads, past + width, size) for _ in range(2))
    start = [data.draw(st.integers(0, past)) for _ in owner]
    layout = attention.Layout.of(owner, stop, torch.device("cpu"))
    leaves = [query, keys, values, own_keys, own_values]
    plain = torch.stack(
        [
            _plain(query[r], keys[d][:, :s], values[d][:, :s], own_keys[r], own_values[r], (start[r], window))
            for r, (d, s) in enumerate(zip(owner, stop, strict=True))
        ]
    )
    cotangent = torch.randn(plain.shape, generator=generator)
    expected = torch.autograd.grad(plain, leaves, cotangent)
    limits = [attention._BIAS, 0]
    for limit in limits:
        attention._BIAS = limit
        try:
            split = [
                attention.PrefixSuffixKV(a, b, layout, torch.tensor(start) if any(start) else None)
                for a, b in ((keys, own_keys), (values, own_values))
            ]
            parts = [*attention._prefix_parts(query, split[0], window), attention._suffix_part(query, split[0], window)]
            outs = [
                attention.merged_attention(query, split[0], split[1], 0.3, window),
                attention._reference(query, (keys, values, own_keys, own_values), parts, 0.3),
            ]
            with torch.no_grad():  # decoding, where one query a row takes a way of its own
                assert torch.allclose(attention.merged_attention(query, *split, 0.3, window), plain, atol=1e-5)
        finally:
            attention._BIAS = limits[0]
        for out in outs:
            assert torch.allclose(out, plain, atol=1e-5)
            for found, wanted in zip(torch.autograd.grad(out, leaves, cotangent), expected, strict=True):
                assert torch.allclose(found, wanted, atol=2e-5)


def _plain(query, keys, values, own_keys, own_values, hidden):
    """One row's attention over prefix and suffix as one sequence."""
    start, window = hidden
    fan, width = query.shape[0] // keys.shape[0], query.shape[1]
    key, value = (torch.cat(some, dim=1).repeat_interleave(fan, 0) for some in ((keys, own_keys), (values, own_values)))
    total, length = key.shape[1], keys.shape[1]
    at, index = torch.arange(total - width, total)[:, None], torch.arange(total)
    seen = (index <= at) & ((index < length) | (index >= length + start))
    if window is not None:
        place = torch.where(index < length, index, index - start)
        seen &= place > at - start - window
    score = (query @ key.transpose(1, 2) * 0.3).masked_fill(~seen, float("-inf"))
    return score.softmax(-1) @ value


def test_rows_of_a_document_must_be_contiguous():
    with pytest.raises(ValueError, match="contiguous"):
        attention.Layout.of([1, 0], [2, 2], torch.device("cpu"))


def test_positions_must_come_in_reading_order(model):
    with pytest.raises(ValueError, match="reading order"):
        prefix.read(model, [[1, 2, 3]], [[3, 1]])
