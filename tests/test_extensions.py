"""Rewards, methods, position policies and engines from a folder outside the package, trained to the model card."""

import json
from pathlib import Path

import pytest

from forethought.cli import main

REWARD = '''
def shorter(inputs):
    """Rewards short thoughts whose position has an even index, with everything that a reward is given."""
    assert len(inputs.positions.contexts()) == len(inputs.global_indices) == len(inputs.positions.targets())
    assert inputs.no_think_logp.shape == inputs.positions.targets().shape
    assert inputs.tokenizer.decode(inputs.positions.targets()[0].tolist())
    assert 0 <= inputs.generator.initial_seed() and inputs.options.group == 4
    even = (inputs.positions.at % 2 == 0)[:, None]
    return -inputs.thoughts.lengths.float() * even
'''
METHOD = '''
from forethought.algo.rlp import RLP
from forethought.config.registry import Entry


class Patient(RLP):
    """RLP that leaves out the advantages of every second step."""

    entry = Entry(help="RLP on every second step", label="patient RLP")

    def collect(self, windows, step):
        import dataclasses

        record = super().collect(windows, step)
        return dataclasses.replace(record, advantages=record.advantages * (step % 2))
'''
POLICY = '''
def last(window, count, options, generator):
    """The last positions of a window."""
    end = len(window.tokens) - options.horizon
    return list(range(max(1, end - count + 1), end + 1))
'''
ENGINE = '''
from forethought.rollout.native import native_engine

CALLS = []


class Counting:
    """The native engine, with its calls counted."""

    def __init__(self, model, form, config):
        self.engine = native_engine(model, form, config)

    def sample(self, positions, noise):
        CALLS.append(len(positions))
        return self.engine.sample(positions, noise)

    def sync(self):
        self.engine.sync()
'''
SHORT = "quickstart --train.steps 3 --train.batch 8 --method.group 4 --evaluate.documents 3 --evaluate.positions 1"


def train(*words: str) -> int:
    return main(["train", *SHORT.split(), "--model.device", "cpu", "--run", "run", *words])


@pytest.mark.parametrize(
    ("code", "option", "name", "shown"),
    [
        (REWARD, "method.reward", "shorter", "outside:shorter"),
        (METHOD, "method.name", "Patient", "patient RLP"),
        (POLICY, "method.position_policy", "last", "outside:last"),
        (ENGINE, "rollout.engine", "Counting", "outside:Counting"),
    ],
    ids=["reward", "method", "position policy", "engine"],
)
def test_code_outside_the_package_trains_to_the_model_card(
    code: str, option: str, name: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    module = f"outside_{option.replace('.', '_')}"
    Path(f"{module}.py").write_text(code)
    assert train(f"--{option}", f"{module}:{name}") == 0
    assert (tmp_path / "run/policy/model.safetensors").is_file()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 3
    card = (tmp_path / "run/policy/README.md").read_text()
    assert shown.replace("outside:", f"{module}:") in card
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    thoughts = [json.loads(line) for line in (tmp_path / "run/thoughts.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    if name == "shorter":
        given = [(one["position"], two) for one in thoughts for two in one["thoughts"]]
        assert all(two["reward"] in (0, -two["length"]) for _, two in given)
    if name == "Patient":
        assert rows[1]["objective/loss"] == 0 != rows[0]["objective/loss"]
    if name == "Counting":
        import importlib

        assert sum(importlib.import_module(module).CALLS) >= 24
    assert main(["report", "run"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method.reward", "nowhere:thing"], "method.reward = 'nowhere:thing'"),
        (["--method.reward", "json:no_such_function"], "method.reward = 'json:no_such_function'"),
        (["--method.name", "prl"], "method.name = 'prl'"),
        (["--rollout.engine", "vlm"], "rollout.engine = 'vlm'"),
        (["--method.position_policy", "random"], "method.position_policy = 'random'"),
        (["--method.name", "rpt", "--method.reward", "information_gain"], "method.reward = 'information_gain'"),
        (["--method.name", "mixed", "--method.reward", "random"], "method.reward = 'random'"),
        (["--method.name", "rlp", "--method.reward", "prefix_match"], "method.reward = 'prefix_match'"),
    ],
)
def test_names_and_combinations_that_make_no_sense_are_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert train(*words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("forethought: ") and message in line
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("code", "option", "message"),
    [
        ("def bad(inputs):\n    return inputs.thoughts.lengths[0].float()\n", "method.reward", "shape"),
        ("def bad(window, count, options, generator):\n    return [0]\n", "method.position_policy", "returned [0]"),
    ],
)
def test_outside_code_that_returns_nonsense_is_one_line(
    code: str,
    option: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    module = f"nonsense_{option.replace('.', '_')}"
    Path(f"{module}.py").write_text(code)
    assert train(f"--{option}", f"{module}:bad", "--evaluate.path", "") == 2
    *sizes, line = capsys.readouterr().err.splitlines()
    assert all(one.startswith("train.rollout_batch = ") for one in sizes)
    assert option in line and message in line
