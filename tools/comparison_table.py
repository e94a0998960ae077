"""An experiment's table as Markdown: `python tools/comparison_table.py RUN [METRIC ...]` (metrics: docs/metrics.md)."""

import json
import sys
from pathlib import Path
from typing import Any

METRICS = (
    "answer/accuracy_think", "answer/accuracy_nothink", "answer/gain_over_base", "all/gain_over_base", "all/drift",
    "answer/kept_shuffled", "cost/flops", "cost/cpu_seconds",
)  # fmt: skip


def main(words: list[str]) -> int:
    """Print a row for each arm, those of sweeps included, and the verdicts."""
    run, metrics = Path(words[0]), words[1:] or METRICS
    rows = json.loads((run / "compare.json").read_text(encoding="utf-8"))
    described = json.loads((run / "experiment.json").read_text(encoding="utf-8"))
    found = {(row["arm"], row["seed"], row["metric"]): row for row in rows}
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    shown = [metric for metric in metrics if any((arm, "all", metric) in found for arm in arms)]
    print("| arm | seeds |", " | ".join(shown), "|")
    print("| --- | --- |", " | ".join("---" for _ in shown), "|")
    for arm in arms:
        seeds = {seed for name, seed, _ in found if name == arm} - {"all"}
        cells = [_cell(found.get((arm, "all", metric)), metric) for metric in shown]
        print(f"| {arm} | {len(seeds) or ''} |", " | ".join(cells), "|")
    verdicts = {True: "holds", False: "FAILS", None: "not judged"}
    for one in described["claims"]:
        print(f"- {verdicts[one['holds']]}: {one['claim']}: {one['evidence']}")
    if described["missing"]:
        print("Not finished:", ", ".join(described["missing"]))
    spent = described["spent"]
    print(f"{spent['seconds']:.0f} s in all calls, {spent['cpu_seconds']:.0f} CPU seconds of all finished runs")
    return 0


def _cell(row: dict[str, Any] | None, metric: str) -> str:
    if row is None:
        return ""
    value, low, high = (row[name] for name in ("value", "low", "high"))
    if metric.startswith("cost/"):
        return f"{value:.3g}" if value >= 1e6 else f"{value:.0f}"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
