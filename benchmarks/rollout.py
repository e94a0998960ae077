"""Sampling a document's thoughts, against Hugging Face's `generate(num_return_sequences=G)`.

    python benchmarks/rollout.py [--json FILE] [--models NAME ...] [--grid 1024,64,1,16] [--repeats 5] [--clock cpu]

Both sample G thoughts of L tokens behind each of K prefixes, at temperature 1 and without truncation, taking turns in
one run. `generate` takes the prefixes one after the other; Forethought also closes the thoughts and reads the targets'
evidence, L + 4 tokens a row in all.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from harness import CLOSE, FORM, OPEN

from forethought.positions import at_places, stream
from forethought.rollout import draw_noise
from forethought.rollout.native import native_engine

GRID = ["512,64,1,16", "1024,64,1,16", "512,256,1,16"]


def forethought(name: str, grid: tuple[int, ...], device: str) -> Callable[[], None]:
    """Our engine on one document, as a job."""
    prefix, length, places, group = grid
    settings = harness.settings(length, places, group)
    model = harness.build(name, device)
    engine = native_engine(model, FORM, settings)
    window = harness.window(prefix, places, model.config.vocab_size)
    positions = at_places([window], [harness.stops(prefix, places)], 1)
    noise = draw_noise((group, length), [stream(0, i) for i in range(places)])

    def job() -> None:
        thoughts = engine.sample(positions, noise)
        assert thoughts.mask.all() and thoughts.tokens.shape == (places, group, length)

    return job


def generate(name: str, grid: tuple[int, ...], device: str) -> Callable[[], None]:
    """The same prefixes and lengths for a model's own `generate`, prefix by prefix."""
    prefix, length, places, group = grid
    model = harness.build(name, device)
    tokens = harness.window(prefix, places, model.config.vocab_size).tokens
    prompts = [torch.tensor([[*tokens[:t], *OPEN]], device=device) for t in harness.stops(prefix, places)]
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    options |= {"min_new_tokens": length, "max_new_tokens": length, "num_return_sequences": group}

    @torch.no_grad()
    def job() -> None:
        for prompt in prompts:
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert out.shape == (group, prompt.shape[1] + length)

    return job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--models", nargs="+", choices=harness.MODELS, default=["qwen3 4x256"])
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
            jobs = {side: make(name, grid, options.device) for side, make in SIDES.items()}
            seconds = harness.alternately(jobs, options.repeats, clock=options.clock)
            best = min(seconds["forethought"])
            rows.append(
                {"model": name, **dict(zip("PLKG", grid, strict=True)), "peer": "generate", "phase": "rollout"}
                | harness.ratios(seconds["forethought"], seconds["generate"])
                | {"seconds_forethought": best, "seconds": min(seconds["generate"]), "device": options.device}
                | {"clock": options.clock, "threads": torch.get_num_threads(), "repeats": options.repeats}
                | {"rollout_ms_a_token": 1e3 * best / (grid[1] + len(CLOSE) + 1)}
            )
            show(rows[-1])
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


SIDES: dict[str, Callable[[str, tuple[int, ...], str], Callable[[], None]]] = {
    "forethought": forethought,
    "generate": generate,
}


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['model']}  P={row['P']} L={row['L']} K={row['K']} G={row['G']}: {row['seconds_forethought']:.3f} s "
        f"against {row['seconds']:.3f}, {row['ratio_median']:.2f}x ({row['ratio_min']:.2f} to {row['ratio_max']:.2f}); "
        f"{row['K'] * row['G'] * row['L'] / row['seconds_forethought']:.0f} thought tokens/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
