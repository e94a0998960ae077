"""The commands of the documentation: the options of each are valid, and those of the path to a cluster run."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest

from forethought.cli import COMMANDS, main
from forethought.config import from_dict, load, own_options, read_overrides
from forethought.data.worlds.cups import row
from forethought.tools import plan, think
from forethought.tools.experiment import design
from forethought.tools.posttrain import stage
from helpers.docs import ROOT

PAGES = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "lab-notes.md")]
COMMAND = re.compile(rf"^    ((?:.* )?\S*forethought (?:{'|'.join(COMMANDS)})\b.*|sbatch .*)$", re.MULTILINE)
ANY = {"CONFIG": "quickstart", "EXPERIMENT": "compare-quickstart", "mine.toml": "compare-quickstart"}
ANY |= {"my_file:my_reward": "auto"}


def commands(page: Path) -> list[list[str]]:
    """The commands in the indented blocks of a page: the words behind `forethought`, without launchers and pipes."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = []
    for line in COMMAND.findall(text.replace("\\\n", " ")):
        words = shlex.split(line.partition(" | ")[0], comments=True)
        if words[0] == "sbatch":
            script = words.index("examples/train.sbatch")
            words = ["forethought", "train", *words[script + 2 :], "--run", words[script + 1]]
        start = next(i for i, word in enumerate(words) if Path(word).name == "forethought")
        found.append([ANY.get(word, word) for word in words[start + 1 :]])
    return found


def check(name: str, *words: str) -> None:
    """Read the options of a command as the command line does. Raises UserError."""
    options = list(words[next((i for i, word in enumerate(words) if word.startswith("--")), len(words)) :])
    match name:
        case "train" if words[0] == "--resume":
            from_dict(read_overrides(options[2:]))
        case "train":
            load(words[0], options)
        case "evaluate" | "questions":
            from_dict(read_overrides(options))
        case "compare":
            design.read(words[0], read_overrides(options))
        case "posttrain":
            stage.read(words[0], {k: v for k, v in read_overrides(options).items() if k not in {"start", "run"}})
        case "plan":
            from_dict(own_options(plan.Options, options)[1])
        case "think":
            from_dict(own_options(think.Options, options)[1])
        case _:
            assert name in COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_of_the_commands_are_valid(page: Path):
    for words in commands(page):
        if not any(word.startswith("[") for word in words):  # a usage line
            check(*words)


TINY = (
    "--method.prompt {context} --method.group 2 --method.thought_length 4 --corpus.window 48 --corpus.min_tokens 16 "
    "--train.steps 1 --train.batch 2 --model.precision fp32 --evaluate.documents 4 --evaluate.positions 1 "
    "--evaluate.view 1 --evaluate.view_thoughts 1"
)


def test_the_path_to_a_cluster_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Its commands with the embedded base as MODEL, from training on one device to the evaluation of its run."""
    monkeypatch.chdir(tmp_path)
    Path("TEXT").mkdir()
    for path, split in (("TEXT/a.jsonl.gz", "train"), ("HELDOUT.jsonl", "heldout")):
        lines = "".join(json.dumps(row(split, number)) + "\n" for number in range(8)).encode()
        Path(path).write_bytes(gzip.compress(lines) if path.endswith("gz") else lines)
    here = {"MODEL": "embedded", "runs/mine": "runs/one-gpu"}
    for command in commands(ROOT / "docs" / "cluster.md"):
        words = [here.get(word, word) for word in command]
        if words[0] == "train" and "runs/one-gpu" in words and not Path("runs").exists():
            assert main([*words, *TINY.split()]) == 0
        elif words[0] in {"report", "plan", "evaluate"} and "--simulate" not in words:
            assert main(words) == 0
    assert "gain of another's thought" in capsys.readouterr().out
