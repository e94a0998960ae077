"""Decoding over static buffers gives the thoughts of eager decoding. Captured graphs need a GPU (benchmarks/gpu.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forethought import rollout
from forethought.config import Config, Model, UserError
from forethought.data.positions import ThoughtFormat, at_positions, draw_positions, make_generator
from forethought.prefix import enable
from forethought.rollout import draw_noise
from forethought.rollout.cuda_graphs import attention_only, not_capturable, sample_by_cells
from forethought.rollout.decoder import sample
from helpers import architectures as tiny
from helpers.models import CLOSE, FORM, MERGED, MODELS, REPEATING, WINDOWS, A, config, engine
from helpers.sampling import assert_same, biased, both, cuda_graphs

LONG = ThoughtFormat(before=(4,), after=(8,), open=(5, 6), close=(7, 9), bos=None, pad=0)


@pytest.mark.parametrize("rows", [64, 5], ids=["all at once", "wave by wave"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_same_thoughts_as_eager_decoding(rows: int, top_p: float):
    model = MODELS["qwen3"]()
    enable(model)
    settings = config(group=8, thought_length=12, positions=2, temperature=1.2, top_p=top_p)
    eager, static = both(model, FORM, settings, rows)
    assert_same(eager, static)
    assert eager.closed.any() and not eager.closed.all()


def test_thoughts_that_close_inside_a_larger_token():
    settings = config(group=32, thought_length=12, positions=2, temperature=1.0)
    eager, static = both(biased({CLOSE: 2.0, 7: 2.0}), MERGED, settings, 64, horizon=2)
    assert_same(eager, static)
    assert {A, 8, 9, 11} <= set(eager.tokens.gather(-1, eager.lengths[..., None] - 1).flatten().tolist())
    assert eager.closed.any() and not eager.closed.all()


HYBRIDS = [
    "nemotron_h", "nemotron_h-biased-experts", "granitemoehybrid", "granitemoehybrid-experts", "bamba", "falcon_h1",
    "mixtral",
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3_text", "smollm3", *HYBRIDS])
def test_families_windows_and_delimiters_of_several_tokens(name: str):
    model = tiny.model(name, "sdpa")
    enable(model)
    settings = config(group=3, thought_length=20, positions=2, temperature=1.0)
    assert_same(*both(model, LONG, settings, 64, horizon=2))


def test_what_is_repeated_differs_by_row():
    """Also in rows that move to the front."""
    settings = config(group=32, thought_length=40, positions=2, temperature=1.0)
    eager, static = both(biased({CLOSE: 2.0}), REPEATING, settings, 128, horizon=2)
    assert_same(eager, static)
    assert eager.closed.float().mean() < 1 and int(eager.lengths.min()) < 20


@pytest.mark.parametrize("name", ["qwen3", "nemotron_h"])
def test_unfinished_rows_move_to_the_front_when_half_are_finished(name: str):
    """Of a hybrid their states too."""
    hybrid = name == "nemotron_h"
    model = tiny.model(name, "sdpa") if hybrid else MODELS[name]()
    form = ThoughtFormat(before=(4,), after=(8,), open=(5, 6), close=(7,), bos=None, pad=0) if hybrid else FORM
    enable(model)
    settings = config(group=32, thought_length=70, positions=1, temperature=5.0 if hybrid else 1.0)
    positions = draw_positions(WINDOWS, settings.method, make_generator(1))
    noise = draw_noise((32, 70), [make_generator(2, i) for i in range(len(positions))])
    eager = engine(model, settings, form).sample(positions, noise)
    graphs = cuda_graphs(model, form, settings.method)
    assert_same(eager, graphs.sample(positions, noise))
    assert graphs.graphs is not None and {32, 64, 128} <= set(graphs.graphs.steps)  # 128 rows, halved as they ended
    again = graphs.sample(positions, noise)  # buffers that were used before
    assert_same(eager, again)


def test_buffers_grow_for_positions_that_need_more():
    model = MODELS["qwen3"]()
    enable(model)
    settings = config(group=4, thought_length=5)
    graphs = cuda_graphs(model, FORM, settings.method, 64)
    for windows, group in ((WINDOWS[:1], 4), (WINDOWS, 4), (WINDOWS[:2], 1)):
        positions = at_positions(windows, [[2] for _ in windows], 1)
        noise = draw_noise((group, 5), [make_generator(2, i) for i in range(len(positions))])
        assert_same(engine(model, settings).sample(positions, noise), graphs.sample(positions, noise))


def test_buffers_that_are_not_kept_are_gone_after_each_call(monkeypatch: pytest.MonkeyPatch):
    """With update.offload, also where sampling fails; the next call gives the same thoughts."""
    model = MODELS["qwen3"]()
    enable(model)
    settings = config(group=4, thought_length=5)
    kept, freed = (cuda_graphs(model, FORM, settings.method, 64) for _ in range(2))
    freed.keep_buffers = False
    positions = at_positions(WINDOWS, [[2] for _ in WINDOWS], 1)
    noise = draw_noise((4, 5), [make_generator(2, i) for i in range(len(positions))])
    for _ in range(2):
        assert_same(kept.sample(positions, noise), freed.sample(positions, noise))
        for one, holds in ((kept, True), (freed, False)):
            assert one.graphs is not None
            assert [bool(each) for each in (one.graphs.cache, one.graphs.state, one.graphs.steps)] == [holds] * 3
    assert freed.graphs is not None
    monkeypatch.setattr(type(freed.graphs), "_store_rows", None)
    with pytest.raises(TypeError):
        freed.sample(positions, noise)
    assert freed.graphs.cache is None


def test_freed_buffers_come_back_as_large():
    """Their sizes decide how sums round."""
    model = MODELS["qwen3"]()
    enable(model)
    settings = config(group=4, thought_length=5)
    kept, freed = (cuda_graphs(model, FORM, settings.method, 64) for _ in range(2))
    freed.keep_buffers = False
    for windows in (WINDOWS, WINDOWS[:1]):
        positions = at_positions(windows, [[2] for _ in windows], 1)
        noise = draw_noise((4, 5), [make_generator(2, i) for i in range(len(positions))])
        assert_same(kept.sample(positions, noise), freed.sample(positions, noise))
        assert kept.graphs is not None and freed.graphs is not None
        assert kept.graphs.cache is not None and freed.graphs.cache is None
        assert kept.graphs.capacity == freed.graphs.capacity


@given(st.integers(0, 2**31), st.sampled_from([3, 128, 300, 517]), st.floats(0.1, 8))
def test_two_level_draws_are_those_of_one_level(seed: int, vocab: int, spread: float):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(16, vocab, generator=generator)
    logits[:, 0] = float("-inf")
    noise = torch.rand(16, generator=generator)
    token, wanted = sample_by_cells(logits, noise), sample(logits, noise, 1.0, 1.0)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    edge = (cumulative - noise.double()[:, None]).abs().amin(dim=-1) < 1e-6
    assert (token != 0).all()
    assert torch.equal(token[~edge], wanted[~edge])


def test_draws_at_the_ends_have_weight():
    logits = torch.full((2, 300), float("-inf"))
    logits[:, 130:140] = 0.0
    tokens = sample_by_cells(logits, torch.tensor([0.0, 1.0 - 2**-24]))
    assert tokens.tolist() == [130, 139]


def test_models_that_cannot_be_captured_are_refused():
    assert attention_only(tiny.model("llama")) and attention_only(tiny.model("qwen3"))
    assert not attention_only(tiny.model("mixtral")) and not attention_only(tiny.model("nemotron_h"))
    assert not not_capturable(tiny.model("nemotron_h"), compiled=False)
    assert "compiled as a whole" in not_capturable(tiny.model("nemotron_h"), compiled=True)
    experts = tiny.model("mixtral")
    assert "grouped products" in not_capturable(experts.bfloat16(), compiled=False), "one product for each expert"
    experts.set_experts_implementation("grouped_mm")
    assert not not_capturable(experts, compiled=False)
    assert "bf16" in not_capturable(experts.float(), compiled=False)
    settings = Config(model=Model(decoding="cuda_graphs"))
    with pytest.raises(UserError, match=r"^model.decoding = 'cuda_graphs': there is no GPU; use 'auto' or 'eager'$"):
        rollout.engine(MODELS["qwen3"](), FORM, settings)
    assert rollout.engine(MODELS["qwen3"](), FORM, Config()).graphs is None


COMPILED = """
import torch
from forethought.config import Method
from forethought.data.token_bytes import Closing
from forethought.rollout.cuda_graphs import GraphState, advance

def full(value, *shape):
    return torch.full((64, *shape), value)

closing, first = Closing.of_tokens((3, 4)), torch.arange(50) == 3
graphs = []
run = torch.compile(advance, backend=lambda graph, inputs: graphs.append(graph) or graph)
whole = GraphState(
    noise=full(0.5, 9), forced_tokens=full(0, 3), forced_index=full(-1), tokens=full(0, 9), logp=full(0.0, 9),
    length=full(0), matched=full(0), closed=full(0), evidence=full(0.0, 1), hit=full(0, 1),
    logits=torch.zeros(64, 50), next=full(0),
)
for rows in (64, 32, 16):
    some = whole.head(rows)
    for tensor in some.tensors().values():
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    run(some, torch.tensor([3, 4]), closing, first, first & False, Method(temperature=0.7))
print(len(graphs), whole.length.tolist())
"""


def test_what_follows_the_logits_is_compiled_once_for_all_numbers_of_rows():
    """In a process of its own: checks of shapes, on in tests, cannot be compiled."""
    found = subprocess.run([sys.executable, "-c", COMPILED], check=True, capture_output=True, text=True).stdout
    assert found.split(" ", 1) == ["1", f"{[3] * 16 + [2] * 16 + [1] * 32}\n"]


WHOLE = """
import functools, torch
torch.compile = functools.partial(torch.compile, backend="eager")
from forethought.data.positions import draw_positions, make_generator
from forethought.prefix import enable
from forethought.rollout import draw_noise
from helpers.models import FORM, MODELS, WINDOWS, config, engine
from helpers.sampling import cuda_graphs

model, settings = MODELS["qwen3"](), config(group=4, thought_length=6, positions=2)
enable(model)
positions = draw_positions(WINDOWS, settings.method, make_generator(1))
noise = draw_noise((4, 6), [make_generator(2, i) for i in range(len(positions))])
graphs = cuda_graphs(model, FORM, settings.method)
graphs.graphs.compiled = True
wanted, found = engine(model, settings).sample(positions, noise), graphs.sample(positions, noise)
print(torch.equal(wanted.tokens, found.tokens), float((wanted.logp - found.logp).abs().max()) < 1e-5)
"""


def test_a_step_is_compiled_as_a_whole():
    """With torch.compile's eager backend: nothing in the model may break its graph."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", WHOLE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stderr
