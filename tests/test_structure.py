"""The size of the package: few modules and few lines at the same time, so that neither is bought with the other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "forethought"
MODULES = sorted(PACKAGE.rglob("*.py"))
NATIVE = tuple(f"rollout/{name}.py" for name in ("__init__", "native", "decoder"))
CORE = ("config", "data", "algo", "models", "trainer.py", *NATIVE)
"""What a reader of the method reads: everything but prefixes, run folders, evaluation, tools and other backends."""


def lines(modules: list[Path]) -> int:
    return sum(path.read_text(encoding="utf-8").count("\n") for path in modules)


def test_the_package_has_few_modules_and_few_lines():
    assert len(MODULES) <= 87
    assert lines(MODULES) <= 20_023


def test_the_core_reads_in_an_evening():
    core = [path for path in MODULES if path.relative_to(PACKAGE).as_posix().startswith(CORE)]
    assert len(core) > 25
    assert lines(core) <= 6_632


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_functions_are_short(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{path.name}: {node.name}"


def test_no_test_module_imports_another():
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert not any(part.startswith("test_") for name in names for part in name.split(".")), path
