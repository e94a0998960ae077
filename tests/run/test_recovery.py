"""What a user may change when a run is resumed after an accident, and what is said and saved about it."""

import json
import shutil
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from forethought.cli import main
from forethought.config import RunError, UserError, changed_on_resume, from_dict, merge, to_dict
from forethought.eval import evaluate
from forethought.models.loading import EMBEDDED
from forethought.run import checkpoint
from forethought.run.folder import RunLog, checkpoints, read_lines
from forethought.trainer import learning_rate, resume, train
from helpers.cli import complaint
from helpers.moments import after_forwards
from helpers.runs import (
    assert_same_run,
    assert_same_tensors,
    begin,
    cut,
    drift,
    end,
    figures,
    lines,
    options,
    read_checkpoint,
    settings,
    weights,
)

ROWS = [{"text": f"ball under red . swap {i} blue red , 2 green white . now under red ."} for i in range(40)]
KEPT = {"train": {"keep_checkpoints": 9}}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    train(from_dict(options(folder, "run", **KEPT)))
    return folder / "run"


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ("model.device=cpu model.decoding=cpp model.prefix=replicated rollout.cache_gb=3.0", ""),
        ("rollout.timeout_s=9.0 train.rollout_batch=9 train.log_every=9 train.log_thoughts=9", ""),
        ("train.checkpoint_every=9 train.keep_checkpoints=9 train.tracker=tensorboard", ""),
        ("update.tokens_per_chunk=9 update.checkpointing=true parallel.shard=zero1 corpus.path=elsewhere", ""),
        ("train.steps=101 train.tokens=0 train.flops=2e9", ""),
        ("train.steps=99", "train.steps = 99: the run to resume has 100; resuming can only raise it"),
        ("train.tokens=999", "train.tokens = 999: the run to resume has 1000; resuming can only raise it"),
        ("train.flops=1e6", "train.flops = 1000000.0: the run to resume has 1000000000.0; resuming can only raise it"),
        ("rollout.importance_cap=2.0", "rollout.importance_cap = 2.0: .* has 0.0; resuming cannot change this option"),
        ("model.precision=bf16", "model.precision"),
        ("rollout.engine=vllm", "rollout.engine"),
        ("corpus.shuffle=0", "corpus.shuffle"),
        ("train.batch=1024", "train.batch"),
        ("evaluate.path=elsewhere", "evaluate.path"),
    ],
)
def test_only_what_cannot_change_results_or_raises_a_budget_may_change(options: str, refused: str):
    saved = from_dict({"train": {"tokens": 1000, "flops": 1e9}})
    values = to_dict(saved)
    for option in options.split():
        name, _, value = option.partition("=")
        section, _, inner = name.partition(".")
        kind = type(values[section][inner])
        values = merge(values, {section: {inner: value == "true" if kind is bool else kind(value)}})
    if refused:
        with pytest.raises(UserError, match=f"^{refused}"):
            changed_on_resume(saved, from_dict(values))
    else:
        assert len(changed_on_resume(saved, from_dict(values))) == len(options.split())


def test_a_resumed_run_takes_other_sizes_and_keeps_its_results(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
):
    run = cut(whole, "smaller", 2)
    words = "--update.tokens_per_chunk 64 --train.rollout_batch 2 --update.checkpointing True --train.log_every 2"
    more = "--train.checkpoint_every 3 --train.log_thoughts 1 --model.decoding eager --train.keep_checkpoints 1"
    assert main(["train", "--resume", str(run), *words.split(), *more.split()]) == 0
    assert drift(run, whole) < 1e-4
    assert [row["step"] for row in figures(run)] == [1, 2, 4, 6]
    assert list(checkpoints(run)) == [6]
    [said] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said.startswith(
        "warning: step 2: model.decoding = 'eager' (was 'auto'), train.rollout_batch = 2 (was 126), "
    )
    assert "update.tokens_per_chunk = 64 (was 48)" in said
    assert "; results stay the same up to rounding (docs/diagnostics.md: options-changed)" in said
    saved = RunLog.open(run).config()
    assert (saved.update.tokens_per_chunk, saved.train.rollout_batch, saved.train.log_every) == (64, 2, 2)
    assert saved.method == RunLog.open(whole).config().method
    assert [row["name"] for row in read_lines(run / "warnings.jsonl")] == ["options-changed"]


def test_a_resumed_run_without_changes_says_nothing(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]):
    run = cut(whole, "same", 3)
    before = (run / "config.json").read_bytes()
    assert main(["train", "--resume", str(run), "--train.steps", "6"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before
    assert_same_run(run, whole)


def test_more_steps_continue_on_the_schedule_of_the_new_end(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
):
    run = cut(whole, "longer", 6)
    (run / "evaluation-after.json").write_text("{}")  # of the old end: a kill came before summary.json
    assert main(["train", "--resume", str(run), "--train.steps", "9"]) == 0
    [said] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    what = "train.steps = 9 (was 6); from the next step on, the schedule of the learning rate follows the new end"
    assert said.startswith(f"warning: step 6: {what}")
    assert not (run / "evaluation-after.json").exists()
    short, long = RunLog.open(whole).config(), RunLog.open(run).config()
    rates = [row["optim/learning_rate"] for row in figures(run)]
    assert rates == [learning_rate(short if step <= 6 else long, step) for step in range(1, 10)]
    assert RunLog.open(run).read_json("summary.json")["steps"] == long.train.steps == 9


def test_a_corpus_may_move_but_not_become_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, rows in (("a", ROWS[:20]), ("b", ROWS[20:])):
        write(tmp_path / "data" / f"{name}.jsonl", rows)
    values = options(tmp_path, "run", corpus={"path": str(tmp_path / "data"), "shuffle": 8}, **KEPT)
    train(from_dict(values))
    whole = tmp_path / "run"
    runs = [cut(whole, name, 3) for name in ("moved", "other")]
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert "no such file or folder" in complaint(capsys, ["train", "--resume", str(runs[0])])
    path = str(tmp_path / "elsewhere" / "*.jsonl")
    assert main(["train", "--resume", str(runs[0]), "--corpus.path", path]) == 0
    assert_same_tensors(weights(runs[0]), weights(whole))
    assert RunLog.open(runs[0]).config().corpus.path == path
    write(tmp_path / "elsewhere" / "b.jsonl", ROWS[19:-1])  # as many rows and bytes
    before = {path: path.read_bytes() for path in runs[1].rglob("*.json*")}
    line = complaint(capsys, ["train", "--resume", str(runs[1]), "--corpus.path", path])
    assert line == (
        f"corpus.path = '{path}': is another corpus than that of the run ({tmp_path}/elsewhere/b.jsonl differs); "
        "resuming cannot change the corpus"
    )
    assert {path: path.read_bytes() for path in runs[1].rglob("*.json*")} == before
    (tmp_path / "elsewhere" / "b.jsonl").rename(tmp_path / "elsewhere" / "c.jsonl")
    assert "elsewhere/c.jsonl differs" in complaint(capsys, ["train", "--resume", str(runs[1]), "--corpus.path", path])
    line = complaint(capsys, ["train", "--resume", str(runs[1]), "--corpus.path", "world:cups/train"])
    assert line == "corpus.path = 'world:cups/train': 1 files, but 2 when the run was saved"


def test_a_corpus_may_not_move_before_the_first_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """There is nothing to compare it with."""
    for name, rows in (("one", ROWS[:20]), ("other", ROWS[20:])):
        write(tmp_path / "data" / f"{name}.jsonl", rows)
    RunLog.create(from_dict(options(tmp_path, "run", corpus={"path": str(tmp_path / "data" / "one.jsonl")})))
    before, other = (tmp_path / "run" / "config.json").read_bytes(), str(tmp_path / "data" / "other.jsonl")
    line = complaint(capsys, ["train", "--resume", str(tmp_path / "run"), "--corpus.path", other])
    assert line == (
        "corpus.path: without a checkpoint nothing shows that it is the same corpus; begin the run again "
        "(--overwrite True), or resume with the old path"
    )
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_single_file_may_have_another_name(tmp_path: Path):
    corpus = write(tmp_path / "corpus.jsonl", ROWS)
    values = options(tmp_path, "run", corpus={"path": str(corpus)}, **KEPT)
    train(from_dict(values))
    run = cut(tmp_path / "run", "moved", 3)
    moved = str(corpus.rename(tmp_path / "renamed.jsonl"))
    resume(run, config=from_dict(merge(values, {"corpus": {"path": moved}})))
    assert_same_tensors(weights(run), weights(tmp_path / "run"))


def test_a_corpus_that_changed_is_said_and_not_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus = write(tmp_path / "corpus.jsonl", ROWS)
    train(from_dict(options(tmp_path, "run", corpus={"path": str(corpus)}, **KEPT)))
    run = cut(tmp_path / "run", "changed", 3)
    write(corpus, ROWS[:30])
    assert main(["train", "--resume", str(run)]) == 0
    [said] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said.startswith(
        f"warning: step 3: 1 files of the corpus have changed, {corpus} among them; the run goes on "
    )


@pytest.mark.parametrize("rows", [ROWS[1:], ROWS[:10]], ids=["as long", "shorter"])
def test_a_held_out_text_that_changed_is_not_compared_with_the_old_one(
    tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
):
    text = write(tmp_path / "heldout.jsonl", ROWS)
    train(from_dict(options(tmp_path, "run", evaluate={"path": str(text), "documents": 12}, **KEPT)))
    run = cut(tmp_path / "run", "changed", 3)
    write(text, rows)
    line = complaint(capsys, ["train", "--resume", str(run)])
    what = f"evaluate.path = '{text}': is not the held-out text of {run}/evaluation-before.json"
    assert line == f"{what}; put that text back to go on"
    write(text, ROWS)
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_run(run, tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing, and after step 3 the start cannot be measured here; put the file back to go on"),
        ('{"all": 3}', "unexpected content: "),
        ('{"all": {"odd": 3}}', "unexpected content: "),
    ],
)
def test_the_evaluation_before_training_is_that_of_the_start_or_none(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
):
    values = {"path": "world:cups/heldout", "documents": 2}
    train(from_dict(options(tmp_path, "run", evaluate=values, **KEPT)))
    run = cut(tmp_path / "run", "cut", 3)
    file = run / "evaluation-before.json"
    file.unlink() if content is None else file.write_text(content)
    assert complaint(capsys, ["train", "--resume", str(run)]).startswith(f"{file}: {message}")
    assert list(checkpoints(run))[-1] == 3


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")


@pytest.mark.parametrize("forwards", [1000, 2000])
def test_out_of_memory_is_a_line_that_loses_nothing(forwards: int, tmp_path: Path, whole: Path):
    run, values = tmp_path / "run", options(tmp_path, "run", train={"checkpoint_every": 100, "rollout_batch": 128})
    after_forwards(forwards, out_of_memory)
    with pytest.raises(RunError, match=r"^CUDA out of memory after step") as error:
        train(from_dict(values))
    step = max(checkpoints(run))
    assert str(error.value) == (
        f"CUDA out of memory after step {step}; saved after step {step}; train --resume {run} takes a smaller "
        "update.tokens_per_chunk or train.rollout_batch, update.checkpointing True and model.device cpu"
    )
    assert len(figures(run)) == step
    resume(run)
    assert_same_tensors(weights(run), weights(whole))


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("prefix", ["shared", "replicated"])
def test_out_of_memory_is_not_taken_for_another_fault(
    command: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A model is probed for what it supports before anything else."""
    after_forwards(1, out_of_memory)
    target = {"train": "quickstart", "evaluate": "embedded"}[command]
    assert main([command, target, "--run", str(tmp_path / "run"), "--model.prefix", prefix]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "forethought: CUDA out of memory; less memory takes a smaller train.rollout_batch, update.tokens_per_chunk or "
        "questions.batch, or model.device cpu"
    ]
    assert not (tmp_path / "run").exists()


def rewrite(run: Path, change: Any) -> None:
    """Save the newest checkpoint of a run again with other tensors."""
    step, path = list(checkpoints(run).items())[-1]
    snapshot = read_checkpoint(path)
    checkpoint.save(run, step, change(snapshot.tensors), snapshot.state, 9)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda tensors: {k: v for k, v in tensors.items() if k != "teacher/model.norm.weight"},
         r"teacher/model.norm.weight is missing, and \(32,\) in the model"),
        (lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("teacher/")},
         r"teacher/model.embed_tokens.weight is missing, and"),
        (lambda tensors: {**tensors, "policy/model.extra": torch.zeros(2)},
         r"policy/model.extra is \(2,\), and unknown in the model"),
        (lambda tensors: {**tensors, "policy/model.norm.weight": torch.zeros(1)},
         r"policy/model.norm.weight is \(1,\), and \(32,\) in the model"),
    ],
)  # fmt: skip
def test_weights_that_a_checkpoint_does_not_hold_are_named(change: Any, wrong: str, whole: Path):
    run = cut(whole, "wrong", 3)
    try:
        rewrite(run, change)
        with pytest.raises(UserError, match=f"^checkpoint {run}/checkpoints/step-00000003: {wrong}"):
            resume(run)
    finally:
        shutil.rmtree(run)


def test_another_start_is_not_resumed(tmp_path: Path):
    start = tmp_path / "start"
    values = merge(
        options(tmp_path, "run", **KEPT), {"model": {"path": str(start), "init": "pretrained"}, "lora": {"r": 2}}
    )
    shutil.copytree(EMBEDDED["embedded"], start)
    train(from_dict(values))
    run = cut(tmp_path / "run", "again", 3)
    weights = load_file(start / "model.safetensors")
    save_file({name: 1.01 * one for name, one in weights.items()}, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^model.path = .*start': has other weights than when the run began"):
        resume(run)
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    resume(run)
    assert_same_run(tmp_path / "run", run)


def test_another_start_is_resumed_where_a_checkpoint_holds_the_first_one(tmp_path: Path):
    """The KL reference, by whose entropy positions are chosen too."""
    start, method = tmp_path / "start", {"position_policy": "entropy", "kl_weight": 0.1}
    values = options(tmp_path, "run", **KEPT, method=method, model={"path": str(start), "init": "pretrained"})
    shutil.copytree(EMBEDDED["embedded"], start)
    train(from_dict(values))
    run = cut(tmp_path / "run", "again", 3)
    weights = load_file(start / "model.safetensors")
    save_file({name: 1.01 * one for name, one in weights.items()}, start / "model.safetensors", {"format": "pt"})
    resume(run)
    assert_same_run(tmp_path / "run", run)


def test_a_teacher_that_is_not_whole_does_not_become_the_policy(tmp_path: Path, whole: Path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    figure, _ = evaluate(run, {"evaluate": {"path": "world:cups/heldout", "documents": 2}})
    assert "all/gain_over_teacher" in figure
    rewrite(run, lambda tensors: {k: v for k, v in tensors.items() if k != "teacher/model.norm.weight"})
    with pytest.raises(UserError, match=r"step-00000006: teacher/model.norm.weight is missing, and \(32,\) in"):
        evaluate(run, {"evaluate": {"path": "world:cups/heldout", "documents": 2}})


@pytest.mark.distributed
def test_two_processes_resume_what_one_began_with_other_options(tmp_path: Path, processes: ForkServerContext):
    values = settings(tmp_path, "one", "attention", evaluate={"path": ""})
    corpus = write(tmp_path / "corpus.jsonl", ROWS)
    values = merge(values, {"corpus": {"path": str(corpus)}})
    train(from_dict(values))
    run = cut(tmp_path / "one", "two", 2)
    moved = str(corpus.rename(tmp_path / "moved.jsonl"))
    command = [
        "train",
        "--resume",
        str(run),
        "--corpus.path",
        moved,
        "--train.steps",
        "5",
        "--train.rollout_batch",
        "3",
    ]
    more = ["--parallel.shard", "zero1", "--optim.schedule", "constant"]
    assert end(begin(processes, [*command, *more], tmp_path)) == [0, 0], lines(tmp_path)
    saved = RunLog.open(run).config()
    assert (saved.corpus.path, saved.train.steps, saved.parallel.shard) == (moved, 5, "zero1")
    train(from_dict(merge(values, {"run": str(tmp_path / "five"), "corpus": {"path": moved}, "train": {"steps": 5}})))
    assert drift(run, tmp_path / "five") < 1e-4
    assert len(read_lines(run / "warnings.jsonl")) == 1
