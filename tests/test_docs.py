"""The documents tell the truth about the code: names in tables exist, every figure is explained, rooms stay small."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import forethought
from forethought.config import Config, from_dict, load, option_names
from forethought.eval import evaluate
from forethought.tools.experiment.design import read
from forethought.tools.posttrain.stage import read as read_stage
from forethought.trainer import train
from helpers.docs import ROOT, backticked

MODULES = sorted((ROOT / "src").rglob("*.py"))


def metric_names(tmp_path: Path, method: str) -> set[str]:
    overrides = {
        "run": str(tmp_path / method),
        "model": {"init": "random"},
        "corpus": {"window": 128},
        "method": {"name": method, "group": 2, "thought_length": 4, "kl_weight": 0.1},
        "train": {"steps": 1, "batch": 2},
        "evaluate": {"path": "world:cups/heldout", "documents": 2, "positions": 1},
    }
    summary = train(from_dict(overrides))
    lines = (tmp_path / method / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    flat = {name.split("/")[-1] for name in summary if "/" in name and not name.endswith(("/low", "/high"))}
    return set(json.loads(lines[0])) | flat | {name for name in summary if "/" not in name}


@pytest.mark.parametrize("method", ["rlp", "rpt", "cpt", "mixed"])
def test_every_metric_has_a_line_in_the_documents(tmp_path: Path, method: str):
    assert metric_names(tmp_path, method) <= backticked("docs/metrics.md")


def test_every_figure_of_an_evaluation_has_a_line_in_the_documents(tmp_path: Path):
    values = {"corpus": {"window": 64}, "method": {"thought_length": 20}, "run": str(tmp_path / "run")}
    chosen = {"path": "world:cups/heldout", "documents": 20, "positions": 2, "view": 1, "view_thoughts": 2}
    figures, file = evaluate("embedded", {**values, "evaluate": chosen})
    known = backticked("docs/metrics.md")
    names = {name.split("/")[1] for name in figures if "/" in name}
    assert {"ce_empty", "gain_shuffled", "ce_random", "truth"} <= names <= known
    shown = json.loads((file.parent / "documents.json").read_text())
    place = shown["documents"][0]["positions"][0]
    assert {*shown, *shown["documents"][0], *place, *place["thoughts"][0]} <= known


def test_functions_and_tests_named_in_paper_md_exist():
    names = {name for name in backticked("docs/paper.md") if re.fullmatch(r"[a-z_]+(\.[A-Za-z_]+)+", name)}
    sections = {option.split(".")[0] for option in option_names() if "." in option}
    for name in sorted(names):
        first, *rest = name.split(".")
        if rest == ["py"]:
            assert (ROOT / "tests" / name).is_file(), name
        elif first in sections and name in option_names():
            continue
        else:
            assert resolves(name), name


def resolves(name: str) -> bool:
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module("forethought." + ".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_every_shipped_config_is_valid():
    files = sorted((ROOT / "configs").glob("*.toml"))
    assert files
    for file in files:
        if file.stem.startswith(("compare-", "sweep-")):
            assert read(file, {}).jobs
        elif file.stem.startswith(("sft-", "rlvr-")):
            assert read_stage(file).stage == file.stem.partition("-")[0]
        else:
            load(file)


def test_every_module_has_a_place_in_the_documents():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    top = {path.stem for path in (ROOT / "src" / "forethought").glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in MODULES if path.parent.name != "forethought"}
    for name in top | folders:
        assert re.search(rf"^    {name}\b", text, re.MULTILINE), name


def test_every_section_of_options_and_every_public_name_is_in_the_reference():
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("options.md", "api.md")]
    shown = set(re.findall(r"^::: forethought\.(\S+)", "".join(pages), re.MULTILINE))
    sections = [field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)]
    assert len(sections) > 5 and {f"config.{section.__name__}" for section in sections} <= shown
    for name, home in forethought._HOMES.items():
        known_as = "write" if name == "write_report" else name
        assert shown & {home, f"{home}.{known_as}"}, name


def test_functions_of_the_package_stay_functions():
    """Importing a submodule sets an attribute of the package, which must never take a function's place."""
    code = """
import forethought
for name in forethought.__all__: getattr(forethought, name)
import importlib, pkgutil
for module in pkgutil.iter_modules(forethought.__path__): importlib.import_module("forethought." + module.name)
assert callable(forethought.train) and callable(forethought.evaluate) and callable(forethought.load)
assert not {module.name for module in pkgutil.iter_modules(forethought.__path__)} & set(forethought.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
