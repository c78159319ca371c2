"""The text below each member of an enum, read from the source."""

from __future__ import annotations

import ast
import enum
import inspect
import itertools
import textwrap


def meanings(states: type[enum.Enum]) -> dict[str, str]:
    """Return the text below each member, on one line, by the member's name.

    Python keeps no docstring for a member, so the source is parsed. A member without a text is left out.
    """
    source = textwrap.dedent(inspect.getsource(states))
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    found = {}
    for member, below in itertools.pairwise(body):
        match member, below:
            case (
                ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split())
            case _:
                pass
    return found
