"""The documentation matches the code: names exist, every metric is defined, and the wording stays plain."""

import ast
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
PACKAGES = sorted({path.parent.name for path in MODULES if path.parent.parent.name == "forethought"})
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "lab-notes.md"),
]
PRIVATE = "|".join(
    (
        r"\bthat (is|are) no number",
        "without the host",
        r"put into order|ordered (copies|weights)",
        r"of \w+'s kind",
        r"thinks? \d+ times",
        r"\bdealt (to|over|out|by)\b|\bdeals (out|documents)\b",
        r"stands? (beside|below it)",
        r"\bheld against\b",
        r"\bby the wall\b",
        r"\bvLLM tells\b|tells memory",
    )
)
"""Phrases of earlier versions for which the field has a term: non-finite, CUDA-graph decoding, prepacked, sharded."""
BRITISH = (
    r"\b(colour|licence|behaviour|favour)\w*"
    r"|\b(normal|recogn|optim|synchron|summar|initial|penal|organ)is(e|ed|es|ing|ation)\b"
)


def metric_names(tmp_path: Path, method: str) -> set[str]:
    overrides = {
        "run": str(tmp_path / method),
        "model": {"init": "random"},
        "corpus": {"window": 128},
        "method": {"name": method, "group": 2, "thought_length": 4, "kl_weight": 0.0 if method == "mixed" else 0.1},
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


def test_functions_named_in_paper_md_exist():
    names = {name for name in backticked("docs/paper.md") if re.fullmatch(r"[a-z_]+(\.[A-Za-z_]+)+", name)}
    for name in sorted(names - set(option_names())):
        assert resolves(name), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_modules_and_options_named_in_the_documents_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/.-])(?:tests|benchmarks|configs|examples|tools|docs|src)/[\w/.-]+\.\w+", text):
        known = [ROOT / path, ROOT / "src" / "forethought" / path, page.parent / path]
        assert any(one.is_file() for one in known), path
    for name in set(re.findall(r"`forethought((?:\.(?!json)[A-Za-z_]\w*)+)`", text)):
        assert resolves(name[1:]), name
    for path in re.findall(rf"`({'|'.join(PACKAGES)})/([\w/]+\.\w+)`", text):
        assert (ROOT / "src" / "forethought" / "/".join(path)).is_file(), path
    for name in re.findall(r"^::: forethought\.(\S+)", text, re.MULTILINE):
        assert resolves(name), name
    for name in re.findall(r"^\| `(\w+)\(", text, re.MULTILINE) if page.name == "trl.md" else ():
        assert resolves(f"tools.trl.{name}"), name
    known, sections = set(option_names()), {field.name for field in dataclasses.fields(Config)}
    for name in set(re.findall(r"--([a-z]+\.[a-z_0-9]+)", text)) - {"section.option"}:
        assert name.split(".")[0] not in sections or name in known, name


def resolves(name: str) -> bool:
    parts = name.split(".")
    for split in range(len(parts), -1, -1):
        try:
            found = importlib.import_module(".".join(["forethought", *parts[:split]]))
        except ModuleNotFoundError as error:
            source = ROOT / "src" / "forethought" / f"{'/'.join(parts[:split])}.py"
            if (error.name or "").partition(".")[0] != "forethought" and source.is_file():
                return is_defined(source, parts[split:])  # the module needs an extra that is not installed
            continue
        for part in parts[split:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def is_defined(path: Path, parts: list[str]) -> bool:
    """Whether a class or function, or a method of a class, is in the source of a module."""
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for part in parts:
        known = {node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        if part not in known:
            return False
        body = known[part].body
    return True


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


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 160


def test_the_architecture_page_lists_every_module():
    """One line per module, under the folder that holds it; several may share a line, and nothing else is listed."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"^## Modules\n\n((?:    .*\n)+)", text, re.MULTILINE)
    assert block is not None
    listed, folders = set(), {}
    for line in block[1].splitlines():
        indent, names = len(line) - len(line.lstrip()), re.split(r"\s{2,}", line.strip())[0]
        for name in names.split(", "):
            parent = folders.get(indent - 2, "") if indent > 4 else ""
            listed.add(parent + name)
            if name.endswith("/"):
                folders[indent] = parent + name
    package = ROOT / "src" / "forethought"
    modules = {path.relative_to(package).with_suffix("").as_posix() for path in MODULES if path.stem != "__init__"}
    packages = {path.parent.relative_to(package).as_posix() + "/" for path in MODULES if path.parent != package}
    assert listed == modules | packages


def test_the_reward_of_the_architecture_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    block = re.search(r"```python\n(def my_reward.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    assert block is not None
    (tmp_path / "my_file.py").write_text(block[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    method = {"reward": "my_file:my_reward", "group": 2, "thought_length": 4}
    corpus, steps = {"window": 64}, {"steps": 1, "batch": 2}
    summary = train(from_dict({"run": "run", "corpus": corpus, "method": method, "train": steps}))
    sys.modules.pop("my_file")
    assert summary["steps"] == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_documents_use_standard_terms(page: Path):
    prose = re.sub(
        r"```.*?```|^    .*$|`[^`\n]+`", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    prose = " ".join(prose.split())
    assert [found.group() for found in re.finditer(f"{PRIVATE}|{BRITISH}", prose, re.IGNORECASE)] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_docstrings_and_messages_use_standard_terms(path: Path):
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    strings = [node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = [match.group() for text in strings for match in re.finditer(PRIVATE, " ".join(text.split()), re.IGNORECASE)]
    assert found == []


def test_every_section_of_options_and_every_public_name_is_in_the_reference():
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("options.md", "api.md")]
    shown = set(re.findall(r"^::: forethought\.(\S+)", "".join(pages), re.MULTILINE))
    sections = [field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)]
    assert len(sections) > 5 and {f"config.{section.__name__}" for section in sections} <= shown
    for name, home in forethought._HOMES.items():
        module, _, known_as = home.partition(":")
        assert shown & {home, f"{module}.{known_as or name}"}, name


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
