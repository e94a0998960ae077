"""The example notebook, cell by cell with smaller settings, and what its objects show."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.docs import ROOT
from helpers.pages import Page

NOTEBOOK = json.loads((ROOT / "examples" / "forethought.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SMALL = """
OPTIONS = [
    "--train.steps", "2", "--train.batch", "4", "--method.group", "2", "--method.thought_length", "6",
    "--evaluate.documents", "2", "--evaluate.positions", "1",
]
RUNS = "runs"
"""


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line if that is an expression."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body=body, type_ignores=[]), "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_runs_and_shows_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in CODE:
        parameters = "parameters" in cell["metadata"].get("tags", [])
        value = run(SMALL if parameters else "".join(cell["source"]), names)
        stored = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        if value is None:
            assert not stored, "a cell without a value shows none"
        elif hasattr(value, "_repr_svg_"):
            assert "image/svg+xml" in stored
            Page(value._repr_svg_())
        else:
            assert "text/html" in stored
            assert Page(value._repr_html_()).text.strip()
    assert [run.method for run in names["both"]] == ["rlp", "rlp"]


def test_the_stored_outputs_are_those_of_a_whole_run():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [one for one in outputs if one["output_type"] == "error" or one.get("name") == "stderr"]
    assert sum("text/html" in one.get("data", {}) for one in outputs) >= 5
