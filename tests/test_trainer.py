"""The loop: what a step is, what a run leaves behind, and what must not change its result."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from forethought.cli import main
from forethought.config import Optim, RunError, Train, UserError, from_dict, merge
from forethought.data.corpus import Windows
from forethought.models.loading import EMBEDDED, load_tokenizer
from forethought.run import checkpoint
from forethought.run.folder import checkpoints, read_lines
from forethought.trainer import Config, learning_rate, resume, train
from helpers.runs import (
    Snapshot,
    assert_same_run,
    assert_same_tensors,
    drift,
    figures,
    mean_drift,
    options,
    read_checkpoint,
    weights,
)

WORDS = "ball under red . swap 1 blue red , 2 green white . now under red ."


def go(tmp_path: Path, name: str, **changes: Any) -> Path:
    train(from_dict(options(tmp_path, name, **merge({"train": {"steps": 3, "checkpoint_every": 100}}, changes))))
    return tmp_path / name


def last_state(run: Path) -> Snapshot:
    path = checkpoint.latest(run)
    assert path is not None
    return read_checkpoint(path)


def policy(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("policy/"): value for name, value in snapshot.tensors.items() if name.startswith("policy/")
    }


@pytest.mark.parametrize("name", ["rlp", "cpt"])
def test_a_run_is_its_config_and_its_seed(tmp_path: Path, name: str):
    one, same = (go(tmp_path, run, method={"name": name}) for run in ("one", "same"))
    assert_same_run(one, same)
    assert drift(one, go(tmp_path, "other", method={"name": name}, seed=1)) > 1e-3


def test_a_run_folder_holds_no_pickle_and_a_model_that_opens(tmp_path: Path):
    run = go(tmp_path, "run", train={"checkpoint_every": 1, "keep_checkpoints": 2})
    files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert list(checkpoints(run)) == [2, 3]
    assert_same_tensors(weights(run), policy(last_state(run)))
    assert len({path.stat().st_mode for path in (run / "policy").iterdir()}) == 1
    model = AutoModelForCausalLM.from_pretrained(run / "policy")
    for name, tensor in weights(run).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "policy")
    assert tokenizer(WORDS)["input_ids"] == load_tokenizer(from_dict({}).model)(WORDS)["input_ids"]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["method"], summary["seed"]) == (3, "rlp", 0)


@pytest.mark.parametrize("name", ["rlp", "rpt", "cpt"])
def test_chunks_and_copied_prefixes_do_not_change_the_trajectory(tmp_path: Path, name: str):
    changes = {"method": {"name": name, "positions": 1}, "optim": {"learning_rate": 1e-3}}
    changes = merge(changes, {"train": {"batch": 8, "steps": 4}})
    ways = [(0, "shared"), (200, "shared"), (1, "shared"), (0, "replicated"), (1, "replicated")]
    runs = [
        go(
            tmp_path,
            f"{size}-{way}",
            **merge(changes, {"update": {"tokens_per_chunk": size}, "model": {"prefix": way}}),
        )
        for size, way in ways
    ]
    another = go(tmp_path, "other", **merge(changes, {"seed": 1}))
    assert drift(runs[0], another) > 1e-3
    assert mean_drift(runs[0], another) > 1e-4
    for other in runs[1:]:
        # Rows meet in other sums, and Adam's first steps turn the rounding of a tiny gradient into a part of a step.
        assert drift(runs[0], other) < 1e-4
        assert mean_drift(runs[0], other) < 1e-6
        for row, same in zip(figures(runs[0]), figures(other), strict=True):
            if name != "cpt" and "replicated" in other.name:  # whose only other figure is what the copies cost
                for cost in ("cost/flops", "cost/flops_total"):
                    assert same[cost] > row[cost]
                    same[cost] = row[cost]
            assert row == pytest.approx(same, abs=1e-4)


def test_the_teacher_never_touches_the_update(tmp_path: Path):
    runs = [
        go(tmp_path, f"{i}", method=changes)
        for i, changes in enumerate(({}, {"teacher_every": 0}, {"teacher_every": 3}, {"freeze_teacher": True}))
    ]
    for run in runs[1:]:
        assert_same_tensors(weights(runs[0]), weights(run))
    gains = [["reward/gain" in row for row in figures(run)] for run in runs]
    assert gains == [[True] * 3, [False] * 3, [True, False, True], [True] * 3]
    assert [row["reward/gain"] for row in figures(runs[0])] != [row["reward/gain"] for row in figures(runs[3])]


def test_kl_and_further_inner_steps_change_the_update(tmp_path: Path):
    plain = go(tmp_path, "plain")
    pulled = go(tmp_path, "pulled", method={"kl_weight": 1.0})
    twice = go(tmp_path, "twice", method={"inner_steps": 2})
    assert drift(plain, pulled) > 1e-4
    assert [row["objective/ratio"] for row in figures(plain)] == [1.0] * 3
    assert all(abs(row["objective/ratio"] - 1) > 1e-4 for row in figures(twice))
    assert figures(pulled)[0]["objective/kl"] == 0
    assert figures(pulled)[1]["objective/kl"] > 0


def test_log_every_keeps_the_first_the_last_and_every_nth(tmp_path: Path):
    run = go(tmp_path, "run", train={"steps": 7, "log_every": 3})
    assert [row["step"] for row in figures(run)] == [1, 3, 6, 7]


def test_a_loss_that_is_no_number_stops_the_run_at_the_last_good_state(tmp_path: Path):
    config = from_dict(options(tmp_path, "run", optim={"learning_rate": 1e30, "warmup": 0}))
    with pytest.raises(
        RunError,
        match=r"^step 2: the loss is .* nan; its batch began with documents world:cups/"
        r".*last good state is that of step 1$",
    ):
        train(config)
    state = last_state(tmp_path / "run")
    assert state.state["step"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in state.tensors.values())
    assert [row["step"] for row in figures(tmp_path / "run")] == [1]


def test_a_loss_that_is_no_number_within_a_step_saves_nothing_half_done(tmp_path: Path):
    changes = {"optim": {"learning_rate": 1e30, "warmup": 0}, "method": {"inner_steps": 2}}
    with pytest.raises(RunError, match=r"^step 1: .*nan; .*; no state was saved$"):
        train(from_dict(options(tmp_path, "run", **changes)))
    assert list(checkpoints(tmp_path / "run")) == []


def test_a_malformed_line_met_in_mid_training_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus, rows = tmp_path / "corpus.jsonl", [json.dumps({"text": WORDS}) for _ in range(40)]
    corpus.write_text("\n".join(rows))
    changes = {"corpus": {"path": str(corpus), "shuffle": 0}, "train": {"steps": 6, "checkpoint_every": 100}}
    whole = go(tmp_path, "whole", **changes)
    corpus.write_text("\n".join([*rows[:6], '{"text": ', *rows[7:]]))
    run = tmp_path / "run"
    with pytest.raises(UserError, match=rf"^corpus.path = .*{corpus}:7: malformed JSON"):
        train(from_dict(options(tmp_path, "run", **changes)))
    assert list(checkpoints(run)) == [3]
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{corpus}:7" in line
    corpus.write_text("\n".join(rows))
    resume(run)
    assert_same_run(run, whole)


def test_a_corpus_that_fails_at_once_leaves_no_run_folder(tmp_path: Path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{")
    with pytest.raises(UserError, match=r"corpus.jsonl:1: malformed JSON"):
        go(tmp_path, "run", corpus={"path": str(corpus)})
    with pytest.raises(UserError, match=r"^evaluate.path = .*corpus.jsonl:1: malformed JSON"):
        go(tmp_path, "run", evaluate={"path": str(corpus)})
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_figures(tmp_path: Path):
    run = go(tmp_path, "run", train={"tracker": "tensorboard"})
    [events, *_] = run.rglob("events.out.tfevents*")
    assert b"objective/loss" in events.read_bytes()
    first = read_lines(run / "thoughts.jsonl")[0]["thoughts"][0]["text"].encode()
    assert first and any(b"thoughts/text_summary" in file.read_bytes() and first in file.read_bytes() for file in
                         run.rglob("events.out.tfevents*"))  # fmt: skip
    assert_same_run(run, go(tmp_path, "plain"))


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_there_or_broken_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
):
    refused = f"^train.tracker = '{tracker}': its package cannot be imported \\({{}}\\); pip install"
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(UserError, match=refused.format(f"import of {tracker} halted.*")):
        go(tmp_path, "run", train={"tracker": tracker})
    monkeypatch.delitem(sys.modules, tracker)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / f"{tracker}.py").write_text("raise TypeError('Descriptors cannot be created.\\nUse protoc.')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(UserError, match=refused.format("Descriptors cannot be created.")):
        go(tmp_path, "run", train={"tracker": tracker})
    assert not (tmp_path / "run").exists()


def test_resuming_needs_a_run_that_is_not_finished(tmp_path: Path):
    run = go(tmp_path, "run")
    with pytest.raises(UserError, match=r"--resume .*: this run is finished"):
        resume(run)
    with pytest.raises(UserError, match="no such folder"):
        resume(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1, *[(1 + math.cos(math.pi * k / 5)) / 2 for k in (1, 2, 3, 4)]]),
    ],
)
def test_learning_rate_by_hand(schedule: Any, expected: list[float]):
    config = Config(optim=Optim(learning_rate=1.0, schedule=schedule, warmup=2), train=Train(steps=6))
    assert [learning_rate(config, step) for step in range(1, 7)] == pytest.approx(expected)


def test_a_spent_budget_brings_the_decay_forward():
    config = Config(optim=Optim(learning_rate=1.0, schedule="linear"), train=Train(steps=9))
    assert learning_rate(config, 2, spent=0.1) == pytest.approx(0.8)
    assert learning_rate(config, 2, spent=0.75) == pytest.approx(0.25)
    assert learning_rate(config, 2, spent=1.5) == 0


def test_a_run_ends_with_the_step_that_spends_its_budget(tmp_path: Path):
    rows = figures(go(tmp_path, "whole", train={"steps": 6}))
    for budget, metric in (("tokens", "corpus/tokens"), ("flops", "cost/flops_total")):
        third, fourth = (row[metric] for row in rows[2:4])
        for limit, steps in ((third, 3), (third + 1, 4), (fourth, 4)):
            run = go(tmp_path, f"{budget}-{limit}", train={"steps": 100, "log_every": 50, budget: limit})
            assert [row["step"] for row in figures(run)] == [1, steps], (budget, limit)
            assert "rollout/leakage" in figures(run)[-1]
            assert read_lines(run / "thoughts.jsonl")[-1]["step"] == steps, "the last step is logged with its thoughts"
            assert json.loads((run / "summary.json").read_text())["steps"] == steps


def test_a_budget_of_flops_takes_a_model_whose_flops_are_known(tmp_path: Path):
    GPTNeoXConfig(
        vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    ).save_pretrained(tmp_path / "model")
    model = {"path": str(tmp_path / "model"), "init": "random", "tokenizer": str(EMBEDDED["embedded"])}
    with pytest.raises(UserError, match=r"^train.flops = 1.0: the FLOPs of a gpt_neox model are not known; use steps$"):
        go(tmp_path, "run", model=model, train={"flops": 1.0})


def test_throughput_counts_the_positions_that_there_were(tmp_path: Path):
    """Windows of 3 tokens have 2 positions, not the 8 that are asked for."""
    short = {"corpus": {"window": 3, "min_tokens": 3}, "method": {"positions": 8}, "train": {"steps": 1, "batch": 16}}
    train(from_dict(merge(options(tmp_path, "run"), short)))
    [line] = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["time/positions_per_s"] * line["time/step_s"] == pytest.approx(2 * 2)


def test_a_step_reads_as_many_windows_as_its_positions_take(tmp_path: Path):
    run = go(tmp_path, "run", method={"positions": 2}, train={"batch": 4, "steps": 2})
    config = from_dict(options(tmp_path, "run"))
    stream = Windows(config.corpus, load_tokenizer(config.model), config.seed)
    tokens = sum(len(next(stream).tokens) for _ in range(4))
    assert figures(run)[-1]["corpus/tokens"] == tokens
