"""The C++ backend gives the thoughts of eager decoding, and refuses other models with one line."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from forethought import rollout
from forethought.cli import main
from forethought.config import Config, Lora, Method, Model, Notice, Rollout, UserError
from forethought.data.positions import Positions, ThoughtFormat, at_positions, make_generator
from forethought.models.compute_copy import compute_copy
from forethought.models.lora import inject_adapters, merged_weights
from forethought.prefix import SuffixCache, backbone, enable, lm_head, read
from forethought.rollout import draw_noise, native
from forethought.rollout.cpp import CppBackend, library
from forethought.rollout.decoder import EagerBackend, sample_with_logp
from forethought.rollout.native import NativeEngine
from helpers import architectures as tiny
from helpers.models import CLOSE, FORM, MERGED, REPEATING, WINDOWS, config, window
from helpers.sampling import biased

SIZES: dict[str, Any] = {
    "vocab_size": 75, "hidden_size": 42, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "llama-biased-tied": LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "llama-scaled": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**{**SIZES, "num_attention_heads": 2, "hidden_size": 32}),
    "qwen3": Qwen3Config(**{**SIZES, "head_dim": 48}),
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
THREE = ThoughtFormat(before=(), after=(4, 5), open=(3,), close=(CLOSE, 5, 6), bos=None, pad=0)
CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def network(name: str, seed: int = 0) -> Any:
    """Weights far from where norms are 1 and biases 0."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.lm_head.weight[CLOSE] *= 4  # so that thoughts end at many lengths
    enable(model)
    return model


def positions_of_documents() -> Positions:
    """Documents of several lengths, one of them longer than a panel and a tile, one of them visited twice."""
    long = window(*(3 + i % 70 for i in range(150)))
    return at_positions([*WINDOWS, long], [[1, 3], [2, 4, 5], [1], [2], [33, 140]], 2)


@NEEDS_COMPILER
@pytest.mark.parametrize("form", [FORM, THREE, MERGED, REPEATING], ids=["one", "three", "merged", "repeating"])
@pytest.mark.parametrize("name", CONFIGS)
def test_thoughts_are_those_of_eager_decoding(name: str, form: ThoughtFormat):
    """With all rows at once, and with few, which others replace as they end."""
    model, positions = network(name), positions_of_documents()
    noise = draw_noise((11, 9), [make_generator(0, i) for i in range(len(positions))])
    plain = EagerBackend(model, prepack=False)
    eager = NativeEngine(model, form, Method(temperature=0.8), backend=plain).sample(positions, noise)
    backend = CppBackend(model)
    for rows in (500, 60, 23):
        found = NativeEngine(model, form, Method(temperature=0.8), rows, backend=backend).sample(positions, noise)
        same = (eager.tokens == found.tokens).all(dim=-1)
        assert (~same).sum() <= 1, "a number between two tokens may round to either"
        assert torch.equal(eager.closed[same], found.closed[same])
        assert torch.allclose(eager.logp[same], found.logp[same], atol=2e-5)
        assert torch.allclose(eager.evidence[same], found.evidence[same], atol=2e-5)
    assert form in (THREE, REPEATING) or (0.1 if form is FORM else 0) < eager.closed.float().mean() < 1


def with_adapters(name: str, **options: Any) -> Any:
    """As if trained: fresh adapters have B = 0 and change nothing."""
    model = network(name)
    with mock.patch("peft.LoraConfig", partial(peft.LoraConfig, **options)):
        inject_adapters(model, Config(lora=Lora(r=3, alpha=6)))
    train_adapters(model)
    return model


def train_adapters(model: Any) -> None:
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["llama-biased-tied", "qwen3"])
def test_thoughts_are_those_of_the_adapters(name: str):
    """Of the current ones, in each batch of thoughts."""
    model, positions = with_adapters(name), positions_of_documents()
    noise = draw_noise((11, 9), [make_generator(0, i) for i in range(len(positions))])
    engines = [
        NativeEngine(model, FORM, Method(temperature=0.8), 60, backend=backend)
        for backend in (EagerBackend(model, prepack=False), CppBackend(model))
    ]
    before = None
    for _ in range(2):
        eager, found = (one.sample(positions, noise) for one in engines)
        same = (eager.tokens == found.tokens).all(dim=-1)
        assert (~same).sum() <= 1, "a number between two tokens may round to either"
        assert torch.allclose(eager.evidence[same], found.evidence[same], atol=2e-5)
        assert before is None or not torch.equal(before, found.tokens)
        before = found.tokens
        train_adapters(model)


@NEEDS_COMPILER
def test_bf16_samples_from_rounded_weights_with_adapters(pair: int):
    model, positions = with_adapters("llama"), positions_of_documents()
    settings = dataclasses.replace(config(thought_length=9), model=Model(decoding="cpp"), lora=Lora(r=3, alpha=6))
    low = dataclasses.replace(settings, rollout=Rollout(precision="bf16"))
    merged = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32).eval()
    merged.load_state_dict(merged_weights(model, dict(model.named_parameters()), settings.lora))
    enable(merged)
    noise = draw_noise((11, 9), [make_generator(0, i) for i in range(len(positions))])
    found, wanted = (rollout.engine(one, FORM, low).sample(positions, noise) for one in (model, merged))
    same = (found.tokens == wanted.tokens).all(dim=-1)
    assert same.float().mean() > 0.9
    assert torch.allclose(found.evidence[same], wanted.evidence[same], atol=2e-5)


@pytest.fixture(params=["fp32 products", "bf16 products"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The library without AVX512-BF16 (1), as for any other processor, and with it (2)."""
    pair = 1 + (request.param == "bf16 products")
    if pair == 2 and "avx512_bf16" not in CPUINFO:
        pytest.skip("this processor has no AVX512-BF16")
    if pair == 1:
        monkeypatch.setenv("CXX", "c++ -U__AVX512BF16__")
    library.cache_clear()
    yield pair
    library.cache_clear()


@NEEDS_COMPILER
@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_those_of_numbers_of_bf16(pair: int, threads: int):
    """Up to the rounding of fp32 sums, for every remainder of rows, columns and inputs; what lies beyond is kept."""
    backend = CppBackend(network("llama"), bf16=True)
    assert backend.library.pair() == pair
    for rows, n, k in [(1, 1, 1), (3, 33, 15), (8, 32, 64), (17, 70, 77), (70, 5, 32), (13, 100, 601)]:
        torch.manual_seed(rows)
        x, w = torch.randn(rows, k), torch.randn(n, k)
        layer = torch.nn.Linear(k, n, bias=False)
        layer.weight.data = w
        [[panels]] = [one.values() for one in backend._panels([{"product": [[layer]]}])]
        y = torch.full((rows + 1, n), 7.0)
        backend.library.multiply(x.data_ptr(), rows, panels.data_ptr(), n, k, 1, threads, y.data_ptr())
        given, rounded = (x.bfloat16() if pair == 2 else x).double(), w.bfloat16().double()
        bound = (k + 1) * 2**-23 * given.abs() @ rounded.abs().T
        assert ((y[:rows] - given @ rounded.T).abs() <= bound).all(), (rows, n, k)
        assert (y[rows] == 7.0).all()


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bf16_samples_from_rounded_weights_and_scores_with_the_policy(name: str, pair: int):
    """What fp32 samples from a model whose matrices are numbers of bf16: to the bit, if products are in fp32."""
    model, positions = network(name), positions_of_documents()
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.bfloat16().float()
    noise = draw_noise((11, 9), [make_generator(0, i) for i in range(len(positions))])
    settings = config(rows=60, thought_length=9, horizon=2)
    settings = dataclasses.replace(settings, model=Model(decoding="cpp"))
    low = dataclasses.replace(settings, rollout=Rollout(precision="bf16"))
    wanted, plain, found = (
        rollout.engine(one, FORM, some).sample(positions, noise)
        for one, some in ((rounded, settings), (model, settings), (model, low))
    )
    if pair == 1:
        assert torch.equal(found.tokens, wanted.tokens) and torch.equal(found.logp, wanted.logp)
    assert not torch.equal(found.logp, plain.logp)
    again = rollout.rescored(found, positions, model, FORM, settings)
    same = (found.tokens == plain.tokens).all(dim=-1)
    assert same.float().mean() > 0.3
    assert torch.allclose(found.evidence[same], plain.evidence[same], atol=2e-5), "the policy's own, in fp32"
    assert torch.equal(found.evidence, again.evidence) and torch.equal(found.hit[same], plain.hit[same])


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["llama-biased-tied", "qwen3"])
def test_a_policy_in_bf16_is_sampled_to_the_bit_as_its_numbers_in_fp32(name: str, pair: int):
    """What is not a matrix computes in fp32; the evidence is that of the policy, in bf16."""
    model, positions = network(name), positions_of_documents()
    half = compute_copy(copy.deepcopy(model), "bf16")
    wide = copy.deepcopy(half).float()
    noise = draw_noise((4, 9), [make_generator(0, i) for i in range(len(positions))])
    settings = dataclasses.replace(config(thought_length=9), model=Model(decoding="cpp", precision="bf16"))
    low = dataclasses.replace(settings, model=Model(decoding="cpp"), rollout=Rollout(precision="bf16"))
    assert settings.rescores and low.rescores and not dataclasses.replace(low, rollout=Rollout()).rescores
    found, wanted = (
        rollout.engine(one, FORM, some).sample(positions, noise) for one, some in ((half, settings), (wide, low))
    )
    assert torch.equal(found.tokens, wanted.tokens) and torch.equal(found.logp, wanted.logp)
    assert not torch.equal(found.evidence, wanted.evidence)
    assert torch.equal(found.evidence, rollout.rescored(found, positions, half, FORM, settings).evidence)


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["llama-biased-tied", "qwen2"])
def test_bf16_computes_the_logits_of_a_model_that_rounds_the_same(name: str, pair: int):
    """Matrices, and with bf16 products the inputs of linear layers and of attention over documents.

    There sums in another order move an input by some 1e-7, so that a few inputs round to the other side, by a part in
    2**8: the logits are nearer to those of this model than to those of one that does not round its inputs.
    """
    model = network(name)
    documents, stops = [[5 + i % 60 for i in range(83)], [9, 8, 7]], [[64, 82], [3]]
    rows = [0] * 5 + [1] * 20 + [2]
    with torch.no_grad(), (backend := CppBackend(model, bf16=True)).prepared():
        exact = copy.deepcopy(model)
        for module in exact.modules():
            if isinstance(module, torch.nn.Linear):  # not the embeddings that are tied to the head
                module.weight = torch.nn.Parameter(module.weight.bfloat16().float())
        rounding = copy.deepcopy(exact)
        for module in rounding.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, given: given[0].bfloat16().float())
        ours = SuffixCache(backend.read(documents, stops), rows, 32)
        tokens = torch.arange(26 * 6).view(26, 6) % 75
        found = torch.stack([backend.step(tokens[:, i : i + 1], ours) for i in range(6)], dim=1)
        fork = SuffixCache(read(exact, documents, stops), rows, 6)
        wanted = [lm_head(exact, backbone(exact, tokens, fork, fork.position_ids(6))), torch.empty_like(found)]
        for position, (document, stop) in enumerate([(0, 64), (0, 82), (1, 3)]):
            mine = torch.tensor(rows) == position
            text = torch.cat([torch.tensor([documents[document][:stop]] * int(mine.sum())), tokens[mine]], dim=1)
            ALL_ATTENTION_FUNCTIONS.register("rounding", partial(rounding_attention, stop=stop))
            rounding.set_attn_implementation("rounding")
            wanted[1][mine] = rounding(input_ids=text, use_cache=False).logits[:, stop:]
        gaps = [(found - one).abs() / one.abs().max() for one in wanted]
    if pair == 1:
        assert gaps[0].max() < 1e-5
    else:
        assert gaps[1].max() < 2**-6 and gaps[1].mean() < gaps[0].mean() / 3


def rounding_attention(
    _: Any, query: Tensor, key: Tensor, value: Tensor, __: Any, *, stop: int, scaling: float, **___: Any
) -> tuple[Tensor, None]:
    """Causal attention with the first `stop` keys and values, queries and weights for them rounded to bf16."""
    fan, length = query.shape[1] // key.shape[1], query.shape[2]
    query, key, value = query * scaling, key.repeat_interleave(fan, dim=1), value.repeat_interleave(fan, dim=1)
    k, v = (one[:, :, :stop].bfloat16().float() for one in (key, value))
    scores = torch.cat([query.bfloat16().float() @ k.mT, query @ key[:, :, stop:].mT], dim=-1)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    sums = weights[..., :stop].bfloat16().float() @ v + weights[..., stop:] @ value[:, :, stop:]
    return (sums / weights.sum(dim=-1, keepdim=True)).transpose(1, 2), None


FACTORS = (1.0, -0.5, 2.0)


class Watched(CppBackend):
    """Keeps the hidden states of the last call, before and after it."""

    def _call(self, function: Any, states: Tensor, *given: Any, **more: Any) -> None:
        self.before, self.after = states.clone(), states
        super()._call(function, states, *given, **more)


def attending() -> Any:
    """One layer that adds the result of attention to its input, whose queries are its keys times FACTORS."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 96, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32).eval()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    with torch.no_grad():
        attention.k_proj.weight.copy_(torch.randn(32, 96) * 0.15)
        attention.v_proj.weight.copy_(torch.randn(32, 96) * 0.1)
        keys = attention.k_proj.weight.view(2, 16, 96)
        attention.q_proj.weight.copy_(torch.stack([f * keys for f in FACTORS], dim=1).view(96, 96))
        attention.o_proj.weight.copy_(torch.eye(96))
        mlp.down_proj.weight.zero_()
    enable(model)
    return model


@NEEDS_COMPILER
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_is_that_of_numbers_of_bf16(pair: int, threads: int):
    """Over documents of odd and even lengths, at several positions of one, and of documents that are joined later.

    With bf16 products queries, weights and a document's keys and values are rounded, as is the result, which is the
    input of the output projection; without, nothing is. fp32 sums may leave a number on another side of two.
    """
    backend, before = Watched(attending(), bf16=True), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), backend.prepared():
            read = backend.read([[5 + i % 60 for i in range(83)], [9, 8, 7, 4]], [[1, 32, 47, 83], [3, 4]])
            cache = SuffixCache(read, [0, 0, 1, 2, 2, 2, *[3] * 12, 4, 5], 32)
            for step in range(19):
                check_attention(backend, cache, step, pair)
            younger = SuffixCache(
                backend.read([[8 + i % 50 for i in range(101)], [7] * 8], [[33, 101], [8]]), [0, 1, 2], 32
            )
            check_attention(backend, younger, 19, pair)
            cache.join(younger)
            for step in range(20, 24):
                check_attention(backend, cache, step, pair)
    finally:
        torch.set_num_threads(before)


def check_attention(backend: Watched, cache: SuffixCache, step: int, pair: int) -> None:
    """One more token of each row, next to softmax(q k / 4) v of its numbers, in double."""
    backend.step((step + 7 * torch.arange(len(cache.positions)))[:, None] % 75, cache)
    found, [layer] = (backend.after.double() - backend.before.double()).view(-1, 2, 3, 16), cache.rows
    rounded = (lambda x: x.bfloat16().double()) if pair == 2 else (lambda x: x)
    assert layer.state.keys is not None and layer.state.values is not None
    for document, seen, first, end in cache.layout.spans:
        k, v = (rounded(one[document, :, :seen].double()) for one in (layer.state.keys, layer.state.values))
        for row in range(first, end):
            own = slice(int(cache.start[row]), cache.length)
            late_k, late_v = (one[row, :, own].double() for one in (layer.keys, layer.values))
            query = torch.stack([f * late_k[:, -1] / 4 for f in FACTORS], dim=1)  # (key head, query head, size)
            scores = torch.cat([rounded(query) @ k.mT, query @ late_k.mT], dim=-1)
            sizes = torch.cat([rounded(query).abs() @ k.mT.abs(), query.abs() @ late_k.mT.abs()], dim=-1)
            weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
            # A sum of n products in fp32 is off by at most (n + 1) 2**-24 of its absolute one, `exponential` by 2**-22.
            off = 2**-22 + 2 * 18 * 2**-24 * sizes.amax(dim=-1, keepdim=True)
            low, high = (rounded(weights[..., :seen] * (1 + sign * off)) for sign in (-1, 1))
            values = torch.cat([v, late_v], dim=1)
            whole = torch.cat([rounded(weights[..., :seen]), weights[..., seen:]], dim=-1) @ values
            slack = (high - low) @ v.abs() + (2 * off + (scores.shape[-1] + 3) * 2**-23) * (weights @ values.abs())
            whole, slack = (one / weights.sum(dim=-1, keepdim=True) for one in (whole, slack))
            least = 2**-24 * backend.after[row].view(2, 3, 16).abs()  # of the sum with the input
            assert (found[row] >= rounded(whole - slack) - least).all(), (step, row)
            assert (found[row] <= rounded(whole + slack) + least).all(), (step, row)


@NEEDS_COMPILER
@pytest.mark.parametrize("threads", [1, 2])
def test_logits_and_caches_are_the_models_own_over_many_steps(threads: int):
    """Rows are dropped after some steps, and younger ones, of other documents, join after more."""
    model, before = network("qwen3"), torch.get_num_threads()
    documents, stops = [[5 + i % 60 for i in range(230)], [9, 8, 7]], [[64, 229], [3]]
    others, ends = [[8 + i % 50 for i in range(90)]], [[41, 90]]
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), (backend := CppBackend(model)).prepared():
            eager, ours = read(model, documents, stops), backend.read(documents, stops)
            for one, other in zip(eager.tensors(), ours.tensors(), strict=True):
                for number, end in enumerate([229, 3]):
                    assert torch.allclose(one[number, :, :end], other[number, :, :end], atol=1e-5)
            pair = [SuffixCache(some, [0] * 5 + [1] * 20 + [2], 32) for some in (eager, ours)]
            for step in range(10):
                agree(model, backend, pair, step)
            for fork in pair:
                fork.select(torch.tensor([0, 3, 7, 24, 25]))
            agree(model, backend, pair, 10)
            younger = [
                SuffixCache(some, [0, 0, 1], 32) for some in (read(model, others, ends), backend.read(others, ends))
            ]
            agree(model, backend, younger, 11)
            for fork, more in zip(pair, younger, strict=True):
                fork.join(more)
                assert fork.ragged
            for step in range(12, 30):
                agree(model, backend, pair, step)
                if step == 20:
                    for fork in pair:
                        fork.select(torch.tensor([2, 5, 7]))
    finally:
        torch.set_num_threads(before)


def agree(model: Any, backend: CppBackend, pair: list[SuffixCache], step: int, tolerance: float = 1e-5) -> None:
    """One more token of each row, by the model itself and by the backend."""
    eager, ours = pair
    token = (step + torch.arange(len(eager.positions))) % 75
    eager.reserve(1)
    hidden = backbone(model, token[:, None], eager, eager.position_ids(1))
    eager.length += 1
    wanted, found = lm_head(model, hidden[:, -1]), backend.step(token[:, None], ours)
    assert float((wanted - found).abs().max() / wanted.abs().max()) < tolerance


@NEEDS_COMPILER
def test_weights_are_read_anew_for_each_batch():
    model, positions = network("llama"), positions_of_documents()
    noise = draw_noise((3, 6), [make_generator(0, i) for i in range(len(positions))])
    engine = NativeEngine(model, FORM, Method(), backend=CppBackend(model))
    first = engine.sample(positions, noise)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    second, eager = engine.sample(positions, noise), NativeEngine(model, FORM, Method()).sample(positions, noise)
    assert not torch.equal(first.tokens, second.tokens)
    assert torch.equal(second.tokens, eager.tokens)
    assert torch.allclose(second.evidence, eager.evidence, atol=2e-5)


@NEEDS_COMPILER
def test_written_predictions_are_those_of_eager_decoding():
    model, positions = network("llama"), positions_of_documents()
    noise = draw_noise((4, 6), [make_generator(0, i) for i in range(len(positions))])
    writing = draw_noise((4, 3), [make_generator(1, i) for i in range(len(positions))])
    eager = NativeEngine(model, FORM, Method()).sample(positions, noise, writing)
    found = NativeEngine(model, FORM, Method(), backend=CppBackend(model)).sample(positions, noise, writing)
    assert eager.written is not None and torch.equal(eager.written, found.written)
    assert torch.allclose(eager.written_logp, found.written_logp, atol=2e-5)


@NEEDS_COMPILER
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_draws_are_those_of_the_eager_sampler(temperature: float, top_p: float):
    torch.manual_seed(0)
    logits, noise = torch.randn(2000, 301) * 3, torch.rand(2000)
    logits[::7, :150] = float("-inf")
    options = Method(temperature=temperature, top_p=top_p)
    wanted, found = sample_with_logp(logits, noise, options), CppBackend(network("llama")).draw(logits, noise, options)
    same = wanted[0] == found[0]
    assert same.float().mean() > 0.998, "a number at an edge of the distribution may round to either side"
    assert torch.allclose(wanted[1][same], found[1][same], atol=1e-5)


@NEEDS_COMPILER
def test_draws_at_the_ends_have_weight():
    logits = torch.full((3, 300), float("-inf"))
    logits[:, 130:140] = 0.0
    noise = torch.tensor([0.0, 0.5, 1.0 - 2**-24])
    tokens, logp = CppBackend(network("llama")).draw(logits, noise, Method(temperature=1.0))
    assert tokens.tolist() == [130, 135, 139]
    assert torch.allclose(logp, torch.full((3,), 0.1).log())


@NEEDS_COMPILER
def test_what_has_no_weight_is_never_drawn():
    """Though sums of many tokens round otherwise than sums of one after the other."""
    torch.manual_seed(1)
    logits = torch.randn(4000, 512)
    logits[:, 100:128] = logits[:, 200:] = float("-inf")
    noise, backend, options = torch.full((4000,), 1.0 - 2**-24), CppBackend(network("llama")), Method(temperature=1.0)
    tokens, logp = backend.draw(logits, noise, options)
    assert logp.isfinite().all() and (tokens < 200).all()
    lost = torch.full((1, 512), float("nan"))
    assert backend.draw(lost, noise[:1], options)[0].tolist() == [511]
    assert sample_with_logp(lost, noise[:1], options)[0].tolist() == [511]


@NEEDS_COMPILER
def test_other_documents_may_be_read_between_two_steps():
    model = network("llama")
    with torch.no_grad(), (backend := CppBackend(model)).prepared():
        pair = [
            SuffixCache(some, [0, 0], 8) for some in (read(model, [[5] * 40], [[40]]), backend.read([[5] * 40], [[40]]))
        ]
        for step in range(3):
            agree(model, backend, pair, step)
            backend.read([[7, 8, 9]], [[3]])


def disabled() -> Any:
    model = with_adapters("llama")
    for module in model.modules():
        if hasattr(module, "lora_A"):
            cast(Any, module).enable_adapters(False)
    return model


def adapted() -> Any:
    model = network("llama")
    layer = model.model.layers[1].self_attn.q_proj
    layer.forward = layer.forward
    return model


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("model", "line"),
    [
        (lambda: tiny.model("gemma3_text"), r"Gemma3ForCausalLM is not supported \(gemma3_text is none of llama, "),
        (lambda: tiny.model("nemotron_h"), r"is not supported \("),
        (lambda: tiny.model("llama"), "head size is 6, not a multiple of 16"),
        (
            lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, rope_parameters=DYNAMIC)),
            "depend on the length",
        ),
        (lambda: tiny.model("llama-biased-tied"), "its head or its MLPs have biases"),
        (lambda: biased({3: 1.0}), "its head or its MLPs have biases"),
        (lambda: AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=5)), "has a sliding window"),
        (lambda: network("llama").double(), "it takes fp32 or bf16 weights on a CPU"),
        (adapted, "its linear layers are modified"),
        (lambda: with_adapters("llama", use_dora=True), "have other adapters than LoRA on fp32 weights"),
        (lambda: compute_copy(with_adapters("llama"), "bf16"), "have other adapters than LoRA on fp32 weights"),
        (disabled, "have other adapters"),
    ],
)
def test_other_models_are_refused_in_a_line(model: Any, line: str):
    with pytest.raises(UserError, match=rf"^model.decoding = 'cpp': .*{line}.*; use 'auto' or 'eager'$"):
        rollout.engine(model(), FORM, Config(model=Model(decoding="cpp")))


@NEEDS_COMPILER
def test_a_model_that_computes_something_else_is_found_by_the_probe():
    model = network("llama")
    model.model.norm.forward = lambda hidden: 2 * hidden
    with pytest.raises(ValueError, match=r"^its logits differ by .* in C\+\+$"):
        CppBackend(model)


def test_copies_of_prefixes_are_refused():
    settings = Config(model=Model(decoding="cpp", prefix="replicated"))
    with pytest.raises(UserError, match=r"model.prefix must be 'shared'; use 'auto' or 'eager'$"):
        rollout.engine(network("llama"), FORM, settings)


@pytest.mark.parametrize(
    ("compiler", "cache", "line"),
    [
        ("no-such-compiler", "cache", "no C.. compiler found"),
        ("false", "cache", "false fails: no message"),
        ("c++", "file/cache", "cannot be built or loaded: .*Not a directory"),
    ],
)
def test_what_goes_wrong_while_compiling_is_one_line(
    compiler: str, cache: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if shutil.which(compiler) is None and compiler == "c++":
        pytest.skip("no C++ compiler")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    with pytest.raises(ValueError, match=line):
        library.__wrapped__()


@NEEDS_COMPILER
def test_the_functions_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.__wrapped__()
    [built] = (tmp_path / "forethought").iterdir()
    made = built.stat().st_mtime_ns
    library.__wrapped__()
    assert [*(tmp_path / "forethought").iterdir()] == [built] and built.stat().st_mtime_ns == made


@NEEDS_COMPILER
def test_a_run_trains_on_such_thoughts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "quickstart", "--train.steps", "2", "--train.batch", "4", "--evaluate.documents", "4"]
    for decoding in ("eager", "cpp"):
        assert main([*words, "--model.decoding", decoding, "--run", decoding]) == 0
    eager, cpp = (Path(name, "thoughts.jsonl").read_text() for name in ("eager", "cpp"))
    assert eager.count("\n") == cpp.count("\n") > 0
    assert main([*words, "--rollout.precision", "bf16", "--run", "bf16"]) == 0
    exact, rounded = (
        [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()] for name in ("cpp", "bf16")
    )
    assert max(row["objective/mismatch"] for row in exact) < 1e-5
    assert all(1e-5 < row["objective/mismatch"] < 0.1 and row["objective/ratio"] == 1.0 for row in rounded)


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("model", "line"),
    [
        (Model(decoding="eager"), "takes model.decoding auto or cpp, or rollout.engine vllm"),
        (Model(prefix="replicated"), "model.prefix must be 'shared'; use 'policy' or rollout.engine vllm"),
    ],
)
def test_bf16_is_refused_where_nothing_rounds(model: Model, line: str):
    with pytest.raises(UserError, match=f"^rollout.precision = 'bf16': {line}$"):
        rollout.engine(network("llama"), FORM, Config(model=model, rollout=Rollout(precision="bf16")))


@NEEDS_COMPILER
def test_auto_decodes_in_cpp_what_exceeds_a_cache(monkeypatch: pytest.MonkeyPatch):
    model, settings = network("qwen3"), config()
    assert isinstance(rollout.engine(model, FORM, settings).decoder.backend, EagerBackend)
    monkeypatch.setattr(native, "PREPACK_MIN_WEIGHTS", 1000)
    with pytest.warns(Notice, match=r"decoded in C\+\+$"):
        assert isinstance(rollout.engine(model, FORM, settings).decoder.backend, CppBackend)
    half = compute_copy(copy.deepcopy(model), "bf16")
    assert isinstance(rollout.engine(half, FORM, settings).decoder.backend, EagerBackend)
    monkeypatch.undo()
    low = dataclasses.replace(settings, rollout=Rollout(precision="bf16"))
    for one in (model, half):  # of any size
        with pytest.warns(Notice, match=r"decoded in C\+\+ with bf16 weights$"):
            assert rollout.engine(one, FORM, low).decoder.backend.bf16
    monkeypatch.setenv("CXX", "no-such-compiler")
    library.cache_clear()
    try:
        assert isinstance(rollout.engine(model, FORM, settings).decoder.backend, EagerBackend)
        with pytest.raises(UserError, match=r"^rollout.precision = 'bf16': no C.. compiler found .*; use 'policy' or "):
            rollout.engine(model, FORM, low)
    finally:
        library.cache_clear()
