"""The planner's estimates beside the steps that benchmarks/gpu.py measured on one GPU.

    python benchmarks/plan.py [FILE ...]

Arithmetic on result files; nothing is run. The GPU is planned as an H100 with its built-in shares.
"""

import json
import sys
from pathlib import Path
from typing import Any

from forethought.config import load
from forethought.memory import memory
from forethought.tools.plan.job import Job, Options, job, shipped_shape
from forethought.tools.plan.timing import step

RESULTS = Path(__file__).parent / "results"
GIB = 2**30


def measured(file: Path) -> list[dict[str, Any]]:
    """The rows of whole steps with the shape of Qwen3-1.7B."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [row for row in rows if row.get("phase") == "step" and row.get("model") == "qwen3 1.7b"]


def planned(row: dict[str, Any]) -> Job:
    """The job of a measured row."""
    options = {
        "corpus.window": row["P"] + 1,
        "method.thought_length": row["L"],
        "method.group": row["G"],
        "method.positions": row["K"],
        "method.prompt": "{context}",
        "method.temperature": 1.0,
        "train.batch": row["documents"] * row["K"],
        "train.rollout_batch": row["rows"],
        "update.tokens_per_chunk": row["chunk"],
    }
    config = load("qwen3-1.7b", [word for name, value in options.items() for word in (f"--{name}", str(value))])
    shape = shipped_shape("qwen3-1.7b")
    assert shape is not None
    return job(config, shape, Options(gpu="h100", prefix=row["P"], length=row["L"]))


def expected(row: dict[str, Any]) -> dict[str, float]:
    """The planner's figures under the row's names."""
    one = planned(row)
    found, seconds = memory(one), {phase.name: phase.seconds for phase in step(one).phases}
    return {
        "rollout_s": seconds["prefill"] + seconds["decode"],
        "score_s": seconds["score"],
        "update_s": seconds["update"],
        "optimizer_s": seconds["optimizer"],
        "sync_s": seconds["bf16 copy"],
        "ema_s": seconds["ema"],
        "step_s": sum(seconds.values()),
        "collect_peak_gib": (sum(found.held.values()) + max(found.phases["decode"], found.phases["score"])) / GIB,
        "peak_gib": found.peak / GIB,
    }


def main() -> None:
    files = [Path(word) for word in sys.argv[1:]] or sorted(RESULTS.glob("gpu-steps-*.json"))
    print("| file | L | documents | " + " | ".join(expected(measured(files[0])[0])) + " |")
    print("| --- |" + " --- |" * 11)
    for file in files:
        for row in measured(file):
            cells = [f"{value:.3g} / {row[name]:.3g}" for name, value in expected(row).items()]
            print(f"| {file.name} | {row['L']} | {row['documents']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
