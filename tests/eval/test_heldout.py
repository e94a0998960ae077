"""Held-out figures: by hand, at the same positions for everyone, and without a trace in training."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from forethought.cli import main
from forethought.config import Config, UserError, from_dict
from forethought.eval import evaluate, heldout
from forethought.models.loading import load_model, load_tokenizer
from forethought.rollout.native import NativeEngine
from forethought.run.folder import RunLog, read_lines
from forethought.trainer import train
from helpers.cli import complaint
from helpers.heldout import EVALUATION, records, setup
from helpers.runs import assert_same_tensors, figures, options


def measure(model: Any, engine: NativeEngine, config: Config) -> dict[str, heldout.Records]:
    tokenizer = load_tokenizer(config.model)
    subject = heldout.Subject(model=model, engine=engine, form=engine.form, tokenizer=tokenizer, config=config)
    return heldout.measure(subject, heldout.held_out(config, tokenizer), lambda done, total: None)


def test_figures_by_hand():
    mine = records([0, 0, 1], think=[-1.0, -2.0, -3.0], nothink=[-2.0, -2.0, -5.0], closed=[1.0, 0.0, 0.5])
    base = records([0, 0, 1], think=[-9.0, -9.0, -9.0], nothink=[-1.0, -4.0, -4.0])
    figures = heldout.summarize({"all": mine}, {"all": base})
    expected = {
        "ce_think": 2,
        "ce_nothink": 3,
        "gain_self": 1,
        "gain_over_base": 1,
        "drift": 0,
        "accuracy_think": 0.5,
        "accuracy_nothink": 1 / 3,
        "thought_length": 1,
        "closed": 0.5,
        "positions": 3,
    }
    assert {name: figures[f"all/{name}"] for name in expected} == pytest.approx(expected)
    columns = ("think", "nothink", "nothink_hit", "think_hit", "length", "closed", "entropy", "marginal", "leakage")
    more = {name: getattr(mine, name) * 6 for name in columns}
    many = dataclasses.replace(mine, document=list(range(18)), at=list(range(18)), **more)
    figures = heldout.summarize({"all": many}, {"all": many})
    for name in set(expected) - {"positions"}:
        assert figures[f"all/{name}/low"] <= figures[f"all/{name}"] <= figures[f"all/{name}/high"]


def test_drift_is_what_not_thinking_lost():
    mine, base = records([0], [-1.0], [-3.0]), records([0], [-1.0], [-2.0])
    figures = heldout.summarize({"all": mine}, {"all": base})
    assert figures["all/drift"] == 1.0
    assert figures["all/gain_over_base"] == 1.0
    assert figures["all/gain_self"] == 2.0


def test_the_bootstrap_draws_documents_and_not_positions():
    """Ten copies of every position tell nothing new: the interval stays as wide as that of one copy."""
    rng = random.Random(0)
    think = [rng.gauss(-2, 1) for _ in range(12)]
    once = records(list(range(12)), think, think)
    copies = records([d for d in range(12) for _ in range(10)], [v for v in think for _ in range(10)], [-1.0] * 120)
    apart = dataclasses.replace(copies, document=list(range(120)))

    def width(some: heldout.Records) -> float:
        figures = heldout.summarize({"all": some}, {"all": some})
        return figures["all/ce_think/high"] - figures["all/ce_think/low"]

    assert width(copies) == pytest.approx(width(once))
    assert width(apart) < 0.5 * width(once)


def test_the_interval_covers_a_known_mean_as_often_as_it_says():
    rng, covered = random.Random(1), 0
    for _ in range(60):
        sample = [rng.gauss(-2, 1) for _ in range(30)]
        figures = heldout.summarize({"all": (one := records(list(range(30)), sample, sample))}, {"all": one})
        covered += figures["all/ce_think/low"] <= 2 <= figures["all/ce_think/high"]
    assert 50 <= covered <= 60


def test_positions_are_the_same_for_every_seed_and_marks_are_groups(tmp_path: Path):
    runs = [measure(*setup(tmp_path, seed=seed)) for seed in (0, 1)]
    assert set(runs[0]) == {"all", "answer"}
    for name, one in runs[0].items():
        assert (one.document, one.at) == (runs[1][name].document, runs[1][name].at)
        assert one.nothink != runs[1][name].nothink
    assert len(runs[0]["all"].at) == 6
    assert runs[0]["answer"].document == [0, 1, 2]
    assert all(0 <= share <= 1 for share in runs[0]["all"].closed)


@pytest.mark.parametrize("prefix", ["shared", "replicated"])
def test_figures_do_not_depend_on_how_thoughts_are_decoded(tmp_path: Path, prefix: str):
    one = measure(*setup(tmp_path, train={"rollout_batch": 64}))
    other = measure(*setup(tmp_path, train={"rollout_batch": 1}, model={"prefix": prefix}))
    for name, mine in one.items():
        for field, values in dataclasses.asdict(mine).items():
            assert values == pytest.approx(getattr(other[name], field), abs=1e-4), (name, field)


def test_not_thinking_is_the_plain_model_without_the_template(tmp_path: Path):
    model, engine, config = setup(tmp_path)
    plain = measure(model, engine, config)["all"]
    changed = measure(*setup(tmp_path, method={"prompt": "ball {context} ball"}))["all"]
    assert changed.nothink == plain.nothink
    assert changed.think != plain.think
    windows = heldout.held_out(config, load_tokenizer(config.model))
    assert changed.entropy == plain.entropy is not None
    for document, at, value, entropy in zip(plain.document, plain.at, plain.nothink, plain.entropy, strict=True):
        tokens = windows[document].tokens
        logits = model(input_ids=torch.tensor([tokens[:at]])).logits.detach()[0, -1]
        assert value == pytest.approx(float(logits.log_softmax(-1)[tokens[at]]), abs=1e-4)
        assert entropy == pytest.approx(float(torch.distributions.Categorical(logits=logits).entropy()), abs=1e-4)


def test_measuring_changes_no_weight_and_no_randomness(tmp_path: Path):
    model, engine, config = setup(tmp_path)
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    measure(model, engine, config)
    assert_same_tensors(before, model.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_training_is_the_same_with_and_without_an_evaluation(tmp_path: Path):
    for name, changes in (("with", EVALUATION), ("without", {})):
        train(from_dict(options(tmp_path, name, train={"steps": 2}, evaluate=changes)))
    assert figures(tmp_path / "with") == figures(tmp_path / "without")
    weights = [load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("with", "without")]
    assert_same_tensors(*weights)
    summary = json.loads((tmp_path / "with" / "summary.json").read_text())
    assert summary["before/all/gain_self"] == summary["before/all/gain_over_base"]
    assert summary["before/all/drift"] == 0 != summary["after/all/drift"]


def test_evaluating_a_run_gives_what_training_measured(tmp_path: Path):
    train(from_dict(options(tmp_path, "run", train={"steps": 2}, evaluate=EVALUATION)))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    figures, file = evaluate(tmp_path / "run")
    assert file == tmp_path / "run" / "evaluate.json"
    assert json.loads(file.read_text()) == figures
    after = {name.removeprefix("after/"): value for name, value in summary.items() if name.startswith("after/")}
    assert {name: figures[name] for name in after} == pytest.approx(after, abs=1e-6)
    more = ("gain_over_teacher", "ce_empty", "gain_shuffled", "ce_random", "ce_generic", "gain_generic")
    assert {f"all/{name}" for name in more} <= figures.keys()
    assert figures["generic_thought"]
    assert "all/gain_over_teacher" in after and "all/ce_empty" not in after
    assert evaluate(tmp_path / "run", {"evaluate": {"documents": 2}})[0]["all/positions"] == 4


def test_teacher_and_policy_are_compared_in_the_same_precision(tmp_path: Path):
    """At the start they are the same, so the gain over the one is that over the other, to the bit."""
    values = {"train": {"steps": 1}, "model": {"precision": "bf16"}, "evaluate": EVALUATION}
    summary = train(from_dict(options(tmp_path, "run", **values)))
    assert summary["before/all/gain_over_teacher"] == summary["before/all/gain_self"]


def test_a_gain_that_shuffling_keeps_is_a_warning_of_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    train(from_dict(options(tmp_path, "run", train={"steps": 2}, evaluate=EVALUATION)))
    measured = heldout.summarize

    def kept(*records: Any) -> dict[str, float]:
        return {**measured(*records), "all/kept_shuffled": 0.8, "all/gain_self/low": 0.1}

    monkeypatch.setattr(heldout, "summarize", kept)
    for _ in range(2):  # a second evaluation warns again, and is written once
        assert main(["evaluate", str(tmp_path / "run")]) == 0
        assert "80% of the gain on all remains with the thoughts of other positions" in capsys.readouterr().err
    [row] = read_lines(tmp_path / "run" / "warnings.jsonl")
    assert (row["step"], row["name"]) == (2, "content-unused")
    RunLog(tmp_path / "run").warn([{**row, "name": "of training"}])
    monkeypatch.setattr(heldout, "summarize", measured)
    evaluate(tmp_path / "run")  # it is no longer so
    assert [row["name"] for row in read_lines(tmp_path / "run" / "warnings.jsonl")] == ["of training"]


def test_evaluating_a_model_makes_a_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    values = from_dict(options(tmp_path, "none")).model
    load_model(values, 0).save_pretrained(tmp_path / "model")
    load_tokenizer(values).save_pretrained(tmp_path / "model")
    chosen = {"window": ("corpus", 48), "thought_length": ("method", 4), "path": ("evaluate", "world:cups/heldout")}
    command = ["evaluate", "model", *[f"--{section}.{name}={value}" for name, (section, value) in chosen.items()]]
    command += ["--evaluate.documents", "2", "--evaluate.positions", "2"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "figures: runs/evaluate-model/evaluate.json" in shown
    for row in ("gain over itself (nats)", "gain of another's thought (nats)", "statements in a thought", "mixture"):
        assert row in shown
    assert "gain over the teacher" not in shown  # a model alone has none
    figures = json.loads(Path("runs/evaluate-model/evaluate.json").read_text())
    assert figures["all/gain_self"] == figures["all/gain_over_base"]
    assert "all/ce_generic" not in figures and "generic" not in shown  # nor any text that it was trained on
    assert main(command) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    trained_on = ["--corpus.path", "world:cups/train"]
    assert main([*command, "--overwrite", "True", "--evaluate.documents", "1", *trained_on]) == 0
    figures = json.loads(Path("runs/evaluate-model/evaluate.json").read_text())
    shown = capsys.readouterr().out
    assert figures["all/positions"] == 2 and f"generic thought: {figures['generic_thought']}" in shown
    assert "gain of a generic thought (nats)" in shown
    assert main([*command, "--model.path", "./nothing", "--run", "other"]) == 2
    assert not Path("other").exists()


@pytest.mark.parametrize("command", ["evaluate", "questions"])
def test_the_figures_of_a_run_go_nowhere_else(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunLog.create(from_dict(options(tmp_path, "run", evaluate=EVALUATION))).path
    (run / "metrics.jsonl").touch()
    for option, value in (("run", str(tmp_path / "other")), ("overwrite", "True")):
        line = complaint(capsys, [command, str(run), f"--{option}", value])
        assert line == f"--{option}: the figures of a run go into its own folder, {run}"
    assert not (tmp_path / "other").exists()


def test_a_run_that_is_not_finished_is_not_evaluated(tmp_path: Path):
    RunLog.create(from_dict(options(tmp_path, "run", evaluate=EVALUATION)))
    with pytest.raises(UserError, match=r"is not finished \(it has no checkpoint\); finish it with: .*--resume"):
        evaluate(tmp_path / "run")


def test_a_held_out_corpus_that_is_too_short_is_named_as_such(tmp_path: Path):
    (tmp_path / "short.txt").write_text("ball")
    config = from_dict(options(tmp_path, "run", evaluate={"path": str(tmp_path / "short.txt")}))
    with pytest.raises(UserError, match=r"^evaluate.path = .*: no document has corpus.min_tokens = 8 tokens or more$"):
        train(config)
    assert not (tmp_path / "run").exists()
