"""Seconds of a step with several processes and with one, each with one thread.

    python benchmarks/processes.py [--counts 1 2] [--steps 5] [--turns 3] [--config CONFIG] [--json FILE]
        [--section.option value ...]

Without a config: a Qwen3 shape of 4 layers and width 256 with random weights, a step of eight documents of 256 tokens,
eight thoughts of up to 32 tokens at one position of each.

One and several processes alternate. Two clocks: `wall` is the time that a user waits; `cpu` is, for each step, the CPU
seconds of the process that computed longest: what the step would take with a core for each process and free
communication. On a busy machine `cpu` is more informative, and optimistic.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch

from forethought.data.worlds import load_world

WARMUP = 1  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--config", default="")
    parser.add_argument("--json", type=Path)
    options, words = parser.parse_known_args()
    words += ["--train.steps", str(options.steps + WARMUP), "--evaluate.path", "", "--train.checkpoint_every", "100000"]
    seconds: dict[int, list[dict[str, float]]] = {count: [] for count in options.counts}
    for _ in range(options.turns):
        for count in options.counts:
            with tempfile.TemporaryDirectory() as folder:
                own = words if options.config else [*shape(Path(folder)), *words]
                seconds[count].append(turn(count, options.config, own, Path(folder)))
    rows = []
    for count, turns in seconds.items():
        row: dict[str, Any] = {"processes": count}
        for clock in ("wall", "cpu"):
            first = [one[clock] for one in seconds[options.counts[0]]]
            ratios = [before / one[clock] for before, one in zip(first, turns, strict=True)]
            row |= {
                f"{clock}_step_s": min(one[clock] for one in turns),
                f"{clock}_speedup": statistics.median(ratios),
            }
            row |= {f"{clock}_speedup_min": min(ratios), f"{clock}_speedup_max": max(ratios)}
        rows.append(row)
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"words": words, "config": options.config, "rows": rows}, indent=2) + "\n")


def shape(folder: Path) -> list[str]:
    """The options of the default setting, with its files in a folder."""
    harness.qwen3(4096, 256, 4).save_pretrained(folder / "architecture")
    row = load_world("cups").row
    texts = [" ".join(row("train", 40 * i + k, 0)["text"] for k in range(40)) for i in range(64)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [
        *("--model.path", str(folder / "architecture"), "--model.init", "random", "--model.tokenizer", "embedded"),
        *("--corpus.path", str(folder / "text.jsonl"), "--corpus.window", "256", "--corpus.min_tokens", "256"),
        *("--method.group", "8", "--method.thought_length", "32", "--train.batch", "8"),
    ]


def turn(count: int, config: str, words: list[str], folder: Path) -> dict[str, float]:
    """Median seconds of a step, by both clocks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    separator = ["--"] if launcher else []  # torchrun would take `--run` for an option of its own
    command = [sys.executable, *launcher, *separator, __file__, "worker", str(folder), config, *words]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("steps-*.json"))]
    assert len(ranks) == count
    steps = list(zip(*ranks, strict=True))[WARMUP:]
    return {
        "wall": statistics.median(max(wall for wall, _ in step) for step in steps),
        "cpu": statistics.median(max(cpu for _, cpu in step) for step in steps),
    }


def worker(folder: str, config: str, words: list[str]) -> None:
    """Train, and write the seconds of each step."""
    import forethought
    from forethought.trainer import Callbacks

    class Clock(Callbacks):
        def __init__(self) -> None:
            self.last, self.steps = (time.perf_counter(), time.process_time()), []

        def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
            now = (time.perf_counter(), time.process_time())
            self.steps.append((now[0] - self.last[0], now[1] - self.last[1]))
            self.last = now

    torch.set_num_threads(1)
    clock = Clock()
    forethought.train(forethought.load(config or None, [*words, "--run", str(Path(folder) / "run")]), clock)
    (Path(folder) / f"steps-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(clock.steps))


if __name__ == "__main__":
    worker(sys.argv[2], sys.argv[3], sys.argv[4:]) if sys.argv[1:2] == ["worker"] else main()
