"""The rules that the tests themselves keep."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.support import selection
from tests.support.sources import nodes_of

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("test_*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of each module, and of each name in a module, that a file imports."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = f"{'tests.' if node.level else ''}{node.module or ''}"
            yield from (f"{package}.{alias.name}".replace("..", ".") for alias in node.names)


def test_no_test_imports_from_another_test_file() -> None:
    """A helper that two test files use is in tests/support: a test file can be moved or removed alone."""
    for path in FILES:
        for name in imported(path):
            assert not name.startswith("tests.test_"), f"{path.name}: {name}"


def test_each_test_says_what_it_promises() -> None:
    """The docstring of a test is made of sentences, and the last one ends with a full stop."""
    for path in FILES:
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                says = ast.get_docstring(node) or ""
                assert says.endswith("."), f"{path.name}:{node.lineno}: {node.name}: {says!r}"


def test_a_fixture_that_tests_share_makes_them_a_group() -> None:
    """Of several processes that run tests, each would make the fixture anew for the tests that it gets."""
    shared = set()
    for path in FILES:
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef):
                decorators = " ".join(ast.unparse(each) for each in node.decorator_list)
                if "pytest.fixture" in decorators and "scope=" in decorators:
                    shared.add(node.name)
    assert shared == selection.SHARED


def test_each_script_in_python_is_checked() -> None:
    """ruff and mypy find a script without .py by its name in pyproject.toml alone."""
    scripts = [path for path in (HERE.parent / "scripts").iterdir() if path.is_file() and not path.suffix]
    names = {f"scripts/{path.name}" for path in scripts if "python" in path.read_text().partition("\n")[0]}
    tool = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["tool"]
    assert names == set(tool["ruff"]["extend-include"])
    assert names <= set(tool["mypy"]["files"])
