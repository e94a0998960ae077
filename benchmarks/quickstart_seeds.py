"""The quickstart over several seeds, with its control: a table of held-out figures, in Markdown.

    python benchmarks/quickstart_seeds.py [--config quickstart] [--seeds 5] [--control-seeds 2] [--folder runs/seeds]
                                          [--long-base RUN]

Trains RLP with seeds 0, 1, ... and the same with a random reward, and prints mean and range of the figures over seeds,
and which of the quickstart's promises hold. Finished runs in the folder are not repeated, stopped ones are continued.
With `--config quickstart-notes` it is that of the second world, which takes a folder of its own.
RUN is a base pretrained five times longer (`forethought train pretrain-cups --train.steps 20000 --run RUN`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import transformers

import forethought

ARMS = {"rlp": [], "rlp, random reward": ["--method.reward", "random"]}
FIGURES = {
    "answer/accuracy_think": "accuracy at the answer, thinking",
    "answer/accuracy_nothink": "accuracy at the answer, not thinking",
    "answer/ce_think": "cross-entropy at the answer, thinking",
    "all/ce_think": "cross-entropy everywhere, thinking",
    "all/ce_nothink": "cross-entropy everywhere, not thinking",
    "all/gain_over_base": "gain over the base, everywhere",
    "answer/thought_length": "thought length at the answer",
    "answer/closed": "thoughts that close, at the answer",
}


def finished(config: str, folder: Path, words: list[str], seed: int) -> dict[str, Any]:
    """The summary of one run, trained now if it is not there."""
    run = folder / f"seed-{seed}"
    if not (run / "summary.json").is_file():
        if (run / "config.json").is_file():
            forethought.resume(run)
        else:
            forethought.train(forethought.load(config, [*words, "--seed", str(seed), "--run", str(run)]))
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def spread(summaries: list[dict[str, Any]], name: str) -> str:
    values = [summary[name] for summary in summaries]
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def promises(arms: dict[str, list[dict[str, Any]]], long_base: Path | None) -> dict[str, bool]:
    """What the quickstart promises, for every seed."""
    runs, controls = arms.values()
    think, nothink = "answer/accuracy_think", "answer/accuracy_nothink"
    held = {
        "base at most 75 % at the answer": all(run[f"before/{think}"] <= 0.75 for run in runs),
        "RLP at least 95 %": all(run[f"after/{think}"] >= 0.95 for run in runs),
        "cross-entropy there down 5-fold": all(
            run["before/answer/ce_think"] >= 5 * run["after/answer/ce_think"] for run in runs
        ),
        "gain over all positions up": all(
            run["after/all/gain_over_base"] > run["before/all/gain_over_base"] for run in runs
        ),
        "plain prediction within 0.1 nats of the base": all(abs(run["after/all/drift"]) <= 0.1 for run in runs),
        "random reward: no rise beyond the base's interval": all(
            run[f"after/{think}"] <= run[f"before/{think}/high"] for run in controls
        ),
        "at most 60 % without a thought": all(
            max(run[f"{w}/{nothink}"] for w in ("before", "after")) <= 0.6 for run in runs
        ),
    }
    if long_base is not None:
        figure = json.loads((long_base / "summary.json").read_text(encoding="utf-8"))[f"after/{nothink}"]
        held[f"at most 60 % without a thought after five times the pretraining ({figure:.1%})"] = figure <= 0.6
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--control-seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--long-base", type=Path, default=None)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = {}
    for (arm, words), seeds in zip(ARMS.items(), (options.seeds, options.control_seeds), strict=True):
        folder = options.folder / arm.replace(", ", "-").replace(" ", "-")
        results[arm] = [finished(options.config, folder, words, seed) for seed in range(seeds)]
    heads = [f"{arm}, {len(runs)} seeds" for arm, runs in results.items()]
    print("| mean (range) | base | " + " | ".join(heads) + " |")
    print("| --- | --- |" + " --- |" * len(results))
    for name, meaning in FIGURES.items():
        base = next(iter(results.values()))[0][f"before/{name}"]
        cells = [spread(summaries, f"after/{name}") for summaries in results.values()]
        print(f"| {meaning} | {base:.3f} | " + " | ".join(cells) + " |")
    seconds = [spread(summaries, "seconds") for summaries in results.values()]
    print("| seconds, evaluation included | | " + " | ".join(seconds) + " |\n")
    for promise, held in promises(results, options.long_base).items():
        print(f"- {'holds' if held else 'FAILS'}: {promise}")


if __name__ == "__main__":
    main()
