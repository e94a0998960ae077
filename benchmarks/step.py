"""A whole RLP step against general trainers that do the same work.

    python benchmarks/step.py [--quick] [--json FILE] [--models NAME ...] [--repeats 5] [--peers naive,trl-fair]

First an equality gate: loss and gradient of one batch with shared prefixes agree with naive replication to 1e-5. Then,
alternately in one run: Forethought; Forethought with prefix sharing off (`naive`); TRL's GRPOTrainer doing RLP's work,
fair (no gradient checkpointing, fp32, teacher scored once a prompt) and with its defaults. Thoughts are of one length.
The peer `prediction` is Forethought's step with method.prediction_weight, seconds and FLOPs.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch
from datasets import Dataset
from harness import CLOSE, FORM, OPEN

from forethought.algo.rlp import RLP
from forethought.data.positions import Positions
from forethought.flops import Flops, Shape, step_flops
from forethought.models.compute_copy import Network, Teacher
from forethought.models.logprobs import log_probabilities
from forethought.rollout import Thoughts, engine
from forethought.rollout.cpp import CppBackend
from forethought.rollout.native import NativeEngine

GRID = [(128, 32), (512, 64), (1024, 64), (512, 256), (256, 1024)]
QUICK = [(128, 32), (512, 64)]
LEARNING_RATE = 1e-6

Grid = tuple[int, int, int, int]  # P, L, K, G


class Watched:
    """An engine that notes how long it last sampled."""

    def __init__(self, engine: NativeEngine, clock: Callable[[], float]):
        self.engine, self.clock, self.seconds = engine, clock, 0.0

    def sample(self, positions: Positions, noise: torch.Tensor) -> Thoughts:
        started = self.clock()
        thoughts = self.engine.sample(positions, noise)
        harness.synchronise()
        self.seconds = self.clock() - started
        return thoughts

    def sync(self) -> None:
        self.engine.sync()

    @property
    def decoding(self) -> str:
        """What `model.decoding auto` chose."""
        if self.engine.graphs:
            return "cuda_graphs"
        return "cpp" if isinstance(self.engine.decoder.backend, CppBackend) else "eager"


class Ours:
    """Forethought's step as the loop takes it; `phases` are the seconds of the last one."""

    def __init__(self, name: str, grid: Grid, shared: bool, options: argparse.Namespace, weight: float = 0.0):
        prefix, length, places, group = grid
        self.clock = harness.CLOCKS[options.clock]
        self.model = harness.build(name, options.device)
        settings = harness.settings(length, places, group, shared, options.chunk)
        self.settings = replace(settings, method=replace(settings.method, prediction_weight=weight))
        self.engine = Watched(engine(self.model, FORM, self.settings), self.clock)
        self.method = RLP(
            Network(self.model, "fp32"),
            self.engine,
            FORM,
            harness.tokenizer(self.model.config.vocab_size),
            self.settings,
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        vocab = self.model.config.vocab_size
        self.windows, self.stops = [harness.window(prefix, places, vocab)], tuple(harness.stops(prefix, places))
        self.number, self.phases = 0, {}

    def __call__(self) -> None:
        self.number += 1
        started = self.clock()
        record = self.method.collect(self.windows, self.number)
        microbatches = self.method.microbatches(record)
        harness.synchronise()
        collected = self.clock()
        self.optimizer.zero_grad(set_to_none=True)
        for microbatch in microbatches:
            self.method.forward_backward(microbatch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        harness.synchronise()
        updated = self.clock()
        self.method.after_step()
        harness.synchronise()
        self.phases = {
            "rollout": self.engine.seconds,
            "score": collected - started - self.engine.seconds,
            "update": updated - collected,
            "ema": self.clock() - updated,
        }
        self.work = record.work(FORM, self.settings)
        assert self.work.prefixes == self.stops

    def flops(self) -> Flops:
        """Of the last step."""
        return step_flops(Shape.of(self.model.config), self.work)


class Trl:
    """TRL's GRPOTrainer with RLP's reward: reasoned log-evidence under the policy minus the EMA teacher's without."""

    def __init__(self, name: str, grid: Grid, fair: bool):
        from trl import GRPOConfig, GRPOTrainer

        prefix, length, places, group = grid
        self.model = harness.build(name, "cpu")
        vocab = self.model.config.vocab_size
        window, stops = harness.window(prefix, places, vocab).tokens, harness.stops(prefix, places)
        prompts = [{"prompt": " ".join(map(str, [*window[:t], *OPEN])), "stop": t} for t in stops]
        self.window, self.teacher, self.fair, self.group = window, Teacher(self.model, 0.999), fair, group
        fairly = {"gradient_checkpointing": False, "bf16": False} if fair else {}
        self.folder = tempfile.TemporaryDirectory()
        options = GRPOConfig(
            output_dir=self.folder.name,
            per_device_train_batch_size=places * group,
            gradient_accumulation_steps=1,
            num_generations=group,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
            temperature=1.0,
            loss_type="grpo",
            scale_rewards="none",
            beta=0.0,
            num_iterations=1,
            learning_rate=LEARNING_RATE,
            mask_truncated_completions=False,
            report_to=[],
            use_cpu=True,
            **fairly,
        )
        self.trainer = GRPOTrainer(
            model=self.model,
            reward_funcs=self.gain,
            args=options,
            train_dataset=Dataset.from_list(prompts),
            processing_class=harness.tokenizer(vocab),
        )
        self._prepare()
        self.inputs = [prompt for prompt in prompts for _ in range(group)]

    def _prepare(self) -> None:
        """What `train()` does ahead of its first step: without it neither bf16 nor checkpointing would be on."""
        trainer = self.trainer
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        trainer.create_optimizer()
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = 1
        assert trainer.model.is_gradient_checkpointing == trainer.args.bf16 == (not self.fair)

    def __call__(self) -> None:
        self.trainer.training_step(self.trainer.model_wrapped, self.inputs, None)
        torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.teacher.update(self.trainer.model)

    @torch.no_grad()
    def gain(self, completion_ids: list[list[int]], stop: list[int], **_: Any) -> list[float]:
        """Eq. 5 for a batch of completions, as a user of the trainer would write it."""
        rows = [[*self.window[:t], *OPEN, *c, *CLOSE] for c, t in zip(completion_ids, stop, strict=True)]
        targets = torch.tensor([self.window[t] for t in stop])
        think = self._next(self.trainer.model, rows, targets)
        places = stop[:: self.group] if self.fair else stop
        plain = self._next(self.teacher.model, [self.window[:t] for t in places], targets[:: len(stop) // len(places)])
        if self.fair:
            plain = plain.repeat_interleave(self.group)
        return ((think - plain) * self.group / (self.group - 1)).tolist()

    @staticmethod
    def _next(model: Any, rows: list[list[int]], targets: torch.Tensor) -> torch.Tensor:
        width = max(len(row) for row in rows)
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        at = (mask.cumsum(-1) - 1).clamp(min=0)
        model.eval()
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=at, logits_to_keep=1, use_cache=False).logits
        return log_probabilities(logits[:, -1], targets)


def gate(name: str, options: argparse.Namespace) -> float:
    """Largest difference of loss and gradient between shared and replicated prefixes, relative to the largest."""
    one, other = (Ours(name, (96, 12, 2, 4), shared, options) for shared in (True, False))
    microbatches = one.method.microbatches(one.method.collect(one.windows, 1))
    results = []
    for side in (one, other):
        loss = sum(side.method.forward_backward(microbatch)[0] for microbatch in microbatches)
        results.append((loss, torch.cat([p.grad.flatten() for p in side.model.parameters() if p.grad is not None])))
    (loss, grad), (wanted_loss, wanted) = results
    gap = float((grad - wanted).abs().max() / wanted.abs().max())
    return max(gap, abs(loss - wanted_loss) / max(abs(wanted_loss), 1.0))


def peak_mib(name: str, grid: Grid, shared: bool, chunk: int = 0) -> float:
    """Memory that one update adds to the process, in MiB, measured in a process of its own."""
    words = [sys.executable, __file__, "--peak-of", name, *map(str, grid), str(int(shared)), str(chunk)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def report_peak(name: str, grid: list[int], shared: bool, chunk: int) -> None:
    options = argparse.Namespace(device="cpu", clock="wall", chunk=chunk)
    side = Ours(name, (grid[0], grid[1], grid[2], grid[3]), shared, options)
    microbatches = side.method.microbatches(side.method.collect(side.windows, 1))
    for parameter in side.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew, where the system knows how
    before = min(before, _resident_kib())
    for microbatch in microbatches:
        side.method.forward_backward(microbatch)
    print((_high_water_kib() - before) / 1024)


def _resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def _high_water_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


PEERS: dict[str, Callable[[str, Grid, argparse.Namespace], Any]] = {
    "naive": lambda name, grid, options: Ours(name, grid, False, options),
    "prediction": lambda name, grid, options: Ours(name, grid, True, options, weight=0.1),
    "trl-fair": lambda name, grid, options: Trl(name, grid, True),
    "trl-defaults": lambda name, grid, options: Trl(name, grid, False),
}


def measure(name: str, grid: Grid, options: argparse.Namespace) -> list[dict[str, Any]]:
    jobs = {"forethought": Ours(name, grid, True, options)}
    jobs |= {peer: PEERS[peer](name, grid, options) for peer in options.peers}
    phases: dict[str, list[dict[str, float]]] = {side: [] for side in ("forethought", "naive")}

    def noting(side: str) -> Any:
        def job() -> None:
            jobs[side]()
            if side in phases:
                phases[side].append(jobs[side].phases)

        return job

    turns = {side: noting(side) for side in jobs}
    seconds = harness.alternately(turns, options.repeats, options.warmup, options.clock)
    prefix, length, places, group = grid
    here = {"model": name, "P": prefix, "L": length, "K": places, "G": group, "device": options.device}
    here |= {"clock": options.clock, "threads": torch.get_num_threads(), "repeats": options.repeats}
    here["warmup"] = options.warmup
    rows = []
    for peer in options.peers:
        ratio = harness.ratios(seconds["forethought"], seconds[peer])
        rows.append(here | {"peer": peer, "phase": "step", "seconds": min(seconds[peer])} | ratio)
        if peer == "prediction":
            rows[-1]["flops_ratio"] = jobs[peer].flops().total / jobs["forethought"].flops().total
    mine, theirs = (phases[side][-options.repeats :] for side in ("forethought", "naive"))
    for phase in ("rollout", "update") if theirs else ():
        ratio = harness.ratios([some[phase] for some in mine], [some[phase] for some in theirs])
        rows.append(here | {"peer": "naive", "phase": phase, "seconds": min(some[phase] for some in theirs)} | ratio)
    return [*rows, here | _facts(name, grid, options, (jobs["forethought"], min(seconds["forethought"]), mine))]


def _facts(
    name: str, grid: Grid, options: argparse.Namespace, taken: tuple[Ours, float, list[dict[str, float]]]
) -> dict[str, Any]:
    """What Forethought's own step took: its shortest turns, and the share of the machine's rate that they reach."""
    ours, best, phases = taken
    _, length, places, group = grid
    rates = harness.ceilings(options.device, options.clock)
    shortest = {phase: min(some[phase] for some in phases) for phase in phases[0]}
    flops = ours.flops()
    gflops = flops.update / shortest["update"] / 1e9
    sampling = (flops.prefill + flops.decode + flops.score) / shortest["rollout"] / 1e9
    facts = {
        "peer": "forethought",
        "phase": "step",
        "seconds": best,
        "decoding": ours.engine.decoding,
        "phases": shortest,
        "thought_tokens_per_s": places * group * length / best,
        "positions_per_s": places / best,
        "rollout_ms_a_token": 1e3 * shortest["rollout"] / (length + len(CLOSE) + 1),
        "update_gflops": gflops,
        "update_of_matmul": gflops / rates["matmul_gflops"],
        "rollout_of_matmul": sampling / rates["matmul_gflops"],
        **rates,
    }
    if options.peak and options.device == "cpu":
        facts |= {
            f"update_peak_mib_{side}": peak_mib(name, grid, side == "shared", options.chunk)
            for side in ("shared", "naive")
        }
    return facts


def show(rows: list[dict[str, Any]]) -> None:
    facts = rows[-1]
    print(f"{facts['model']}  P={facts['P']} L={facts['L']} K={facts['K']} G={facts['G']}")
    print(f"  thoughts decoded by {facts['decoding']}")
    print(f"  step {facts['seconds']:.3f} s: " + ", ".join(f"{k} {v:.3f}" for k, v in facts["phases"].items()))
    print(
        f"  {facts['thought_tokens_per_s']:.0f} thought tokens/s, {facts['positions_per_s']:.2f} positions/s; update "
        f"{facts['update_gflops']:.0f} of {facts['matmul_gflops']:.0f} GFLOP/s ({facts['update_of_matmul']:.0%}), "
        f"copy {facts['copy_gb_s']:.1f} GB/s; "
        f"{facts['rollout_ms_a_token']:.1f} ms a token, prefill included; rollout {facts['rollout_of_matmul']:.0%}"
    )
    if "update_peak_mib_shared" in facts:
        print(f"  update adds {facts['update_peak_mib_shared']:.0f} MiB; naive {facts['update_peak_mib_naive']:.0f}")
    for row in rows[:-1]:
        print(
            f"  {row['phase']:8s}{row['peer']:14s}{row['ratio_median']:6.2f}x"
            f"  ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
            + (f", {row['flops_ratio']:.3f}x the FLOPs" if "flops_ratio" in row else ""),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model, two settings, three repeats")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--models", nargs="+", choices=harness.MODELS)
    parser.add_argument("--grid", nargs="+", help="P,L,K,G settings instead of the whole grid")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="turns that are not counted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", default="naive,trl-fair,trl-defaults", help="comma-separated; '' for none")
    parser.add_argument("--clock", default="wall", choices=harness.CLOCKS, help="cpu: the process's own seconds")
    parser.add_argument("--chunk", type=int, default=0, help="update.tokens_per_chunk; 0: automatic")
    parser.add_argument("--peak", action="store_true", help="also the memory that an update takes")
    if sys.argv[1:2] == ["--peak-of"]:
        report_peak(sys.argv[2], [int(word) for word in sys.argv[3:7]], sys.argv[7] == "1", int(sys.argv[8]))
        return
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    names = options.models or list(harness.MODELS)[: 1 if options.quick else 3]
    options.peers = [peer for peer in options.peers.split(",") if peer]
    if odd := sorted(set(options.peers) - set(PEERS)):
        parser.error(f"--peers: there is no {', '.join(odd)}; choose from {', '.join(PEERS)}")
    if options.quick:
        options.repeats = min(options.repeats, 3)
    if options.grid:
        grids = [tuple(int(n) for n in word.split(",")) for word in options.grid]
    else:
        grids = [(*pl, k, g) for g in (16, 4) for k in (1, 4) for pl in (QUICK if options.quick else GRID)]
        grids = grids[:2] if options.quick else grids
    rows: list[dict[str, Any]] = []
    for name in names:
        gap = gate(name, options)
        print(f"{name}: shared equals replicated to {gap:.1e}")
        if gap > 1e-5:
            sys.exit(f"{name}: loss or gradient differ by {gap:.1e}, more than 1e-5; nothing is timed")
        for grid in grids:
            rows += measure(name, grid, options)
            show(_latest(rows))
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the setting that was measured last."""
    last = [row[name] for row in rows[-1:] for name in ("model", "P", "L", "K", "G")]
    return [row for row in rows if [row[name] for name in ("model", "P", "L", "K", "G")] == last]


if __name__ == "__main__":
    main()
