"""benchmarks/gpu_suite.sh: each part is a command that exists, with a limit; a slow test runs it on a CPU."""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from forethought.config import load

ROOT = Path(__file__).parents[1]


def suite(folder: Path, **environment: str) -> list[list[str]]:
    """What the script prints, as words."""
    command = ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), str(folder)]
    values = {**os.environ, "PYTHON": sys.executable, "MODEL": "model.gguf", **environment}
    done = subprocess.run(command, env=values, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_every_part_is_a_command_that_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Without running any: options of `train` are checked, those of gpu.py parsed up to the missing card."""
    rows = suite(tmp_path, DRY="1")
    names = [name for name, *_ in rows]
    lengths = ["steps-64", "steps-256", "steps-1024"]
    runs = ["smollm2-probe", "rlp-full", "rlp-full-random"]
    parts = ["exactness", "resume", "offload", *lengths, "update", "update-positions", "decoding", "decoding-hybrid"]
    assert names == [*parts, *runs]
    assert sum(int(limit) for name, limit, *_ in rows if name not in runs) <= 540
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    main = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))["main"]
    for name, _, python, *words in rows:
        assert python == sys.executable
        if name in runs:
            assert words[:3] == ["-m", "forethought", "train"]
            config = load(words[3], words[4:])
            assert config.run == str(tmp_path / name)
            assert config.method.reward == ("random" if name == "rlp-full-random" else "auto")
        else:
            monkeypatch.setattr(sys, "argv", words)
            monkeypatch.setitem(main.__globals__, "DEVICE", "cpu")
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 2
            assert capsys.readouterr().err == "benchmarks/gpu.py: there is no CUDA device\n", "the options are fine"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_suite_runs_on_a_cpu_at_tiny_shapes(tmp_path: Path):
    rows = suite(tmp_path, QUICK="1", MODEL="")
    assert [row[1] for row in rows[:-1]] == ["0"] * 10
