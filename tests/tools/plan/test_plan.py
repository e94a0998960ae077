"""The planner: numbers by hand, what must grow and shrink, the paper's budget, its command."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from forethought.cli import main
from forethought.config import UserError, load, own_options
from forethought.flops import Mamba, Shape, forward_flops, rlp_step
from forethought.memory import (
    GIB,
    cache_numbers,
    chunk_tokens,
    chunk_windows,
    fits,
    memory,
    offloaded,
    uses_cuda_graphs,
)
from forethought.tools import plan as planner
from forethought.tools.plan import Options, advice, as_dict, largest, plan, shipped_shape
from forethought.tools.plan.job import MACHINES, Job, machine
from forethought.tools.plan.job import job as read_job
from forethought.tools.plan.timing import (
    RANKS,
    Lengths,
    decode_step,
    lengths_of_run,
    lognormal,
    ring,
    simulate,
    step,
    sync,
)
from helpers.architectures import CONFIGS
from helpers.plans import CPU, GPU, TINY, config, job

QWEN = load("qwen3-1.7b")
QWEN_SHAPE = shipped_shape(QWEN.model.path)
assert QWEN_SHAPE is not None


def paper(**words: Any) -> Job:
    return read_job(QWEN, QWEN_SHAPE, Options(gpus=32, gpu="h100", **words))


def test_held_bytes_by_hand():
    """20 bytes a parameter, the gradient's only in the update; masters, moments and teacher in parts on 4 GPUs."""
    one, four = memory(job()), memory(job(gpus=4, layout="zero1"))
    assert one.held == {
        "weights, fp32": 4000,
        "Adam moments, fp32": 8000,
        "teacher (EMA), fp32": 4000,
        "KL reference or proxy, fp32": 0,
        "sampled tokens and noise": 29 * 4 * 4,
        "CUDA-graph buffers": (2 * 8 + 4 * (1 + 4 + 1 + 1 + 32)) * 16 * 4 + 48 * 4 * 10,
    }
    assert one.update["gradients"] == 4000
    assert [four.held[name] for name in list(one.held)[:3]] == [1000, 2000, 1000]
    assert four.held["compute weights"] == four.update["gradients"] == four.score["policy weights, set aside"]
    distilled = {"prediction_weight": 0.1, "distillation": 0.5, "horizon": 2}
    soft = memory(job(config(method=distilled, corpus={"min_tokens": 3})))
    assert "soft targets" not in one.update and "soft targets" not in one.score
    assert soft.score["soft targets"] == 2 * soft.update["soft targets"] == 2 * (4 * 2 * 2 * TINY.vocab)
    half = memory(job(config(model={"precision": "bf16"}), gradient_bytes=2))
    assert half.held["compute weights"] == half.update["gradients"] == 2000


@pytest.mark.parametrize(
    ("method", "copies", "reads"),
    [
        ({"kl_weight": 0.1}, 1, 0),
        ({"position_policy": "entropy"}, 1, 1),
        ({"position_policy": "entropy", "kl_weight": 0.1}, 1, 1),
        ({"position_policy": "entropy", "proxy": "policy"}, 0, 1),
        ({"position_policy": "entropy", "proxy": "another"}, 0, 0),
    ],
)
def test_a_proxy_is_a_copy_of_the_start_that_reads_whole_windows_unless_it_is_the_policy(
    method: dict[str, Any], copies: int, reads: int
):
    """The copy is never in parts. A named proxy's size is unknown. TINY's windows have 8 possible positions."""
    one, four = job(config(method=method)), job(config(method=method), gpus=4, layout="zero1")
    for found in (memory(one), memory(four)):
        assert found.held["KL reference or proxy, fp32"] == copies * 4000
    assert one.window_work().proxy == reads * forward_flops(TINY, [(8, 0)], 8)
    plain = one.with_option("method", position_policy="uniform", proxy="").window_work()
    difference = rlp_step(TINY, one.window_work()).rollout - rlp_step(TINY, plain).rollout
    assert difference == one.window_work().proxy
    grows = (
        memory(one).score.get("teacher or proxy forward pass", 0)
        - memory(one.with_option("method", position_policy="uniform", proxy="")).score["teacher forward pass"]
    )
    assert not reads or grows == 12 * (8 - 1) * chunk_windows(one) * TINY.vocab


def test_adapters_by_hand():
    """Rank 2 on layers of 20 + 30 inputs and outputs: 100 weights, which alone are 20 bytes; 1,100 compute."""
    shape = dataclasses.replace(TINY, linears=(("q_proj", 0, 20), ("up_proj", 1, 30)))
    options = config(lora={"r": 2})
    one = job(options, shape.adapted(options.lora), gpus=4, layout="ddp")
    found = memory(one)
    assert list(found.held.values())[:3] == [400, 800, 400]
    assert (found.held["compute weights"], found.update["gradients"]) == (4400, 400)
    assert memory(dataclasses.replace(one, config=config(lora={"r": 2}, model={"precision": "bf16"}))).held[
        "compute weights"
    ] == (2200)
    assert sync(one).seconds == pytest.approx(ring(one, 400, 2))
    assert TINY.adapted(options.lora).adapter == 0  # a shape whose linear layers are not known
    part = config(lora={"r": 3, "target_modules": ["mlp.up_proj"]})
    assert shape.adapted(part.lora).adapter == 90
    with pytest.raises(UserError, match=r"^lora.target_modules = 'layers.0.mlp.up_proj': "):
        shape.adapted(config(lora={"r": 3, "target_modules": ["layers.0.mlp.up_proj"]}).lora)
    with pytest.raises(UserError, match=r"^lora.target_modules = 'gate': .* q_proj, up_proj, or all-linear$"):
        shape.adapted(config(lora={"r": 3, "target_modules": ["gate"]}).lora)
    with pytest.raises(UserError, match=r"^--layout zero1: with lora.r = 2 "):
        read_job(options, shape, Options(gpus=4, layout="zero1"))


def test_layers_computed_again_by_hand():
    """Of each token two layers' inputs of 8, of a document 16 keys and values too; a layer's 500 of each once more."""
    options = config(update={"tokens_per_chunk": 10, "checkpointing": True})
    found = memory(job(options, machine=CPU))
    assert found.update["thoughts' activations"] == 2 * 5 * 2 * 8 * 4
    assert found.update["documents' activations"] == 8 * (2 * 8 + 16) * 4 / 2
    gradients = 4 * 10 * (32 + 32)
    assert found.update["logits or backward buffers"] == gradients + 10 * 500
    plain, again = (step(job(config(update={"checkpointing": asked}))).phases for asked in (False, True))
    assert again[3].seconds == pytest.approx(plain[3].seconds * 4 / 3)


def test_the_papers_12b_fits_with_adapters_alone():
    """Not with all weights on any number of these GPUs; adapters fit one."""
    whole, adapted = load("nemotron-nano-12b-v2"), load("nemotron-nano-12b-v2-lora")
    shape = shipped_shape(whole.model.path)
    assert shape is not None
    for gpus in (1, 32):
        assert plan(adapted, shape, Options(gpus=gpus, gpu="h100")).fits
        found = plan(whole, shape, Options(gpus=gpus, gpu="h100"))
        assert not found.fits
        assert found.adapters is not None
        assert found.adapters.what.startswith("--lora.r 16")
        assert found.adapters.peak <= found.job.machine.usable
    assert list(plan(adapted, shape, Options(gpus=32)).memory) == ["one", "ddp"]
    assert plan(adapted, shape, Options(gpus=32)).adapters is None


def test_offloaded_bytes_and_seconds_by_hand():
    """Moments and teacher count only after decoding, buffers only in it; fp32 weights that sample stay."""
    plain, moved = (job(config(update={"offload": way})) for way in (False, True))
    before, found = memory(plain), memory(moved)
    buffers, idle = "CUDA-graph buffers", {"Adam moments, fp32": 8000.0, "teacher (EMA), fp32": 4000.0}
    assert offloaded(moved) == idle
    assert found.held == {name: size for name, size in before.held.items() if name not in {buffers, *idle}}
    assert found.decode == {buffers: before.held[buffers], **before.decode}
    assert (found.score, found.update) == (idle | before.score, idle | before.update)
    seconds = [{phase.name: phase.seconds for phase in step(one).phases}["offload"] for one in (plain, moved)]
    assert seconds == [0, 2 * 12_000 / 25e9]
    half = config(update={"offload": True}, model={"precision": "bf16"}, method={"kl_weight": 1.0})
    assert list(offloaded(job(half)).values()) == [4000, 8000, 4000, 4000]  # weights and reference too
    proxy = {"position_policy": "entropy"}  # a copy of the start that is not the reference stays
    assert list(offloaded(job(config(update={"offload": True}, method=proxy))).values()) == [8000, 4000]
    assert memory(job(config(update={"offload": True}), machine=CPU)) == memory(job(config(), machine=CPU))
    assert not offloaded(job(config(update={"offload": True}), machine=CPU))


def test_more_thoughts_at_once_where_idle_state_is_offloaded(capsys: pytest.CaptureFixture[str]):
    """Three times as many of 1,024 tokens on 80 GB. Of 1,024 of them the keys and values alone are larger."""
    rows: dict[tuple[int, bool], int] = {}
    for length, offload in itertools.product((256, 1024), (False, True)):
        words = ["--method.thought_length", str(length), "--corpus.window", "1025", "--update.offload", str(offload)]
        planned = plan(load("qwen3-1.7b", words), QWEN_SHAPE, Options(prefix=1024))
        assert planned.fits
        rows[length, offload] = planned.job.config.train.rollout_batch
    assert rows == {(256, False): 384, (256, True): 1104, (1024, False): 144, (1024, True): 448}
    assert 1024 * 1024 * 2 * cache_numbers(planned.job.shape)[0] > 120e9
    assert as_dict(planned)["host_memory"] == 16 * QWEN_SHAPE.parameters
    assert main(["plan", "qwen3-1.7b", *words]) == 0
    assert "27.53 GB of host memory" in " ".join(capsys.readouterr().out.split())


def test_bytes_of_decoding_and_update_by_hand():
    """Keys and values: 2 layers x 2 x 2 x 2 = 16 numbers a token. Chunks of 10 tokens hold two thoughts of 5."""
    options = config(update={"tokens_per_chunk": 10})
    found = memory(job(options, machine=CPU))
    assert found.decode["documents' KV cache and states"] == 2 * 8 * 16 * 4
    assert found.decode["thoughts' KV cache and states"] == 4 * (1 + 4 + 1 + 1) * 16 * 4
    assert found.update["thoughts' activations"] == 2 * 5 * 1000
    assert found.update["documents' activations"] == 8 * 1000 / 2
    assert found.update["logits or backward buffers"] == max(16 * 2 * 4 * 10, 4 * 10 * (32 + 32))
    reads_on = config(update={"tokens_per_chunk": 14}, method={"prediction_weight": 1.0})  # two rows of 1 + 4 + 1 + 1
    assert memory(job(reads_on, machine=CPU)).update["thoughts' activations"] == 2 * 7 * 1000
    assert "attention scores (no fused kernel)" not in found.update
    assert memory(job(options)).update["attention scores (no fused kernel)"] == 8 * 8 * 2 * 5 * (8 + 5)
    bf16 = memory(job(config(update={"tokens_per_chunk": 10}, model={"precision": "bf16"})))
    assert bf16.update["attention scores (no fused kernel)"] == 0
    assert bf16.update["thoughts' activations"] == 2 * 5 * 400


def test_seconds_by_hand():
    """Halves of all rates. A step of decoding reads 680 weights, 2 x 8 and 4 x 3 cached tokens of 16 numbers."""
    one = job()
    seconds, bound = decode_step(one, 4)
    assert (seconds, bound) == (pytest.approx(4 * (680 + 16 * (16 + 12)) / 0.5e12 / 0.5), "memory")
    found = {phase.name: phase for phase in step(one).phases}
    cost = rlp_step(TINY, one.window_work())
    assert found["decode"].seconds == pytest.approx(4 * seconds)
    assert found["update"].seconds == pytest.approx(2 * cost.update / (10e12 * 0.5 * 0.5))
    assert found["optimizer"].seconds == pytest.approx(40 * 1000 / 0.5e12)
    assert found["ema"].seconds == pytest.approx(12 * 1000 / 0.5e12)
    assert [found[name].flops for name in ("prefill", "decode", "score", "update")] == [
        2 * n for n in (cost.prefill, cost.decode, cost.teacher, cost.update)
    ]
    slow = dataclasses.replace(GPU, replay=1.0)
    assert decode_step(job(machine=slow), 4) == (2 * 57 + 80, "kernels")
    weak = dataclasses.replace(GPU, fp32=1.0)
    assert decode_step(job(machine=weak), 4)[1] == "matmul"


def test_what_another_engine_samples_is_read_again():
    """Window of 8 tokens once, each of two thoughts with opening and target over it; scored rows have the target."""
    again = job(config(rollout={"engine": "vllm"}))
    cost = rlp_step(TINY, again.window_work())
    assert cost.score == forward_flops(TINY, [(8, 0), (1 + 4 + 1, 8), (1 + 4 + 1, 8)], 2)
    assert {phase.name: phase.flops for phase in step(again).phases}["score"] == 2 * (cost.teacher + cost.score)
    assert rlp_step(TINY, job().window_work()).score == 0


def test_what_is_repeated_after_a_thought_is_planned():
    one = job(config(method={"repeat_context": 3, "prediction_weight": 0.1}))
    plain = one.with_option("method", repeat_context=0)
    tails = zip(one.window_work().tails, plain.window_work().tails, strict=True)
    assert [mine - theirs for pair in tails for mine, theirs in zip(*pair, strict=True)] == [3, 3]
    assert one.longest_row == plain.longest_row + 3
    mine, theirs = (sum(memory(some).held.values()) for some in (one, plain))  # with the buffers of CUDA graphs
    assert mine - theirs == 4 * one.decode_rows * 3 * cache_numbers(TINY)[0]


def test_rings_by_hand():
    """8 GPUs in a node at 50 GB/s; 16 in nodes of 4, whose cards send 4 x 5 GB/s together."""
    assert ring(job(gpus=8), 80e9, 2) == pytest.approx(2 * 7 / 8 * 80e9 / 50e9)
    assert ring(job(gpus=16, gpus_per_node=4), 80e9, 1) == pytest.approx(15 / 16 * 80e9 / 20e9)
    assert ring(job(), 80e9, 2) == 0
    late = job(gpus=8, machine=dataclasses.replace(GPU, latency=1.0))
    assert ring(late, 8e-3, 2) == pytest.approx(14, rel=1e-6)
    count = TINY.parameters
    assert sync(job(gpus=8, layout="ddp")).seconds == pytest.approx(ring(job(gpus=8), 4 * count, 2))
    assert sync(job(gpus=8, layout="zero1")).seconds == pytest.approx(2 * ring(job(gpus=8), 4 * count, 1))


def test_positions_are_dealt_and_spaced():
    one = job(config(train={"batch": 12, "rollout_batch": 9}, method={"positions": 3}), gpus=3, layout="ddp")
    assert (one.windows, one.local_windows, one.thoughts_per_window, one.local_thoughts) == (4, 2, 6, 12)
    assert (one.decode_windows, one.decode_rows) == (1, 6)
    assert one.window_work().prefixes == (3, 5, 8)
    prompt = config(method={"prompt": "12345{context}123456789"})
    assert (job(prompt).template, job(prompt).between) == (2, 4)


numbers = st.integers(1, 6)


@settings(max_examples=60, deadline=None)
@given(numbers, numbers, numbers, numbers, st.sampled_from(["fp32", "bf16"]), st.booleans())
def test_more_of_anything_never_takes_less(
    group: int, places: int, length: int, factor: int, precision: str, gpu: bool
):
    def made(group: int, places: int, length: int, window: int) -> Job:
        options = config(
            corpus={"window": window + 1},
            method={"group": group + 1, "positions": places, "thought_length": length},
            train={"batch": 4 * places, "rollout_batch": 4 * places * group},
            model={"precision": precision},
        )
        lengths = {"prefix": window, "document": window, "max_prefix": window, "length": length}
        return job(options, machine=GPU if gpu else CPU, **lengths)

    small = made(group, places, length, 16)
    assert sum(memory(small).held.values()) > 16 * TINY.parameters
    for large in (
        made(group * factor, places, length, 16),
        made(group, places, length * factor, 16),
        made(group, places, length, 16 * factor),
    ):
        assert memory(large).peak >= memory(small).peak
        assert step(large).flops >= step(small).flops
        assert step(large).thought >= step(small).thought
    fewer = dataclasses.replace(small, gpus=2, layout="ddp")
    assert memory(fewer).peak <= memory(small).peak
    parts = [memory(dataclasses.replace(small, gpus=n, layout="zero1")) for n in (2, 4)]
    assert parts[1].peak < parts[0].peak
    assert sum(parts[0].held.values()) < sum(memory(fewer).held.values()) + 4 * TINY.parameters


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_smaller_chunks_and_fewer_rows_take_less(tokens: int, more: int):
    def peak(section: str, **changes: int) -> dict[str, float]:
        return memory(job(config(train={"batch": 64}), machine=CPU).with_option(section, **changes)).phases

    assert peak("update", tokens_per_chunk=tokens)["update"] <= peak("update", tokens_per_chunk=tokens + more)["update"]
    assert peak("train", rollout_batch=tokens)["decode"] <= peak("train", rollout_batch=tokens + more)["decode"] * 2


def test_a_budget_of_tokens_or_flops_says_how_many_steps_there_are():
    def steps(**train: Any) -> int:
        found = as_dict(plan(config(train=train), QWEN_SHAPE, Options()))
        assert found["total"]["flops"] == found["step"]["flops"] * found["steps"]
        assert found["total"]["text_tokens"] == found["step"]["text_tokens"] * found["steps"]
        return found["steps"]

    one = as_dict(plan(config(train={"steps": 50}), QWEN_SHAPE, Options()))
    text, flops = (one["step"][name] for name in ("text_tokens", "flops"))
    assert (one["steps"], steps(steps=50, tokens=20 * text)) == (50, 20)
    assert steps(steps=50, tokens=20 * text, flops=9.5 * flops) == 10
    assert steps(steps=50, flops=100.0 * flops) == 50


def test_the_papers_budget():
    """512 positions x 16 thoughts, 170M tokens of text in documents of 949, on 32 H100: T_flop is the paper's 6B."""
    result = plan(QWEN, QWEN_SHAPE, Options(gpus=32, gpu="h100", price=2, prefix=948, document=949))
    found = as_dict(result)
    assert (found["batch"], found["G"], found["gpus"], found["steps"]) == (512, 16, 32, 350)
    assert found["total"]["text_tokens"] == 350 * 512 * 949 == 170_060_800
    assert found["total"]["t_flop_tokens"] == 16 * 2048 * 512 * 350 + 170_060_800
    assert found["total"]["thought_tokens"] == 350 * 512 * 16 * 2048
    assert found["fits"]
    assert found["parameters"] == 1_720_574_976
    assert found["total"]["dollars"] == pytest.approx(2 * 32 * 350 * found["step"]["seconds"] / 3600)
    assert found["step"]["seconds"] == pytest.approx(sum(one["seconds"] for one in found["step"]["phases"].values()))
    assert found["memory"]["zero1"]["peak"] < found["memory"]["ddp"]["peak"] < 80e9
    json.dumps(found)


@pytest.mark.parametrize("name", ["qwen3-1.7b", "nemotron-nano-12b-v2"])
def test_shipped_shapes_are_those_of_transformers(name: str):
    file = Path(planner.__file__).parent / "shapes" / f"{name}.json"
    assert json.loads(file.read_text())["source"]
    shape = shipped_shape(load(name).model.path)
    assert shape == shipped_shape(name) == Shape.of(AutoConfig.from_pretrained(file))
    assert shape is not None
    assert shape.parameters == {"qwen3-1.7b": 1_720_574_976, "nemotron-nano-12b-v2": 12_310_001_152}[name]


def test_other_models_are_not_shipped(tmp_path: Path):
    assert [shipped_shape(name) for name in ("embedded", "./qwen3-1.7b", "Qwen/Qwen3-4B-Base")] == [None] * 3


def test_what_fits_and_what_to_change():
    """Mildest first, each on top of those before it, until it fits; or all that is known, and it still does not."""
    one = paper()
    assert fits(one)
    assert advice(one) == []
    large = one.with_option("train", rollout_batch=256).with_option("update", tokens_per_chunk=2**16)
    changes = advice(large)
    assert [change.what.split()[0] for change in changes] == ["--train.rollout_batch", "--update.tokens_per_chunk"]
    peaks = [memory(large).peak, *(change.peak for change in changes)]
    for change, before, after in zip(changes, peaks, peaks[1:], strict=False):
        assert before - after == pytest.approx(change.saved)
    assert peaks[-1] <= large.machine.usable < peaks[-2]
    assert largest(large) is None
    hopeless = dataclasses.replace(one, machine=dataclasses.replace(MACHINES["h100"], memory=5e9))
    changes = advice(hopeless)
    assert changes[-1].peak > hopeless.machine.usable
    options = {"prediction_weight": 0.1, "distillation": 0.5, "min_thought_length": 1500}
    bound = advice(hopeless.with_option("method", **options))
    assert {"--method.teacher_every", "--method.thought_length"} <= {change.what.split()[0] for change in changes}
    assert not {"--method.teacher_every", "--method.thought_length"} & {change.what.split()[0] for change in bound}
    assert [change.what for change in changes if change.what.startswith("--layout")] == ["--layout zero1 on 32 GPUs"]


def test_the_largest_batch_fits_and_one_more_does_not():
    one = paper()
    found = largest(one)
    assert found is not None
    rows, positions = found["rollout_batch"], found["batch"]

    def with_rows(rows: int) -> Job:
        return one.with_option("train", rollout_batch=rows, batch=32 * 1024)

    assert fits(with_rows(rows))
    assert not fits(with_rows(rows + 16))
    assert fits(one.with_option("train", batch=positions))
    assert not fits(one.with_option("train", batch=positions + 32))


def test_captured_steps_are_for_attention_on_a_gpu():
    assert uses_cuda_graphs(job())
    assert not uses_cuda_graphs(job(machine=CPU))
    assert not uses_cuda_graphs(job(config(model={"decoding": "eager"})))
    assert not uses_cuda_graphs(job(config(model={"prefix": "replicated"})))
    scan = Mamba(heads=2, head_dim=2, state=3, groups=1, kernel=2, chunk=4)
    hybrid = dataclasses.replace(TINY, mamba=(scan,))
    asked = job(config(model={"decoding": "cuda_graphs"}), shape=hybrid)
    assert uses_cuda_graphs(asked) and not uses_cuda_graphs(job(shape=hybrid)), "where Mamba is captured if asked for"
    states = 4 * (4 * 3 + 10 * 2)  # bytes of a row, also of each of a document's positions
    buffers = memory(asked).held["CUDA-graph buffers"] - memory(job()).held["CUDA-graph buffers"]
    assert buffers == states * (4 + asked.decode_documents)
    assert memory(asked).decode["prefill"] > memory(job()).decode["prefill"] + states * 4
    experts = dataclasses.replace(TINY, experts=2)
    assert not uses_cuda_graphs(job(shape=experts))
    assert uses_cuda_graphs(job(config(model={"decoding": "cuda_graphs"}), shape=experts))
    assert [Shape.of(CONFIGS[name]).experts for name in ("llama", "mixtral")] == [0, 3 * 4]
    assert "CUDA-graph buffers" not in memory(job(machine=CPU)).held


def test_compiled_decoding_holds_weights_and_documents_once_more():
    plain, compiled = (memory(job(config(model={"decoding": way}), machine=CPU)).decode for way in ("eager", "cpp"))
    assert set(compiled) - set(plain) == {"prepacked weights", "prepacked KV cache"}
    assert compiled["prepacked weights"] == 4 * (job().shape.matmul_weights + job().shape.vocab * job().shape.hidden)
    assert 0 < compiled["prepacked KV cache"] <= plain["documents' KV cache and states"]
    low = memory(job(config(rollout={"precision": "bf16"}), machine=CPU)).decode
    assert low == {**compiled, "prepacked weights": compiled["prepacked weights"] / 2}
    half = memory(job(config(model={"decoding": "cpp", "precision": "bf16"}), machine=CPU)).decode
    assert half["prepacked weights"] == low["prepacked weights"]
    assert half["thoughts' KV cache and states"] == plain["thoughts' KV cache and states"], "in fp32"


def test_usable_memory_leaves_a_share():
    assert GPU.usable == 0.94 * 100e9 - GIB
    assert CPU.usable == 0.94 * 8e9


def test_measured_ceilings_take_the_place_of_peaks(tmp_path: Path):
    rows = [
        {"peer": "naive", "seconds": 1},
        {"matmul_gflops": 70.0, "copy_gb_s": 9.0, "update_of_matmul": 0.5},
        {"matmul_gflops": 80.0, "copy_gb_s": 8.0, "update_of_matmul": 0.6},
        {"matmul_gflops": 60.0, "update_of_matmul": 0.9},
    ]
    file = tmp_path / "step.json"
    file.write_text(json.dumps(rows))
    found = machine("cpu", str(file))
    assert (found.matmul("fp32"), found.matmul("bf16"), found.copy, found.update_share) == (80e9, 80e9, 9e9, 0.6)
    assert found.memory > 1e9
    card = {"card": "x", "matmul_tflops": 700.0, "copy_tb_s": 3.0}
    file.write_text(json.dumps([card, {"rollout_of_ceiling": 0.4, "update_of_matmul": 0.45}]))
    found = machine("h100", str(file))
    assert (found.matmul("bf16"), found.copy, found.decode_share, found.update_share) == (700e12, 3e12, 0.4, 0.45)
    assert found.matmul("fp32") == pytest.approx(0.803 * 67e12)
    file.write_text(json.dumps({"matmul_tflops": 700, "inside_gb_s": 400, "launch_us": 0, "memory_gb": 70}))
    found = machine("h100", str(file))
    assert (found.inside * found.link_share, found.across, found.launch, found.memory) == (400e9, 40e9, 0, 70e9)
    assert "measured (" in found.source


def test_benchmark_results_are_ceilings():
    folder = Path(__file__).parents[3] / "benchmarks" / "results"
    found = machine("cpu", str(folder / "step-512-64.json"))
    assert 1e9 < found.matmul("fp32") < 1e12
    assert 0.1 < found.update_share < 1


def test_waiting_by_hand():
    """All thoughts as long: nobody waits. One in eight long: the more GPUs, the surer that one of them has it."""
    one = paper(length=256)
    same = simulate(one, Lengths(groups=np.full((1, 1), 64), source=""), 0, True, (1, 4))
    fixed = dataclasses.replace(one, max_prefix=one.prefix)
    level = simulate(fixed, Lengths(groups=np.full((1, 1), 64), source=""), 0, True, (1, 4))
    assert [row.waits for row in level] == [pytest.approx(0), pytest.approx(0, abs=1e-9)]
    assert level[1].seconds - level[0].seconds == pytest.approx(level[1].sync)
    assert same[1].waits > 0
    rows = simulate(one, lognormal(2048, 0), 0, True)
    assert [row.gpus for row in rows] == list(RANKS)
    assert rows[0].efficiency == 1
    assert rows[-1].efficiency < rows[3].efficiency < 1
    assert rows[-1].waits > rows[1].waits > rows[0].waits == 0
    assert all(row.seconds == pytest.approx(row.work + row.waits + row.sync) for row in rows)
    assert {row.positions / row.gpus for row in rows} == {16}
    divided = simulate(one, lognormal(2048, 0), 0, False)
    assert [row.gpus for row in divided] == [n for n in RANKS if n <= 512]
    assert {row.positions for row in divided} == {512}
    assert divided[-1].seconds < divided[0].seconds
    assert divided == simulate(one, lognormal(2048, 0), 0, False)
    assert divided != simulate(one, lognormal(2048, 0), 1, False)


def test_one_gpu_of_the_simulation_is_the_planned_step():
    """Where all lengths are the typical ones, the simulation and the step's own arithmetic agree."""
    one = dataclasses.replace(paper(prefix=1024, length=512), gpus=1, layout="one")
    [row] = simulate(one, Lengths(groups=np.full((1, 1), 512), source=""), 0, True, (1,))
    assert row.seconds == pytest.approx(step(one).seconds, rel=0.02)


def test_lengths_come_from_a_run_or_a_lognormal(tmp_path: Path):
    rows = [{"thoughts": [{"length": n}, {"length": n + 1}]} for n in (3, 5)]
    (tmp_path / "thoughts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert lengths_of_run(str(tmp_path), 2).groups.tolist() == [[3, 4], [5, 6]]
    assert lengths_of_run(str(tmp_path), 4).groups.tolist() == [[3], [4], [5], [6]]
    drawn = lognormal(1000, 7)
    assert np.median(drawn.groups) == pytest.approx(250, rel=0.02)
    assert drawn.groups.max() == 1000
    assert (drawn.groups == lognormal(1000, 7).groups).all()
    assert lognormal(10**6, 7, mean=100.0).groups.mean() == pytest.approx(100, rel=0.02)


def test_words():
    words = ["--gpus", "4", "--nodes-of=2", "--simulate", "--method.group", "3", "--steps", "7", "--seed=1"]
    own, rest = own_options(Options, words)
    assert own == Options(gpus=4, nodes_of=2, simulate=True, steps=7)
    assert rest == {"method": {"group": 3}, "seed": 1}
    assert read_job(QWEN, QWEN_SHAPE, own).config.train.steps == 7


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.setenv("COLUMNS", "120")
    file = tmp_path / "plan.json"
    words = ["plan", "qwen3-1.7b", "--gpus", "32", "--price", "2.5", "--simulate", "--json", str(file)]
    assert main(words) == 0
    out = capsys.readouterr().out
    for text in ("1.72B parameters", "estimate", "ZeRO-1", "on 32", "peak", "bound by", "GPU hours, $", "1,024 GPUs"):
        assert text in out
    assert "assumed" in out.lower()
    found = json.loads(file.read_text())
    assert found["estimates"] is True
    assert (found["P"], found["L"], found["G"], found["K"]) == (1023, 2048, 16, 1)
    assert len(found["simulation"]["growing"]) == 11
    assert f"{found['total']['hours']:,.1f} hours" in out


def test_the_command_says_what_to_change(capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["plan", "nemotron-nano-12b-v2", "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "NO" in out
    assert "it does not fit; change, in this order" in out
    assert "mamba_ssm kernels" in out


@pytest.mark.parametrize("path", ["embedded", "folder", "config.json"])
def test_models_by_path(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    CONFIGS["llama"].save_pretrained(tmp_path)
    source = {"embedded": "embedded", "folder": str(tmp_path), "config.json": str(tmp_path / "config.json")}[path]
    assert main(["plan", "quickstart", "--model.path", source]) == 0
    assert "parameters, fp32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "plan takes a config file, or the name of a shipped one such as qwen3-1.7b"),
        (["--gpus", "2"], "plan takes a config file"),
        (["qwen3-1.7b", "--gpus", "0"], "--gpus 0: Input should be greater than 0"),
        (["qwen3-1.7b", "--gpus"], "option --gpus needs a value"),
        (["qwen3-1.7b", "--gpu", "h1000"], "--gpu h1000: must be a100-40, a100, h100"),
        (["qwen3-1.7b", "--gpu", "cpu"], "--gpu cpu: needs --ceilings FILE"),
        (["qwen3-1.7b", "--ceilings", "nothing.json"], "--ceilings nothing.json: cannot be read: No such file"),
        (["qwen3-1.7b", "--price", "-1"], "--price -1: Input should be greater than or equal to 0"),
        (["qwen3-1.7b", "--layout", "zero"], "--layout zero: Input should be 'one', 'ddp' or 'zero1'"),
        (["qwen3-1.7b", "--layout", "ddp"], "--layout ddp: does not fit --gpus 1"),
        (["qwen3-1.7b", "--gradients", "fp8"], "--gradients fp8: Input should be 'fp32' or 'bf16'"),
        (["qwen3-1.7b", "--prefix", "4000"], "--prefix 4000: must be at most 2047"),
        (["qwen3-1.7b", "--length", "4000"], "--length 4000: must be at most method.thought_length = 2048"),
        (["qwen3-1.7b", "--document", "4"], "--document 4: must be from --prefix = 1023 to corpus.window = 2048"),
        (["qwen3-1.7b", "--lengths", "x"], "--lengths: is for --simulate"),
        (["qwen3-1.7b", "--simulate", "--lengths", "x"], "--lengths x: cannot be read: No such file"),
        (["qwen3-1.7b", "--method.name", "cpt"], "method.name = 'cpt': plan is for methods that sample thoughts"),
        (["qwen3-1.7b", "--method.grup", "2"], "unknown option method.grup; did you mean method.group?"),
        (["qwen3-1.7b", "--gpuz", "2"], "unknown option gpuz"),
        (["qwen3-1.7b", "extra"], "expected an option such as --method.group 8, got 'extra'"),
        (["nothing.toml"], "config 'nothing.toml' is no file; shipped configs are "),
        (
            ["qwen3-1.7b", "--json", "no/such/folder.json"],
            "--json no/such/folder.json: cannot be written: No such file",
        ),
        (["qwen3-1.7b", "--model.path", "./nothing"], "model.path = './nothing' cannot be loaded: no such folder"),
        (["qwen3-1.7b", "--model.path", "missing.gguf"], "model.path = 'missing.gguf' cannot be loaded: no such file"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith(f"forethought: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: Any, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("forethought.models.loading._hub_is_reachable", lambda source: False)
    assert main(["plan", "qwen3-1.7b", "--model.path", "nobody/nothing"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("forethought: model.path = 'nobody/nothing' cannot be loaded: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("3", "must hold an object, or the rows of benchmarks/step.py"),
        ("{}", "holds no matmul_gflops (fp32) and no matmul_tflops (bf16)"),
        ('{"matmul_gflops": -1}', "matmul_gflops = -1: must be a number above 0"),
        ('{"matmul_gflops": 1}', "holds no copy_gb_s"),
    ],
)
def test_bad_ceilings_are_one_line(text: str, message: str, tmp_path: Path):
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"^--ceilings {file}: ") as caught:
        machine("cpu", str(file))
    assert message in str(caught.value)


def test_planning_a_shipped_model_imports_no_torch():
    code = """
import sys
from forethought.cli import main
assert main(["plan", "nemotron-nano-12b-v2", "--gpus", "16", "--simulate"]) == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_chunks_follow_the_machine():
    half = config(model={"precision": "bf16"})
    assert chunk_tokens(job(config(update={"tokens_per_chunk": 7}))) == 7
    wide = dataclasses.replace(TINY, hidden=2048, intermediate=6144, layers=28)
    vectors = 28 * (14 * 2048 + 5 * 6144)
    assert chunk_tokens(job(shape=wide)) == int(100e9 // 8 // (4 * vectors))
    assert chunk_tokens(job(half, wide)) == int(100e9 // 8 // (2 * vectors))
    assert chunk_tokens(job(shape=wide, machine=CPU)) == max(256, 2**30 // (4 * vectors))


def test_the_lengths_of_a_run_that_goes_on_are_read_without_its_last_line(tmp_path: Path):
    row = json.dumps({"step": 1, "thoughts": [{"length": 3}, {"length": 5}]})
    (tmp_path / "thoughts.jsonl").write_text(f'{row}\n{row}\n{{"step": 2, "thou')
    assert lengths_of_run(str(tmp_path), 2).groups.tolist() == [[3, 5], [3, 5]]
    (tmp_path / "thoughts.jsonl").write_text(f"{row[:-3]}\n{row}\n")
    with pytest.raises(UserError, match=r"thoughts.jsonl:1: malformed JSON"):
        lengths_of_run(str(tmp_path), 2)
