"""The registry: entries can be imported, code outside the package is found, senseless combinations are refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from forethought.cli import main
from forethought.config import UserError, from_dict, load, registry
from forethought.config.registry import METRICS, OPTION, TABLES, Kind
from forethought.run.folder import RunLog
from helpers.cli import complaint
from helpers.docs import backticked

OUTSIDE = '''
from forethought.config.registry import Entry


def policy(window, count, options, generator):
    """The first positions."""
    return list(range(1, count + 1))


def reward(inputs):
    """Short thoughts."""
    return -inputs.thoughts.lengths.float()


def picky(inputs):
    return reward(inputs)


picky.entry = Entry(help="for RPT", label="Picky", methods=("rpt",), required=("method.end",))


def engine(model, form, config):
    """An engine that samples only."""


class Plain:
    """Trains on text."""

    entry = Entry(help="plain", label="Plain text", samples_thoughts=False, excluded={"lora.r": "trains all weights"})


class Writes:
    entry = Entry(
        help="writes",
        writes=True,
        rewards=("prefix_match", "mine_outside:reward"),
        defaults={"method.reward": "prefix_match", "method.position_policy": "stride"},
    )


number = 3
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with modules that are no part of the package, as the current one."""
    (tmp_path / "mine_outside.py").write_text(OUTSIDE)
    (tmp_path / "mine_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("mine_outside", "mine_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def refused(words: str) -> str:
    with pytest.raises(UserError) as error:
        load(None, words.split())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, entries in TABLES.items() for name in entries])
def test_every_entry_can_be_imported_and_is_documented(kind: Kind, name: str):
    found = registry.entry(kind, name)
    assert callable(registry.load(kind, name))
    assert found.name == name and found.help and "\n" not in found.help
    assert registry.label(kind, name) == found.label
    assert name in backticked("docs/options.md")


def test_every_metric_is_documented():
    assert set(METRICS) <= backticked("docs/metrics.md")
    assert all(metric.label and metric.help and metric.better in (-1, 0, 1) for metric in METRICS.values())


def test_the_registry_imports_no_torch():
    code = "import sys\nfrom forethought.config import registry\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_auto_is_what_each_method_does():
    needed = {"warmup": {"prediction_weight": 1}}
    chosen = {name: from_dict({"method": {"name": name} | needed.get(name, {})}).method for name in TABLES["method"]}
    assert {name: one.reward_name for name, one in chosen.items() if one.samples_thoughts} == {
        "rlp": "information_gain",
        "warmup": "information_gain",
        "rpt": "prefix_match",
        "mixed": "information_gain",
    }
    policies = {"rlp": "uniform", "warmup": "uniform", "rpt": "entropy", "cpt": "uniform", "mixed": "uniform"}
    assert {name: one.policy for name, one in chosen.items()} == policies


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("name", ["nonsense", "./file.py:reward", "a:b:c", "a:", ":b"])
def test_an_unknown_name_is_one_line(kind: Kind, name: str):
    with pytest.raises(UserError) as error:
        registry.entry(kind, name)
    for message in (refused(f"--{OPTION[kind]}={name}"), str(error.value)):
        assert message.startswith(f"{OPTION[kind]} = {name!r}: must be ")
        assert message.endswith(" or module:attribute")
        assert all(known in message for known in TABLES[kind])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine_missing:f", "no module 'mine_missing' in the current folder or among the installed packages"),
        ("mine_missing.part:f", "no module 'mine_missing.part' in the current folder or among the installed packages"),
        ("mine_outside.part:f", "no module 'mine_outside.part' in the current folder or among the installed packages"),
        ("mine_outside:f", "mine_outside has no class or function 'f'"),
        ("mine_outside:number", "mine_outside has no class or function 'number'"),
        ("mine_broken:f", "importing mine_broken failed with ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.parametrize("kind", TABLES)
def test_code_that_does_not_exist_is_one_line(
    kind: Kind, name: str, message: str, outside: None, capsys: pytest.CaptureFixture[str]
):
    line = complaint(capsys, ["train", "quickstart", f"--{OPTION[kind]}", name])
    assert line == f"{OPTION[kind]} = {name!r}: {message}"


def test_code_outside_the_package_is_found_from_the_current_folder(outside: None):
    words = "--method.reward mine_outside:reward --rollout.engine mine_outside:engine"
    config = load(None, f"{words} --method.position_policy mine_outside:policy".split())
    assert registry.load("reward", config.method.reward_name).__name__ == "reward"
    assert registry.load("position_policy", config.method.policy)(None, 2, None, None) == [1, 2]
    assert registry.load("engine", config.rollout.engine).__name__ == "engine"
    assert registry.entry("reward", "mine_outside:reward").help == "Short thoughts"
    assert registry.entry("reward", "mine_outside:picky").label == "Picky"
    assert registry.label("reward", "mine_outside:reward") == "mine_outside:reward"
    plain = load(None, ["--method.name", "mine_outside:Plain"]).method
    assert not plain.samples_thoughts and plain.entry.label == "Plain text" and plain.policy == "uniform"
    writes = load(None, ["--method.name", "mine_outside:Writes"]).method
    assert (writes.reward_name, writes.policy, writes.entry.writes) == ("prefix_match", "stride", True)
    load(None, ["--method.name", "mine_outside:Writes", "--method.reward", "mine_outside:reward"])
    load(None, ["--method.name", "rpt", "--method.reward", "mine_outside:picky", "--method.end", "."])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--method.name rpt --method.reward information_gain",
            "method.reward = 'information_gain': is not for method.name rpt; use prefix_match or random",
        ),
        (
            "--method.reward prefix_match",
            "method.reward = 'prefix_match': is not for method.name rlp; use information_gain or random",
        ),
        ("--method.name cpt --method.inner_steps 2", "method.name = 'cpt': trains on text alone"),
        ("--method.name mixed --method.inner_steps 2", "method.name = 'mixed': trains on text alone"),
        ("--method.name mixed --method.kl_weight 0.1", "method.name = 'mixed': trains on text alone"),
        (
            "--method.name mixed --method.reward random",
            "method.reward = 'random': is not for method.name mixed; use information_gain",
        ),
        (
            "--method.name mixed --method.reward mine_outside:reward",
            "method.reward = 'mine_outside:reward': is not for method.name mixed",
        ),
        ("--method.name cpt --method.reward random", "method.reward = 'random': method.name cpt samples no thoughts"),
        (
            "--method.name cpt --method.proxy embedded --method.position_policy entropy",
            "method.proxy = 'embedded': only ",
        ),
        (
            "--method.name rpt --rollout.engine vllm",
            "rollout.engine = 'vllm': cannot write the predictions of method.name rpt",
        ),
        (
            "--method.name rpt --rollout.engine mine_outside:engine",
            "rollout.engine = 'mine_outside:engine': cannot write the predictions",
        ),
        ("--method.reward mine_outside:picky", "method.reward = 'mine_outside:picky': is not for method.name rlp"),
        (
            "--method.name rpt --method.reward mine_outside:picky",
            "method.reward = 'mine_outside:picky': needs method.end",
        ),
        (
            "--method.name mine_outside:Plain --method.reward random",
            "method.reward = 'random': method.name mine_outside:Plain samples",
        ),
        (
            "--method.name mine_outside:Plain --lora.r 2",
            "method.name = 'mine_outside:Plain': trains all weights, so lora.r = 2 must be 0",
        ),
        ("--method.name mine_outside:Writes --method.reward random", "method.reward = 'random': is not for "),
    ],
)
def test_a_combination_without_sense_is_one_line(words: str, message: str, outside: None):
    assert refused(words).startswith(message)


def test_a_run_of_version_0_1_is_refused_by_name(tmp_path: Path):
    run = RunLog.create(from_dict({"run": str(tmp_path / "run")}))
    saved = run.read_json("config.json")
    run.write_json("config.json", {name: value for name, value in saved.items() if name != "version"})
    with pytest.raises(UserError, match=r"config.json: is of version 0\.1, which versions after 0\.2 do not read$"):
        run.config()


def test_help_reads_the_registry(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for entries in TABLES.values():
        assert all(f"  {entry.name:18}{entry.help}\n" in shown for entry in entries.values())
