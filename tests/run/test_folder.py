"""The run folder."""

import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forethought.config import Config, Method, RunError, UserError, from_dict
from forethought.run.folder import RunLog, check_free, checkpoints, read_lines, sync

HOLD = """
import sys
from forethought.run.folder import RunLog
with RunLog.open(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def make(folder: Path, *, overwrite: bool = False, seed: int = 0) -> RunLog:
    return RunLog.create(Config(run=str(folder), overwrite=overwrite, seed=seed))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_reading_a_run_does_not_import_torch():
    code = "import sys, forethought.run.folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_create_saves_the_whole_config(tmp_path: Path):
    config = Config(run=str(tmp_path / "a" / "b"), seed=7, method=Method(group=3, min_gain=-math.inf))
    run = RunLog.create(config)
    assert run.path == tmp_path / "a" / "b"
    assert run.config() == config
    assert RunLog.open(run.path) == run
    assert names(run.path) == {"config.json", ".lock"}


def test_create_takes_an_empty_folder(tmp_path: Path):
    assert make(tmp_path).path == tmp_path


def test_create_refuses_a_folder_with_something_in_it(tmp_path: Path):
    run = make(tmp_path / "run")
    with pytest.raises(UserError, match=rf"(?s)^run = '{run.path}'.*--resume {run.path}.*--run.*--overwrite"):
        make(run.path, seed=1)
    assert run.config().seed == 0


def test_overwrite_empties_a_run_and_follows_no_link(tmp_path: Path):
    run = make(tmp_path / "run")
    run.append("metrics", [{"step": 1, "loss": 1.0}])
    (run.path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (run.path / "link").symlink_to(tmp_path / "precious")
    new = make(run.path, overwrite=True, seed=5)
    assert names(new.path) == {"config.json", ".lock"}
    assert new.config().seed == 5
    assert (tmp_path / "precious" / "file").read_text() == "kept"


@pytest.mark.parametrize("config", [None, "{}", '{"hidden_size": 8}', "[1]", '{"seed": 0', "[]"])
def test_overwrite_refuses_what_is_no_run(tmp_path: Path, config: str | None):
    (tmp_path / "thesis.txt").write_text("years of work")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = names(tmp_path)
    with pytest.raises(UserError, match="overwrite replaces only a Forethought run"):
        make(tmp_path, overwrite=True)
    assert names(tmp_path) == before


def test_overwrite_refuses_a_run_in_training(tmp_path: Path):
    run = make(tmp_path / "run")
    run.append("metrics", [{"step": 1, "loss": 1.0}])
    with run.lock(), pytest.raises(UserError, match="in use"):
        make(run.path, overwrite=True)
    assert len(read_lines(run.path / "metrics.jsonl")) == 1


def test_create_refuses_paths_that_cannot_be_folders(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        make(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be made or written: Not a directory"):
        make(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot be made or written"):
        make(tmp_path / ("x" * 300))


def test_create_refuses_a_folder_without_permission(tmp_path: Path):
    tmp_path.chmod(0o500)
    code = """
import os, pathlib, sys
from forethought.config import Config, UserError
from forethought.run.folder import RunLog
if os.getuid() == 0:
    os.setuid(65534)
for run in (sys.argv[1], sys.argv[1] + "/run"):
    try:
        RunLog.create(Config(run=run))
    except UserError as error:
        print(error)
try:
    RunLog(pathlib.Path(sys.argv[1])).check_writable()
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert len(re.findall(r"run = .*Permission denied\n", done.stdout)) == 2
    assert done.stdout.splitlines()[2:] == [f"run = '{tmp_path}': the folder cannot be written"]


def test_open_refuses_what_is_no_run(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        RunLog.open(tmp_path / "none")
    with pytest.raises(UserError, match="no Forethought run"):
        RunLog.open(tmp_path)
    (tmp_path / "config.json").write_text('{"run": "a", "meth')
    with pytest.raises(UserError, match=r"config\.json: is not valid JSON"):
        RunLog.open(tmp_path)
    (tmp_path / "config.json").write_text('{"version": "1", "run": "a", "method": {"group": 0}, "train": {}}')
    with pytest.raises(UserError, match=r"config\.json: method\.group = 0"):
        RunLog.open(tmp_path)


def test_metrics_are_one_line_each_without_nan(tmp_path: Path):
    run = make(tmp_path)
    run.append("metrics", [{"step": 1, "loss": 0.1, "gain": math.nan, "ratio": math.inf, "tokens": 12}])
    run.append("metrics", [{"step": 2, "loss": -math.inf}])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "loss": 0.1, "tokens": 12}', '{"step": 2}']
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1, "tokens": 12}, {"step": 2}]


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=())), numbers=st.lists(st.floats()))
def test_any_thought_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str, numbers: list[float]):
    run = make(tmp_path_factory.mktemp("run"))
    run.append("thoughts", [{"step": 3, "thought": text, "logp": numbers}])
    finite = [number if math.isfinite(number) else None for number in numbers]
    assert read_lines(run.path / "thoughts.jsonl") == [{"step": 3, "thought": text, "logp": finite}]


def test_thoughts_need_a_step(tmp_path: Path):
    with pytest.raises(AssertionError, match="step"):
        make(tmp_path).append("thoughts", [{"thought": "?"}])


def test_read_lines_ignores_only_a_cut_last_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    whole = b'{"step": 1}\n{"step": 2, "text": "\xc3\xa4"}\n'
    second = whole.index(b"\n") + 1
    for length in range(second, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert read_lines(path) == [{"step": 1}], length
    path.write_bytes(whole[:-1])
    assert len(read_lines(path)) == 2
    path.write_bytes(whole + b"\0" * 40)
    assert len(read_lines(path)) == 2
    path.write_bytes(whole + b"\n" + whole)
    assert len(read_lines(path)) == 4


@pytest.mark.parametrize("line", ['{"step": 2', "[1]", "\0\0"])
def test_a_broken_line_elsewhere_is_named(tmp_path: Path, line: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=rf"{path}:2: "):
        read_lines(path)


def test_rewind_drops_later_steps_and_a_cut_line(tmp_path: Path):
    run = make(tmp_path)
    for step in range(1, 6):
        run.append("metrics", [{"step": step, "loss": 1 / step}])
        run.append("thoughts", [{"step": step, "i": i} for i in range(2)])
    kept = read_lines(tmp_path / "metrics.jsonl")[:3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run.rewind(3)
    assert read_lines(tmp_path / "metrics.jsonl") == kept
    assert [row["step"] for row in read_lines(tmp_path / "thoughts.jsonl")] == [1, 1, 2, 2, 3, 3]
    run.append("metrics", [{"step": 4, "loss": 9.0}])
    assert read_lines(tmp_path / "metrics.jsonl") == [*kept, {"step": 4, "loss": 9.0}]
    assert names(tmp_path) == {"config.json", ".lock", "metrics.jsonl", "thoughts.jsonl"}


def test_rewind_without_lines_writes_nothing(tmp_path: Path):
    run = make(tmp_path)
    run.rewind(0)
    assert names(tmp_path) == {"config.json", ".lock"}


def test_rewind_keeps_a_file_that_it_cannot_read(tmp_path: Path):
    run = make(tmp_path)
    text = '{"step": 1}\n{"loss": 2}\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: has no step"):
        run.rewind(1)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_write_json_replaces_and_leaves_nothing_beside(tmp_path: Path):
    run = make(tmp_path)
    run.write_json("summary.json", {"a": 1, "deep": {"nan": math.nan, "list": [1.5, math.nan]}})
    assert run.read_json("summary.json") == {"a": 1, "deep": {"list": [1.5, None]}}
    run.write_json("summary.json", {"b": 2})
    assert run.read_json("summary.json") == {"b": 2}
    with pytest.raises(TypeError):
        run.write_json("summary.json", {"b": object()})
    assert run.read_json("summary.json") == {"b": 2}
    assert names(tmp_path) == {"config.json", ".lock", "summary.json"}


def test_read_json_names_the_file(tmp_path: Path):
    run = make(tmp_path)
    with pytest.raises(UserError, match=r"summary\.json: No such file"):
        run.read_json("summary.json")
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(UserError, match=r"summary\.json: holds a list"):
        run.read_json("summary.json")


def test_lock_is_refused_while_held_and_freed_by_a_kill(tmp_path: Path):
    run, command = make(tmp_path), [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on "), run.lock():
            pass
        holder.kill()
    with run.lock():
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
        with pytest.raises(UserError, match="in use"), run.lock():
            pass
    with run.lock():
        pass


def test_who_asks_whether_a_folder_is_in_use_keeps_nobody_from_it(tmp_path: Path):
    run = make(tmp_path)
    with (tmp_path / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as `in_use` holds it
        threading.Timer(0.05, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with run.lock():
            assert run.in_use()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_says_what_is_safe(tmp_path: Path):
    run = make(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"metrics\.jsonl: .*No space left on device; no checkpoint had been written$"):
        run.append("metrics", [{"step": 1, "loss": 1.0}])
    for name in ("step-00000020", ".replaced-step-00000030", ".old-step-00000040", ".partial-step-00000050"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(RunError, match=r"the checkpoint of step 30 is intact$"):
        run.append("metrics", [{"step": 2, "loss": 1.0}])


def test_a_file_that_may_not_grow_leaves_the_old_one(tmp_path: Path):
    make(tmp_path).write_json("summary.json", {"a": 1})
    code = """
import resource, sys
from forethought.config import RunError
from forethought.run.folder import RunLog
run = RunLog.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    run.write_json("summary.json", {"b": "x" * 5000})
except RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert re.search(r"summary\.json: cannot be written: File too large", done.stdout)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": 1}
    assert names(tmp_path) == {"config.json", ".lock", "summary.json"}


@pytest.mark.parametrize("option", ["model.path", "model.tokenizer", "corpus.path", "evaluate.path"])
def test_what_a_run_reads_is_not_emptied(tmp_path: Path, option: str):
    section, _, name = option.partition(".")
    old = make(tmp_path / "run")
    (old.path / "policy").mkdir()
    config = from_dict({"run": str(old.path), "overwrite": True, section: {name: str(old.path / "policy")}})
    with pytest.raises(UserError, match=f"{option} = .*policy' is in this folder, which would be emptied"):
        RunLog.create(config)
    assert (old.path / "policy").is_dir()


def test_a_run_of_version_0_1_can_be_replaced(tmp_path: Path):
    old = make(tmp_path / "run")
    old.write_json("config.json", {"run": "a", "method": {"unclosed": "penalise"}, "train": {}})
    with pytest.raises(UserError, match="is of version 0"):
        RunLog.open(old.path)
    config = from_dict({"run": str(old.path), "overwrite": True})
    RunLog.create(config)
    assert RunLog.open(old.path).config() == config


def test_an_option_that_is_refused_today_does_not_make_a_run_unreadable(tmp_path: Path):
    run = make(tmp_path / "run")
    run.write_json("config.json", {**run.read_json("config.json"), "method": {"name": "cpt", "inner_steps": 2}})
    assert RunLog.open(run.path).config().method.inner_steps == 2


def test_what_a_glob_finds_in_the_folder_and_a_proxy_are_not_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = make(tmp_path / "run")
    (old.path / "policy").mkdir()
    (old.path / "policy" / "text.jsonl").write_text("{}\n")
    proxy = {"position_policy": "entropy", "proxy": str(old.path / "policy")}
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [{"path": path} for path in (str(tmp_path / "*" / "**" / "*.jsonl"), "~/run/policy/*.jsonl")]
    asked = {"tasks": f"gsm8k={old.path}/policy/text.jsonl"}
    for section, values in (*(("corpus", one) for one in found), ("method", proxy), ("questions", asked)):
        config = from_dict({"run": str(old.path), "overwrite": True, section: values})
        with pytest.raises(UserError, match=rf"^run = .*: {section}\..* is in this folder, which would be emptied"):
            RunLog.create(config)
    assert (old.path / "policy" / "text.jsonl").is_file()


@pytest.mark.parametrize("damage", ["removed", "replaced"])
def test_a_folder_that_is_gone_is_a_line(tmp_path: Path, damage: str):
    run = make(tmp_path / "run")
    shutil.rmtree(run.path)
    if damage == "replaced":
        run.path.write_text("a file")
    for write in (lambda: run.append("metrics", [{"step": 1}]), lambda: run.write_json("summary.json", {})):
        with pytest.raises(RunError, match=r"cannot be written: .*; no checkpoint had been written$"):
            write()


@pytest.mark.parametrize("by", ["an empty folder", "another run"])
def test_a_run_does_not_go_on_in_a_folder_that_took_the_place_of_its_own(tmp_path: Path, by: str):
    run = make(tmp_path / "run")
    with run.lock():
        run.append("metrics", [{"step": 1}])
        (run.path / ".lock").unlink()  # somebody tidies: no other folder
        run.append("metrics", [{"step": 2}])
        shutil.rmtree(run.path)
        run.path.mkdir() if by == "an empty folder" else make(tmp_path / "other").path.rename(run.path)
        before = names(run.path)
        for write in (lambda: run.append("metrics", [{"step": 3}]), lambda: run.write_json("summary.json", {})):
            with pytest.raises(RunError, match="cannot be written: the folder was removed or replaced; no checkpoint"):
                write()
        assert names(run.path) == before
    make(tmp_path / "next")


def test_checkpoints_are_sorted_by_step_and_whole(tmp_path: Path):
    assert checkpoints(tmp_path) == {}
    folder = tmp_path / "checkpoints"
    for name in ("step-00000020", ".replaced-step-00000020", "step-100000000", "step-00000003", ".old-step-4", "x"):
        (folder / name).mkdir(parents=True)
    (folder / "step-00000999").write_text("a file")
    found = {3: folder / "step-00000003", 20: folder / "step-00000020", 100000000: folder / "step-100000000"}
    assert list(checkpoints(tmp_path).items()) == list(found.items())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
def test_a_file_system_that_cannot_sync_folders_is_no_error():
    sync(Path("/proc"))


def test_a_stage_of_post_training_is_not_to_be_resumed(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="continue it"):
        check_free(tmp_path, overwrite=False)
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not empty; name another one \(--run PATH\) or replace it"):
        check_free(tmp_path, overwrite=False)
