"""RLP steps of a large model on one GPU: exactness of the GPU's own paths, then phases against what the card could do.

    python benchmarks/gpu.py [--json FILE] [--model "qwen3 1.7b"] [--lengths 64 256 1024] [--places 16] [--repeats 2]

Random weights at Qwen3-1.7B's shape, bf16 over fp32 masters, prefixes of 1,024 tokens, 16 thoughts at the end of each
of `--places` documents. The ceiling of decoding is what has to be read from memory in a step (weights, one copy of each
document, the suffixes) over the card's copy rate, that of the update the card's matmul rate; both are measured in the
same run. `generate` is Hugging Face's, on the same documents. Part `update`: the update alone, of one step's thoughts;
part `ways`: with unfused modules, with update.compile, with update.attention triton and with both, in turns, and how
far the gradients are apart (relative norm); part `resume`: whether a run that is cut and resumed ends with the same
bits; part `offload`: whether one with update.offload does, and steps with it (peaks without it: part `steps`).
`--quick`: a small model, on a CPU where there is no GPU, to see that it all runs. benchmarks/gpu_suite.sh runs every
part within nine minutes.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from harness import FORM, OPEN, synchronise
from safetensors.torch import load_file

from forethought import rollout
from forethought.algo.rlp import RLP
from forethought.config import Config, Update, load
from forethought.data.positions import at_positions, make_generator
from forethought.flops import Shape, step_flops
from forethought.memory import cache_numbers
from forethought.models import fused, offload
from forethought.models.compute_copy import Network
from forethought.prefix import SuffixCache, backbone, enable, read
from forethought.prefix import attention as merged
from forethought.rollout import draw_noise
from forethought.rollout.cuda_graphs import CUDAGraphDecoder, attention_only
from forethought.rollout.native import NativeEngine
from forethought.trainer import TimedEngine, resume, train

BF16 = torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(job: Callable[[], Any], repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each counted turn."""
    seconds = []
    for turn in range(warmup + repeats):
        synchronise()
        started = time.perf_counter()
        job()
        synchronise()
        if turn >= warmup:
            seconds.append(time.perf_counter() - started)
    return seconds


def ceilings() -> dict[str, Any]:
    """The card, its bf16 matmul rate and the rate of a copy, reads and writes counted."""
    size, numbers = (8192, 2**30) if DEVICE == "cuda" else (64, 2**16)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=BF16) for _ in range(2))
    big = torch.randn(numbers, device=DEVICE, dtype=BF16)
    other = torch.empty_like(big)
    matmul = min(timed(lambda: [torch.mm(a, b) for _ in range(10)], 3)) / 10
    copy = min(timed(lambda: [other.copy_(big) for _ in range(10)], 3)) / 10
    return {
        "card": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
        "torch": torch.__version__,
        "matmul_tflops": 2 * size**3 / matmul / 1e12,
        "copy_tb_s": 2 * big.nbytes / copy / 1e12,
    }


def reset_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0


def document_ends(name: str, prefix: int, documents: int, vocab: int) -> Any:
    """The ends of some documents of random tokens."""
    windows = [harness.window(prefix, 1, vocab, seed=i) for i in range(documents)]
    return at_positions(windows, [[prefix] for _ in windows], 1)


def exactness(options: argparse.Namespace) -> list[dict[str, Any]]:
    """CUDA graphs and fused attention against eager code, on small models; relative to the largest number."""
    rows = []
    for name, dtype in itertools.product(("qwen3 4x256", "nemotron_h 8x256"), (torch.float32, BF16)):
        model = harness.build(name, DEVICE).to(dtype)
        enable(model)
        form, settings = FORM, harness.settings(40, 3, 4)
        windows = [harness.window(n, 3, 4096, seed=n) for n in (80, 97, 64)]
        positions = at_positions(windows, [[t - 1 for t in harness.stops(n, 3)] for n in (80, 97, 64)], 1)
        noise = draw_noise((4, 40), [make_generator(0, i) for i in range(9)])
        plain = NativeEngine(model, form, settings.method, 64).sample(positions, noise)
        for compiled in (False, True) if DEVICE == "cuda" and attention_only(model) else (False,):
            graphs = CUDAGraphDecoder(model, form, settings.method, 64, compiled)
            found = NativeEngine(model, form, settings.method, 64, graphs=graphs).sample(positions, noise)
            same = float((plain.tokens == found.tokens).all(-1).float().mean())
            gap = float((plain.logp - found.logp).abs()[(plain.tokens == found.tokens).cumprod(-1).bool()].max())
            what = f"decoding, {'cuda_graphs_compiled' if compiled else 'cuda_graphs'}"
            rows.append({"check": what, "model": name, "dtype": str(dtype), "same_thoughts": same, "logp_gap": gap})
    kernels = [("flash", BF16), ("plain", BF16)]
    if DEVICE == "cuda":
        kernels += [("triton", BF16), ("triton", torch.float32)]
    for windows_of, name in (((96, 96), "whole documents"), ((96, 57), "documents of other lengths, two places")):
        exact = _gradient(windows_of, "plain", torch.float64)
        row: dict[str, Any] = {"check": f"gradient, {name}"}
        for kernel, dtype in kernels:
            gap = float((_gradient(windows_of, kernel, dtype).double() - exact).abs().max() / exact.abs().max())
            row[f"{kernel}_gap" if dtype == BF16 else f"{kernel}_fp32_gap"] = gap
        rows.append(row)
    return rows


def _gradient(lengths: tuple[int, ...], kernel: str, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Of the key projection of the first layer, through merged attention: flash, in plain products, or in Triton."""
    model = harness.build("qwen3 4x256", DEVICE).to(dtype)
    enable(model)
    documents = [harness.window(n, 1, 4096, seed=n).tokens for n in lengths]
    stops = [[n // 2, n] if len(set(lengths)) > 1 else [n] for n in lengths]
    has, merged._has_kernel = merged._has_kernel, (lambda *_: False) if kernel == "plain" else merged._has_kernel
    try:
        prefix = read(model, documents, stops)
        at = [position for position in range(sum(map(len, stops))) for _ in range(3)]
        tokens = torch.randint(10, 4096, (len(at), 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        cache = SuffixCache(prefix, at, triton=kernel == "triton")
        out = backbone(model, tokens, cache, cache.position_ids(24))
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        (out * weight).sum().backward()
    finally:
        merged._has_kernel = has
    return model.model.layers[0].self_attn.k_proj.weight.grad


class Step:
    """A whole RLP step as the loop takes it, by phases."""

    def __init__(self, name: str, settings: Config, prefix: int, documents: int):
        self.weights = harness.build(name, DEVICE)
        self.settings, self.number = settings, 0
        self.network = Network(self.weights, "bf16")
        self.engine = TimedEngine(rollout.engine(self.network.model, FORM, settings))
        vocab = self.weights.config.vocab_size
        self.method = RLP(self.network, self.engine, FORM, harness.tokenizer(vocab), settings)
        self.optimizer = torch.optim.AdamW(self.weights.parameters(), lr=1e-6, fused=DEVICE == "cuda")
        self.windows = [harness.window(prefix, settings.method.positions, vocab, seed=i) for i in range(documents)]
        if settings.update.offload:
            networks = [self.weights, *self.method.state().values()]
            self.engine.make_room(offload.Offload(self.weights.device, networks, self.optimizer))

    def __call__(self) -> dict[str, float]:
        """Seconds of each phase, and the peak memory in GiB."""
        self.number += 1
        reset_peak()
        marks = [time.perf_counter()]

        def mark() -> None:
            synchronise()
            marks.append(time.perf_counter())

        sampled = self.engine.seconds
        record = self.method.collect(self.windows, self.number)
        microbatches = self.method.microbatches(record)
        mark()
        collect_peak = peak_gib()
        for microbatch in microbatches:
            self.method.forward_backward(microbatch)
        mark()
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.parameters(), 1.0))
        if self.engine.offload:
            self.engine.offload.settle()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mark()
        self.network.sync()
        mark()
        self.method.after_step()
        mark()
        if self.engine.offload:
            self.engine.offload.start()
        steps = [b - a for a, b in itertools.pairwise(marks)]
        rollout = self.engine.seconds - sampled
        work = step_flops(Shape.of(self.weights.config), record.work(FORM, self.settings))
        assert norm > 0
        return {
            "rollout_s": rollout,
            "score_s": steps[0] - rollout,
            "update_s": steps[1],
            "optimizer_s": steps[2],
            "sync_s": steps[3],
            "ema_s": steps[4],
            "step_s": marks[-1] - marks[0],
            "update_tflops": work.update / steps[1] / 1e12,
            "collect_peak_gib": collect_peak,
            "peak_gib": peak_gib(),
        }


def decode_ceiling(config: Any, grid: dict[str, int], rows: int, copy_tb_s: float) -> float:
    """Tokens a second if each step only reads weights, one copy of each document and half-grown suffixes once."""
    shape = Shape.of(config)
    keys, numbers = cache_numbers(shape)
    token, states = 2 * keys, 2 * 4 * numbers  # states are fp32, read and written
    documents = rows // grid["G"]
    read = 2 * shape.parameters + documents * grid["P"] * token + rows * (grid["L"] / 2 * token + states)
    return rows / (read / (copy_tb_s * 1e12))


def steps(options: argparse.Namespace, rates: dict[str, Any]) -> list[dict[str, Any]]:
    """Whole steps at each length, and decoding alone."""
    rows = []
    for length in options.lengths:
        share = 1 if length <= 256 else 2
        at_once, documents = options.rows // share, options.places // share
        settings = harness.settings(length, 1, options.group, batch=documents, chunk=options.chunk)
        settings = _replaced(settings, at_once, options)
        step = Step(options.model, settings, options.prefix, documents)
        found = []
        for _ in range(1 + options.repeats):
            found.append(step())
            print(length, {k: round(v, 4) for k, v in found[-1].items()}, flush=True)
        best = min(found[1:], key=lambda one: one["step_s"])
        grid = {"P": options.prefix, "L": length, "K": 1, "G": options.group}
        thoughts = documents * options.group
        decoded = thoughts * length / best["rollout_s"]
        ceiling = decode_ceiling(step.weights.config, grid, min(at_once, thoughts), rates["copy_tb_s"])
        rows.append(
            {"model": options.model, **grid, "documents": documents, "rows": at_once, "phase": "step"}
            | best
            | {
                "first_step_s": found[0]["step_s"],
                "decoding": options.decoding,
                "chunk": step.method.scoring.tokens,
            }
            | {
                "rollout_tokens_per_s": decoded,
                "rollout_ceiling_tokens_per_s": ceiling,
                "rollout_of_ceiling": decoded / ceiling,
            }
            | {"update_of_matmul": best["update_tflops"] / rates["matmul_tflops"]}
            | {
                "thought_tokens_per_s": thoughts * length / best["step_s"],
                "ema_of_step": best["ema_s"] / best["step_s"],
            }
        )
        show(rows[-1])
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def update(options: argparse.Namespace, rates: dict[str, Any]) -> list[dict[str, Any]]:
    """The update alone, of the same thoughts again and again."""
    length, (step, record, microbatches) = options.lengths[0], _to_update(options)
    seconds = timed(lambda: list(map(step.method.forward_backward, microbatches)), options.repeats)
    work = step_flops(Shape.of(step.weights.config), record.work(FORM, step.settings)).update
    rate = work / min(seconds) / 1e12
    row = {"model": options.model, "P": options.prefix, "L": length, "K": options.positions, "G": options.group}
    row |= {
        "phase": "update",
        "documents": len(step.windows),
        "chunk": step.method.scoring.tokens,
        "seconds": min(seconds),
    }
    row |= {"update_tflops": rate, "update_of_matmul": rate / rates["matmul_tflops"]}
    print(row, flush=True)
    return [row]


def _to_update(options: argparse.Namespace) -> tuple[Step, Any, list[Any]]:
    """A step, its record and its microbatches."""
    length, count = options.lengths[0], options.positions
    settings = harness.settings(length, count, options.group, batch=options.places, chunk=options.chunk)
    step = Step(options.model, _replaced(settings, options.rows, options), options.prefix, options.places // count)
    record = step.method.collect(step.windows, 1)
    return step, record, step.method.microbatches(record)


WAYS = {
    "plain": {},
    "unfused": {},
    "compile": {"compiled": True},
    "triton": {"triton": True},
    "both": {"compiled": True, "triton": True},
}


def ways(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The update in several ways, in turns: seconds, of the first turn too, and how far the gradients are apart."""
    step, _, microbatches = _to_update(options)
    gradient, scoring = step.method, step.method.scoring
    seconds: dict[str, list[float]] = {name: [] for name in WAYS if DEVICE == "cuda" or name in ("plain", "compile")}
    found: dict[str, torch.Tensor] = {}
    for _ in range(1 + options.repeats):
        for name, times in seconds.items():
            gradient.scoring = dataclasses.replace(scoring, **WAYS[name])
            step.weights.zero_grad()
            with _unfused(step.network.model) if name == "unfused" else contextlib.nullcontext():
                times.extend(timed(lambda: list(map(step.method.forward_backward, microbatches)), 1, warmup=0))
            grads = [p.grad.flatten().to("cpu") for p in step.weights.parameters() if p.grad is not None]
            found[name] = torch.cat(grads).float()
    rows, plain = [], found["plain"]
    for name, (first, *later) in seconds.items():
        row: dict[str, Any] = {"model": options.model, "P": options.prefix, "L": options.lengths[0], "phase": "update"}
        row |= {"K": options.positions, "way": name, "seconds": min(later), "first_s": first}
        row["ratio"] = min(seconds["plain"][1:]) / min(later)
        rows.append(row | {"gradient_gap": float((found[name] - plain).norm() / plain.norm())})
        print(rows[-1], flush=True)
    return rows


@contextlib.contextmanager
def _unfused(model: Any) -> Iterator[None]:
    """Every module with its own forward pass, and the family's own rotary positions."""
    changed = [(module, vars(module).pop("forward")) for module in model.modules() if "forward" in vars(module)]
    devices, fused.KERNEL_DEVICES = fused.KERNEL_DEVICES, ()
    try:
        yield
    finally:
        fused.KERNEL_DEVICES = devices
        for module, forward in changed:
            module.forward = forward


RESUMED: dict[str, list[str]] = {"plain": [], "lora": ["--lora.r", "4"], "fsdp2": ["--parallel.shard", "zero1"]}


def resumed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whether two steps, a cut and two more end with the bits of four: plain, with adapters, and sharded by FSDP2."""
    rows = []
    for name, words in RESUMED.items():
        with tempfile.TemporaryDirectory() as folder, _one_process(name == "fsdp2"):
            ends = []
            for steps in (4, 2):
                path = Path(folder) / str(steps)
                small = ["--method.group", "4", "--train.batch", "8", "--optim.schedule", "constant", "--evaluate.path"]
                sized = ["--train.steps", str(steps), "--run", str(path), "--model.precision", "bf16"]
                config = load("quickstart", [*small, "", *sized, *words])
                train(config)
                if steps == 2:
                    (path / "summary.json").unlink()
                    resume(path, config=dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4)))
                ends.append(load_file(path / "policy" / "model.safetensors"))
            whole, again = ends
            same = all(torch.equal(tensor, again[key]) for key, tensor in whole.items())
            rows.append({"check": f"resume, {name}", "same_bits": same})
            print(rows[-1], flush=True)
    return rows


@contextlib.contextmanager
def _one_process(wanted: bool) -> Iterator[None]:
    """A process group of this process alone, which is enough to shard."""
    if wanted:
        backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    if wanted:
        torch.distributed.destroy_process_group()


def offloaded(options: argparse.Namespace) -> list[dict[str, Any]]:
    """update.offload: whether four steps end with the same bits, and two steps of the large model."""
    rows, ends = [], []
    for wanted in ("False", "True"):
        with tempfile.TemporaryDirectory() as folder:
            words = ["--method.group", "4", "--train.batch", "8", "--train.steps", "4", "--evaluate.path", ""]
            train(
                load("quickstart", [*words, "--model.precision", "bf16", "--update.offload", wanted, "--run", folder])
            )
            ends.append(load_file(Path(folder) / "policy" / "model.safetensors"))
    rows.append({"check": "offload", "same_bits": all(torch.equal(one, ends[1][key]) for key, one in ends[0].items())})
    print(rows[-1], flush=True)
    length = options.lengths[0]
    settings = harness.settings(length, 1, options.group, batch=options.places, chunk=options.chunk)
    settings = _replaced(settings, options.rows, options)
    settings = dataclasses.replace(settings, update=dataclasses.replace(settings.update, offload=True))
    step = Step(options.model, settings, options.prefix, options.places)
    grid = {"model": options.model, "P": options.prefix, "L": length, "K": 1, "G": options.group, "rows": options.rows}
    for _ in range(3):  # moments leave from the second on
        rows.append({**grid, "phase": "step, offload", "documents": options.places, **step()})
        print({name: round(one, 4) if isinstance(one, float) else one for name, one in rows[-1].items()}, flush=True)
    return rows


def profile(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Where the time of an update and of sampling goes: the kernels that take longest, printed."""
    settings = harness.settings(options.lengths[0], 1, options.group, batch=options.places, chunk=options.chunk)
    step = Step(options.model, _replaced(settings, options.rows, options), options.prefix, options.places)
    for _ in range(2):
        print({k: round(v, 4) for k, v in step().items()}, flush=True)
    microbatches = step.method.microbatches(step.method.collect(step.windows, 2))
    jobs: dict[str, Callable[[], Any]] = {"update": lambda: list(map(step.method.forward_backward, microbatches))}
    jobs["sampling and scoring"] = lambda: step.method.collect(step.windows, 2)
    for name, job in jobs.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watched:
            wall = timed(job, 1, warmup=0)[0]
        kernels = [event for event in watched.key_averages() if event.self_device_time_total > 0]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        print(f"{name}: {wall:.3f} s, kernels {busy:.3f} s, {sum(event.count for event in kernels)} of them")
        for event in sorted(kernels, key=lambda one: -one.self_device_time_total)[:24]:
            print(f"  {event.self_device_time_total / 1e3:9.2f} ms  {event.count:6d}  {event.key[:100]}", flush=True)
    return []


def _replaced(settings: Config, rows: int, options: argparse.Namespace) -> Config:
    train = dataclasses.replace(settings.train, rollout_batch=rows)
    model = dataclasses.replace(settings.model, decoding=options.decoding, precision="bf16")
    return dataclasses.replace(settings, train=train, model=model, update=Update(tokens_per_chunk=options.chunk))


def decoding(options: argparse.Namespace, rates: dict[str, Any]) -> list[dict[str, Any]]:
    """Sampling alone, in bf16: eager, CUDA graphs, of a compiled model too, and Hugging Face's `generate`."""
    model = Network(harness.build(options.model, DEVICE), "bf16").model
    enable(model)
    rows = []
    for length in [length for length in options.lengths if length <= 256]:
        settings = harness.settings(length, 1, options.group)
        positions = document_ends(options.model, options.prefix, options.places, model.config.vocab_size)
        noise = draw_noise((options.group, length), [make_generator(0, i) for i in range(options.places)])
        grid = {"P": options.prefix, "L": length, "K": 1, "G": options.group}
        thoughts = options.places * options.group
        ceiling = decode_ceiling(model.config, grid, min(options.rows, thoughts), rates["copy_tb_s"])
        for kind in options.kinds:
            if kind == "generate":
                job = _generate(model, positions, length, options.group)
            else:
                compiled = kind == "cuda_graphs_compiled"
                graphs = CUDAGraphDecoder(model, FORM, settings.method, options.rows, compiled)
                graphs = None if kind == "eager" else graphs
                engine = NativeEngine(model, FORM, settings.method, options.rows, graphs=graphs)
                job = _sampling(engine, positions, noise)
            started = time.perf_counter()
            seconds = timed(job, 2)
            rate = thoughts * length / min(seconds)
            rows.append(
                {"model": options.model, **grid, "documents": options.places, "rows": options.rows, "phase": "rollout"}
                | {"peer": kind, "seconds": min(seconds), "first_s": time.perf_counter() - started - sum(seconds)}
                | {"tokens_per_s": rate, "ceiling_tokens_per_s": ceiling, "of_ceiling": rate / ceiling}
            )
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            del job
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def _sampling(engine: NativeEngine, positions: Any, noise: torch.Tensor) -> Callable[[], None]:
    return lambda: engine.sample(positions, noise)


def _generate(model: Any, positions: Any, length: int, group: int) -> Callable[[], None]:
    prompts = torch.tensor([[*context, *OPEN] for context in positions.contexts()], device=DEVICE)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    options |= {"min_new_tokens": length, "max_new_tokens": length, "num_return_sequences": group}

    @torch.no_grad()
    def job() -> None:
        model.set_attn_implementation("sdpa")
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        assert out.shape == (len(prompts) * group, prompts.shape[1] + length)
        model.set_attn_implementation("shared_prefix")

    return job


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['model']} P={row['P']} L={row['L']} G={row['G']}, {row['documents']} documents, {row['step_s']:.2f} s"
        f"\n  rollout {row['rollout_s']:.2f} s: {row['rollout_tokens_per_s']:.0f} tokens/s, "
        f"{row['rollout_of_ceiling']:.0%} of the ceiling; score {row['score_s']:.2f} s"
        f"\n  update {row['update_s']:.2f} s: {row['update_tflops']:.0f} TFLOP/s, {row['update_of_matmul']:.0%}"
        f"\n  optimizer {row['optimizer_s']:.3f} s, sync {row['sync_s']:.3f} s, EMA {row['ema_s']:.3f} s"
        f"\n  peak {row['peak_gib']:.1f} GiB, of it {row['collect_peak_gib']:.1f} while sampling and scoring",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--model", choices=harness.MODELS, default="qwen3 1.7b")
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument(
        "--places", type=int, default=16, help="documents, with a place at the end of each (half above L = 256)"
    )
    parser.add_argument("--positions", type=int, default=1, help="of each document, in the parts update and ways")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument(
        "--rows", type=int, default=256, help="thoughts that decode at once (half as many above L = 256)"
    )
    parser.add_argument("--chunk", type=int, default=0, help="update.tokens_per_chunk")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--decoding", default="auto", choices=["auto", "eager", "cuda_graphs", "cuda_graphs_compiled"])
    parser.add_argument("--kinds", nargs="*", default=["eager", "cuda_graphs", "cuda_graphs_compiled", "generate"])
    parser.add_argument("--parts", nargs="+", default=["exactness", "decoding", "steps"])
    parser.add_argument("--quick", action="store_true", help="the small model, short thoughts")
    options = parser.parse_args()
    if DEVICE == "cpu" and not options.quick:
        parser.exit(2, "benchmarks/gpu.py: there is no CUDA device\n")
    warnings.simplefilter("ignore")
    if options.quick:
        options.model = "qwen3 4x256" if options.model == "qwen3 1.7b" else options.model
        options.lengths, options.prefix, options.places = [16], 128, 4
        options.positions = min(options.positions, 2)
        options.kinds = [kind for kind in options.kinds if DEVICE == "cuda" or "cuda" not in kind]
        options.decoding = options.decoding if DEVICE == "cuda" else "auto"
        offload.DEVICES = ("cpu", "cuda")
    rates = ceilings()
    print(rates, flush=True)
    rows: list[dict[str, Any]] = [rates]
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "exactness": lambda: exactness(options),
        "decoding": lambda: decoding(options, rates),
        "steps": lambda: steps(options, rates),
        "update": lambda: update(options, rates),
        "ways": lambda: ways(options),
        "resume": lambda: resumed(options),
        "offload": lambda: offloaded(options),
        "profile": lambda: profile(options),
    }
    failed = 0
    for name in options.parts:
        try:
            found = parts[name]()
        except Exception:
            traceback.print_exc()
            found, failed = [], failed + 1
        if name == "exactness":
            for row in found:
                print({k: f"{v:.2e}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows += found
        torch.cuda.empty_cache()  # does nothing on a CPU
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if failed:
        parser.exit(1, f"benchmarks/gpu.py: {failed} parts failed\n")


if __name__ == "__main__":
    main()
