"""Many thoughts over one document: seconds and memory of an update as their number grows, at a fixed chunk.

    python benchmarks/thoughts.py [--json FILE] [--thoughts 16 32 64 128 256] [--chunk 1072] [--clock cpu]

K = 4 positions in one document throughout, so that only G grows. Beyond the cost of the document, seconds should be
proportional to the thoughts; memory should not grow, because only one chunk is kept for the backward pass.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import harness
import torch
from harness import OPEN
from step import Ours, peak_mib

POSITIONS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--model", default="qwen3 4x256", choices=harness.MODELS)
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--thoughts", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="K * G, multiples of 4")
    parser.add_argument("--chunk", type=int, help="update.tokens_per_chunk; else 16 thoughts' tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", default="wall", choices=harness.CLOCKS, help="cpu: the process's own seconds")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.chunk = options.chunk or 16 * (len(OPEN) + options.length)
    rows: list[dict[str, Any]] = []
    for thoughts in options.thoughts:
        rows.append(measure(thoughts, options))
        show(rows[-1], rows[0])
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(thoughts: int, options: argparse.Namespace) -> dict[str, Any]:
    """Shortest seconds of the rollout and the update of one document's thoughts, and the memory that an update adds."""
    grid = (options.prefix, options.length, POSITIONS, thoughts // POSITIONS)
    ours = Ours(options.model, grid, True, options)
    phases: list[dict[str, float]] = []

    def job() -> None:
        ours()
        phases.append(ours.phases)

    harness.alternately({"forethought": job}, options.repeats, clock=options.clock)
    least = {phase: min(some[phase] for some in phases[-options.repeats :]) for phase in ("rollout", "update")}
    here = {"model": options.model, "P": grid[0], "L": grid[1], "K": grid[2], "G": grid[3], "chunk": options.chunk}
    here |= {"peer": "forethought", "phase": "update", "seconds": least["update"]}
    here |= {"rollout_seconds": least["rollout"], "peak_mib": peak_mib(options.model, grid, True, options.chunk)}
    return here | {"clock": options.clock, "threads": torch.get_num_threads(), "repeats": options.repeats}


def show(row: dict[str, Any], first: dict[str, Any]) -> None:
    thoughts, fewest = (some["K"] * some["G"] for some in (row, first))
    each, least = row["seconds"] / thoughts, first["seconds"] / fewest
    print(
        f"{thoughts:4d} thoughts: update {row['seconds']:.2f} s, {1e3 * each:.1f} ms a thought ({each / least:.2f} of "
        f"that with {fewest}), adds {row['peak_mib']:.0f} MiB; rollout {row['rollout_seconds']:.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
