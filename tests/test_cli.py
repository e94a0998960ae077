"""The command line: one line for a user's error, exit statuses, help."""

import contextlib
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import forethought
from forethought.cli import COMMANDS, main
from forethought.config import Config, from_dict, option_names
from forethought.config.registry import TABLES
from forethought.inference import ThinkingModel
from forethought.models.loading import EMBEDDED, load_model, load_tokenizer
from forethought.run.folder import RunLog, read_lines
from forethought.tools.console import printable
from helpers.cli import complaint
from helpers.runs import options, words


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(words(options(folder, "run", train={"steps": 2}))) == 0
    return folder / "run"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder as transformers writes it."""
    start = from_dict(options(tmp_path, "none")).model
    load_model(start, 0).save_pretrained(tmp_path / "model")
    load_tokenizer(start).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any]) -> str:
    """What training with these options complains about; it leaves no run folder behind."""
    values = options(tmp_path, "run", **changes)
    line = complaint(capsys, words(values))
    assert not Path(values["run"]).exists()
    return line


def test_what_a_corpus_leaves_out_is_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(3):
        rows = [{"text": f"ball under red swap now {n} " * 9} for n in range(8)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [None, *rows]))
    (folder / "README").write_text("text")
    (folder / "empty.jsonl").write_text("")
    corpus = {"path": str(folder), "skip_bad_rows": True, "min_tokens": 8, "shuffle": 0}
    run = options(tmp_path, "run", corpus=corpus, train={"steps": 2}, evaluate={"path": str(folder), "documents": 3})
    assert main(words(run)) == 0
    [warning] = read_lines(tmp_path / "run" / "warnings.jsonl")
    assert warning["name"] == "held-out-trained-on" and "share 4 files" in warning["evidence"]
    lines = [line for line in capsys.readouterr().err.splitlines() if str(folder) in line and "step" not in line]
    for path in ("corpus.path", "evaluate.path"):
        said = [line for line in lines if line.startswith(f"forethought: {path} = ")]
        assert len(said) == 3
        assert {line.split(": ")[2].split(",")[0] for line in said} == {
            "1 files are empty", "left out", "skips bad rows",
        }  # fmt: skip
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["tarin"],
            "unknown command 'tarin': must be train, evaluate, questions, compare, posttrain, plan, think, report, "
            "runs, push or lm-eval",
        ),
        (["train"], "train takes a config file"),
        (["train", "--seed", "1"], "train takes a config file"),
        (["train", "nothing.toml"], "config 'nothing.toml' is no file; shipped configs are "),
        (["train", "quickstart", "extra"], "expected an option such as --method.group 8, got 'extra'"),
        (["train", "quickstart", "--method.ema", "1"], "method.ema = 1: input should be less than 1"),
        (["train", "--resume"], "option --resume needs a value"),
        (["train", "--resume", "nothing"], "run 'nothing': no such folder"),
        (["train", "--resume", "."], "run '.': holds no config.json"),
        (["train", "quickstart", "--method.name", "grpo"], "method.name = 'grpo': must be rlp, warmup, rpt, "),
        (["train", "quickstart", "--method.reward", "mine:reward"], "method.reward = 'mine:reward': no module 'mine' "),
        (["train", "quickstart", "--rollout.engine", "json:x"], "json has no class or function 'x'"),
        (["evaluate"], "evaluate takes a run folder or a model"),
        (
            ["evaluate", "./nothing", "--evaluate.path", "world:cups/heldout"],
            "model.path = './nothing' cannot be loaded",
        ),
        (["evaluate", "embedded", "--evaluate.path", ""], "evaluate.path = ''"),
        (["evaluate", "embedded", "--evaluate.documents", "0"], "evaluate.documents = 0"),
        (["report"], "report takes at least one run folder"),
        (["report", "nothing"], "nothing"),
        (["report", "."], "."),
        (["report", "x", "--fast"], "unknown option --fast"),
        (["report", "x", "--out"], "option --out needs a value"),
        (["train", "\x1b[31m[red]x[/red]\n"], r"config '\x1b[31m[red]x[/red]\n' is no file"),
        (["train", "quickstart", "--run", "b\udcff"], r"run = 'b\udcff': is not UTF-8 text"),
        (["compare", "compare-quickstart", "--run", "b\udcff"], r"run = 'b\udcff': is not UTF-8 text"),
        (["posttrain", "sft-cups", "--start", "embedded", "--run", "b\udcff"], r"run = 'b\udcff': is not UTF-8 text"),
        (["posttrain", "sft-cups", "--start", "embedded", "--data", "5"], "data = '5': must be world:NAME/SPLIT or a"),
        (["posttrain", "rlvr-cups", "--start", "embedded", "--end", "123"], "end = '123': must be one token of this"),
        (["compare", "compare-quickstart", "--config", "5"], "config '5' is no file"),
        (["\x1b[31m[bold]"], r"unknown command '\x1b[31m[bold]'"),
    ],
)
def test_a_wrong_command_is_one_line(
    command: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert message in complaint(capsys, command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["train", "{}"], ["train", "--resume", "{}"], ["plan", "{}"], ["evaluate", "{}"], ["think", "{}", "a"],
        ["report", "{}"], ["runs", "{}"], ["compare", "{}"], ["posttrain", "{}", "--start", "embedded"],
        ["posttrain", "sft-cups", "--start", "{}"], ["push", "{}", "a/b"], ["report", "{}/run"],
        ["plan", "quickstart", "--json", "{}"], ["evaluate", "embedded", "--evaluate.path", "{}"],
        ["train", "quickstart", "--corpus.path", "{}"], ["plan", "quickstart", "--model.path", "{}"],
        ["posttrain", "sft-cups", "--start", "embedded", "--run", "{}"],
    ],
)  # fmt: skip
def test_a_name_that_no_file_can_have_is_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)  # where there is no runs/quickstart yet
    name = "x" * 300
    assert re.search(rf"{name}.*: File name too long", complaint(capsys, [word.format(name) for word in command]))


def test_a_folder_that_cannot_be_read_holds_no_run_is_not_said(tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o300)
    code = """
import os, sys, forethought.tools.report
from forethought.cli import main
if os.getuid() == 0:
    os.setuid(65534)
sys.exit(main(["runs", sys.argv[1]]))
"""
    tmp_path.chmod(0o755)
    command = [sys.executable, "-c", code, tmp_path / "closed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"forethought: {tmp_path / 'closed'}: Permission denied\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", b"", "empty, must hold at least one document"),
        ("c.jsonl", b"{", "c.jsonl:1: malformed JSON"),
        ("c.jsonl", b"[1]", "c.jsonl:1: a row must be an object"),
        ("c.jsonl", b'{"body": "a"}', "no field corpus.field = 'text', the fields are 'body'"),
        ("c.jsonl", b'{"text": "\xff"}', "c.jsonl:1: not UTF-8"),
        ("c.jsonl", b"\x00\x01", "c.jsonl:1: holds a NUL byte"),
        ("[red]\x1b[31m.jsonl", b"{", r"[red]\x1b[31m.jsonl:1: malformed JSON"),
        ("c.jsonl", b'{"\x1b[31m": ""}', "c.jsonl:1: malformed JSON"),
        ("c.pdf", b"x", "unknown extension"),
        ("c.txt", b"ball", "no document has corpus.min_tokens = 8 tokens or more"),
    ],
)
def test_a_wrong_corpus_is_one_line(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / name).write_bytes(content)
    line = refused(capsys, tmp_path, {"corpus": {"path": str(tmp_path / name)}})
    assert line.startswith("corpus.path = ")
    assert message in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": {"path": "missing.jsonl"}}, "corpus.path = 'missing.jsonl': no such file or folder"),
        ({"corpus": {"path": "world:cups/nowhere"}}, "corpus.path = 'world:cups/nowhere': split must be"),
        ({"evaluate": {"path": "missing.txt"}}, "evaluate.path = 'missing.txt': no such file or folder"),
        ({"corpus": {"window": 250}}, "corpus.window = 250: with 6 tokens for a thought that makes 256"),
        ({"method": {"open": "<zork>"}}, "method.open = '<zork>': the tokenizer cannot encode it"),
        ({"method": {"prompt": "[red] {context}"}}, "method.prompt = '[red] ': the tokenizer cannot encode it"),
        (
            {"train": {"tracker": "wandb"}},
            "train.tracker = 'wandb': its package cannot be imported (No module named 'wandb')",
        ),
        ({"model": {"device": "cuda"}}, "model.device = 'cuda': no CUDA device is available here"),
        ({"model": {"tokenizer": "./nothing"}}, "model.tokenizer = './nothing' cannot be loaded: no such folder"),
        ({"model": {"path": "missing.gguf"}}, "model.path = 'missing.gguf' cannot be loaded: no such file"),
    ],
)
def test_a_value_that_the_world_does_not_allow_is_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if message.startswith("model.device") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if message.startswith("corpus.window"):
        changes = {"corpus": {"window": 251}}
        message = "corpus.window = 251 with 6 tokens for a thought takes 257 tokens, but the model's context window"
    assert refused(capsys, tmp_path, changes).startswith(message)


def spoil(model: Path, how: str) -> None:
    """Break a model folder in one way."""
    file, config = model / "model.safetensors", json.loads((model / "config.json").read_text())
    if how in ("no weights", "no config"):
        (file if how == "no weights" else model / "config.json").unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif how == "garbage":
        file.write_bytes(b"hello world" * 9)
    elif how == "missing weights":
        weights = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp" not in name}
        save_file(weights, file, metadata={"format": "pt"})
    elif how == "unknown type":
        (model / "config.json").write_text(json.dumps(config | {"model_type": "zork"}))
    elif how == "other shape":
        (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    elif how == "own code":
        own = {"model_type": "zork", "auto_map": {"AutoConfig": "x.A", "AutoModelForCausalLM": "x.B"}}
        (model / "config.json").write_text(json.dumps(config | own))
        (model / "x.py").write_text("raise SystemExit('code of a model was run')")
    elif how == "list":
        (model / "config.json").write_text("[1]")
    else:
        (model / "tokenizer.json").write_text("{nope")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", "no file named model.safetensors"),
        ("no config", "config.json"),
        ("truncated", "incomplete metadata"),
        ("garbage", "header too large"),
        ("missing weights", "3 weights are missing, model.layers.1.mlp.down_proj.weight among them"),
        ("unknown type", "zork"),
        ("other shape", "6 weights have another shape: model.layers.0.mlp.down_proj.weight is (32, 32), not (32, 48)"),
        ("own code", "contains custom code"),
        ("list", "must be a mapping"),
        ("tokenizer", "Expecting property name"),
    ],
)
def test_a_broken_model_folder_is_one_line(
    how: str, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    spoil(model, how)
    line = refused(capsys, tmp_path, {"model": {"path": str(model), "tokenizer": "", "init": "pretrained"}})
    assert line.startswith(f"model.path = '{model}' cannot be loaded: ")
    assert message in line


@pytest.mark.parametrize("content", [b"", b"no such thing" * 9, b"GGUF\3\0\0\0" + b"\xff" * 20])
def test_a_file_that_is_no_gguf_is_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "m.gguf").write_bytes(content)
    line = refused(capsys, tmp_path, {"model": {"path": str(tmp_path / "m.gguf"), "init": "pretrained"}})
    assert line.startswith(f"model.path = '{tmp_path / 'm.gguf'}' cannot be loaded: ")


def test_a_hub_that_does_not_answer_is_one_line_and_is_not_tried_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("forethought.models.loading.HUB_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{silent.getsockname()[1]}")
        huggingface_hub.close_session()  # an earlier test's has no proxy
        line = refused(capsys, tmp_path, {"model": {"path": "nobody/no-such-model", "tokenizer": ""}})
        assert complaint(capsys, ["think", "nobody/no-such-model", "text"]) == line
        huggingface_hub.close_session()
        silent.setblocking(False)
        tries = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                tries += 1
    assert 1 <= tries <= 2
    assert line.startswith("model.path = 'nobody/no-such-model' cannot be loaded: no such run or folder, and the hub, ")


def test_without_the_hub_a_model_is_loaded_from_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snapshot = tmp_path / "models--somebody--small" / "snapshots" / "abc"
    shutil.copytree(EMBEDDED["embedded"], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("forethought.models.loading._hub_is_reachable", lambda source: False)
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", lambda: pytest.fail("the hub was asked"))
    loaded, base = (ThinkingModel.load(name) for name in ("somebody/small", "embedded"))
    assert loaded.log_likelihood("ball under red", thoughts=0) == base.log_likelihood("ball under red", thoughts=0)


def test_a_run_folder_that_exists_is_left_alone(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(path for path in finished.rglob("*"))
    line = complaint(capsys, words(options(finished.parent, "run")))
    assert line.startswith(f"run = '{finished}': exists and is not empty; continue it (--resume {finished})")
    assert sorted(path for path in finished.rglob("*")) == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    line = complaint(capsys, words(options(tmp_path, "run", overwrite=True)))
    assert "overwrite replaces only a Forethought run" in line
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_overwrite_replaces_a_run(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "run")
    assert main(words(options(tmp_path, "run", overwrite=True, train={"steps": 1}))) == 0
    assert RunLog.open(tmp_path / "run").read_json("summary.json")["steps"] == 1


def test_what_cannot_be_resumed_is_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    resume = ["train", "--resume", str(finished)]
    assert "this run is finished" in complaint(capsys, resume)
    line = complaint(capsys, [*resume, "--method.group", "8"])
    assert line == "method.group = 8: the run to resume has 3; resuming cannot change this option"
    assert complaint(capsys, [*resume, "--seed", "4"]).startswith("seed = 4: the run to resume has 0")
    for option, value in (("run", "other"), ("overwrite", "True")):
        line = complaint(capsys, [*resume, f"--{option}", value])
        assert line == f"--{option}: --resume goes on in the folder of the run itself, {finished}"
    log = RunLog.create(Config(run=str(tmp_path / "run")))
    with log.lock():
        assert "in use by process" in complaint(capsys, ["train", "--resume", str(log.path)])


def test_a_finished_run_prints_its_figures_and_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changes = {"train": {"steps": 2}, "evaluate": {"path": "world:cups/heldout", "documents": 2, "positions": 2}}
    assert main(words(options(tmp_path, "run", **changes))) == 0
    out, err = capsys.readouterr()
    assert "before" in out and "after" in out and "answer: " in out
    assert f"trained model: {tmp_path / 'run' / 'policy'}; report: {tmp_path / 'run' / 'report.html'}" in out
    assert "training 2/2, gain " in err
    assert (tmp_path / "run" / "report.html").is_file()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'page.html'}\n"


def test_help_lists_every_option_and_what_it_means(capsys: pytest.CaptureFixture[str]):
    for command in ("train", "evaluate"):
        assert main([command, "--help"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert [name for name in option_names() if f"--{name}" not in out] == []
        assert "Decay tau of the EMA" in out
        assert [name for entries in TABLES.values() for name in entries if f"\n  {name} " not in out] == []
    for command in ([], ["--help"], ["-h"], ["help"]):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert "usage: forethought train CONFIG" in out
        assert [name for name in COMMANDS if f"forethought {name} " not in out] == []
    assert main(["report", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: forethought report RUN")


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert re.fullmatch(rf"forethought {forethought.__version__}\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é [red]", "plain é [red]"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\nb\r\t\0", r"a\nb\r\t\x00"),
        ("\u202e", r"\u202e"),
    ],
)
def test_printable(text: str, shown: str):
    assert printable(text) == shown


class Broken(io.StringIO):
    """An output that works for some lines, and then fails as a closed pipe, a closed terminal or a full disk does."""

    encoding = "ascii"

    def __init__(self, code: int, works: int = 1):
        super().__init__()
        self.code, self.left = code, works

    def write(self, text: str) -> int:
        text.encode(self.encoding)
        self.left -= "\n" in text
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC], ids=["pipe", "terminal", "disk"])
def test_a_run_outlives_the_reader_of_its_output(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, err = Broken(code), Broken(code)
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("forethought.tools.console.PLAIN_EVERY_S", 0.0)
    assert main(words(options(tmp_path, "run"))) == 0
    assert (tmp_path / "run" / "summary.json").is_file()
    assert out.getvalue().count("\n") == err.getvalue().count("\n") == 1
    assert main(["--help"]) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "closed", [*(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "2>&-")), "<&- >&- 2>&-"]
)
def test_a_run_needs_no_output_at_all(closed: str, tmp_path: Path):
    command = shlex.join([sys.executable, "-m", "forethought", *words(options(tmp_path, "run"))])
    done = subprocess.run(f"{command} {closed}", shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (tmp_path / "run" / "policy").is_dir()
    assert all(row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl"))


def test_an_output_without_the_letters_of_a_name_shows_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = Broken(errno.EPIPE, works=99)
    monkeypatch.setattr("sys.stdout", out)
    assert main(words(options(tmp_path, "l\u00e4ufe"))) == 0
    assert "l\\xe4ufe" in out.getvalue()
