"""Processes without a home folder, or whose user has no name."""

from pathlib import Path

import pytest

from forethought.cli import main
from forethought.config import from_dict
from forethought.rollout.cpp import library
from helpers.cli import complaint
from helpers.runs import options, words


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a name and a home folder, as in a container that is started with another user id."""
    for name in ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)
    monkeypatch.chdir(tmp_path)
    library.cache_clear()


@pytest.mark.usefixtures("nobody")
def test_a_user_without_a_home_trains(tmp_path: Path):
    assert main(words(options(tmp_path, "run", train={"steps": 2, "tracker": "tensorboard"}))) == 0
    assert not (tmp_path / "~").exists()


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("run", "~/run", "run = '~/run': no such home folder; give the whole path"),
        ("corpus.path", "~/corpus", "corpus.path = '~/corpus': no such file or folder"),
        ("model.path", "~/m", "model.path = '~/m' cannot be loaded: Could not determine home directory"),
        ("model.decoding", "cpp", "; set XDG_CACHE_HOME to a folder that can be written; use 'auto' or 'eager'"),
    ],
)
def test_what_needs_a_home_is_one_line(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert message in complaint(capsys, [*words(options(tmp_path, "run")), f"--{option}", value])
    assert {path.parent.name for path in tmp_path.glob("*/config.json")} == {"architecture"}
    library.cache_clear()


@pytest.mark.usefixtures("nobody")
def test_questions_below_a_home_that_is_not_there_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("lm_eval")
    command = ["questions", "embedded", "--questions.data", "~/q", "--questions.tasks", "gsm8k", "--run", "answers"]
    assert "for 'gsm8k': ~/q: no such file or folder" in complaint(capsys, command)


def test_a_run_below_the_home_folder_is_made_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_dict({"run": "~/runs/a"}).run == str(tmp_path / "runs" / "a")
    assert from_dict({"run": "./~"}).run == "./~"
