"""Whether two checkouts train the same: every method for a few steps in each, compared bit for bit.

    python benchmarks/trajectories.py --old OTHER/.venv/bin/python --new .venv/bin/python

Each case runs on one thread in both checkouts (the second's sources come from its own environment). Losses, gains and
all other logged metrics but times, the evaluations and the final weights must be equal to the last bit. With --full
also the whole quickstart of both embedded worlds.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from safetensors import safe_open

SMALL = "--train.steps 6 --train.batch 8 --evaluate.documents 20 --evaluate.positions 2 --train.checkpoint_every 2"
CASES = {
    "rlp": "quickstart",
    "rlp-inner-kl": "quickstart --method.inner_steps 2 --method.kl_weight 0.01 --method.horizon 2",
    "rlp-batch-baseline": "quickstart --method.baseline batch",
    "rlp-std": "quickstart --method.scale std",
    "rlp-random": "quickstart --method.reward random",
    "rlp-replicated": "quickstart --model.prefix replicated",
    "rlp-chunks": "quickstart --update.tokens_per_chunk 200 --method.positions 4",
    "rlp-notes": "quickstart-notes",
    "lora": "quickstart --lora.r 4",
    "checkpointing": "quickstart --update.checkpointing True",
    "rpt": "quickstart --method.name rpt --method.prediction_length 3 --method.end .",
    "cpt": "quickstart --method.name cpt",
    "mixed": "quickstart --method.name mixed",
    "cpp": "quickstart --model.decoding cpp",
    "two-processes": "quickstart",
    "two-shards": "quickstart --parallel.shard zero1",
    "resumed": "quickstart",
}


def train(python: str, case: str, words: list[str], run: Path) -> None:
    """One run, on one thread; `resumed` is killed once a checkpoint is there, then resumed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "forethought", "train", *words, "--run", str(run), "--overwrite", "True"]
    if case.startswith("two-"):
        command = [
            python,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "--",
            *command[2:],
        ]
    if case == "resumed":
        child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while child.poll() is None and not (run / "checkpoints" / "step-00000002").exists():
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        command = [python, "-m", "forethought", "train", "--resume", str(run)]
    subprocess.run(command, env=environment, check=True, capture_output=True)


def compare(old: Path, new: Path) -> list[str]:
    """What differs between two finished runs."""
    found = []
    for file in ("metrics.jsonl", "thoughts.jsonl"):
        rows = [[json.loads(line) for line in (run / file).read_text().splitlines()] for run in (old, new)]
        for before, after in zip(*rows, strict=True):
            found += [
                f"{file} step {before['step']}: {name} {before[name]!r} != {after.get(name)!r}"
                for name in sorted(before)  # a metric that only the new one logs is no difference
                if not name.startswith("time/") and before[name] != after.get(name)
            ]
    for name in ("evaluation-before.json", "evaluation-after.json"):
        if (old / name).exists():
            before, after = (json.loads((run / name).read_bytes()) for run in (old, new))
            for group, columns in before.items():
                if not isinstance(columns, dict):  # the checksum of the held-out text
                    continue
                found += [f"{name} {group}/{key}" for key in columns if columns[key] != after[group].get(key)]
    weights = sorted(path.relative_to(old) for path in (old / "policy").rglob("*.safetensors"))
    for name in weights:
        with safe_open(old / name, "pt") as one, safe_open(new / name, "pt") as other:
            keys = list(one.keys())
            if keys != list(other.keys()):
                found.append(f"{name} holds other tensors")
            found += [f"{name}: {key}" for key in keys if not one.get_tensor(key).equal(other.get_tensor(key))]
    return found if weights else [*found, "no weights"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, help="Python of the other checkout's environment")
    parser.add_argument("--new", required=True, help="Python of this checkout's environment")
    parser.add_argument("--runs", type=Path, default=Path("runs/trajectories"), help="where runs go; old ones are kept")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--full", action="store_true", help="also the whole quickstart and quickstart-notes")
    args = parser.parse_args()
    jobs = {case: f"{CASES[case]} {SMALL}" for case in args.cases}
    if args.full:
        jobs |= {"full-quickstart": "quickstart", "full-quickstart-notes": "quickstart-notes"}
    failed = False
    for case, words in jobs.items():
        runs = [args.runs / side / case for side in ("old", "new")]
        if not (runs[0] / "summary.json").exists():
            train(args.old, case, words.split(), runs[0])
        shutil.rmtree(runs[1], ignore_errors=True)
        train(args.new, case, words.split(), runs[1])
        differences = compare(*runs)
        failed |= bool(differences)
        print(f"{case:24}{'equal to the bit' if not differences else '; '.join(differences[:3])}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
