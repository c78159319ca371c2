"""The sources as the tests of rules read them: each file is parsed once in a process."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path


def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Return every node of a file's syntax tree, the module first. A link is the file that it leads to."""
    return _nodes(path.resolve())


@cache
def _nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text())))
