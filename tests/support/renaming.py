"""Takes a private name away, as a version that renames it would."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType
from typing import Any

from lastcall.worker.sdk.names import PrivateName

# For the path of every process that is to have the name renamed: the import system reads the source of the
# module that has it, with another name in its place.
SITE = """
import importlib.machinery, re
loader = importlib.machinery.SourceFileLoader
get_code = loader.get_code

def renamed(self, module):
    if module.startswith("livekit.agents"):
        path = self.get_filename(module)
        source = self.get_data(path)
        if re.search(rb"\\b{name}\\b", source):
            return self.source_to_code(re.sub(rb"\\b{name}\\b", b"{name}_renamed", source), path)
    return get_code(self, module)

loader.get_code = renamed
"""


def owner_of(name: PrivateName) -> Any:
    module, _, owner = name.owner.partition(":")
    found = importlib.import_module(module)
    return getattr(found, owner) if owner else found


@contextmanager
def without(name: PrivateName) -> Iterator[None]:
    """Take the name from its module, or from its class, the bases, and every code of theirs."""
    owner = owner_of(name)
    with ExitStack() as stack:
        if not isinstance(owner, type):
            stack.callback(setattr, owner, name.name, getattr(owner, name.name))
            delattr(owner, name.name)
        else:
            for cls in owner.__mro__[:-1]:
                _take(stack, cls, name.name)
        yield


def _take(stack: ExitStack, cls: Any, name: str) -> None:
    for member in list(vars(cls).values()):
        for each in (member, *(getattr(member, part, None) for part in ("fget", "fset", "__func__"))):
            function = inspect.unwrap(each) if callable(each) else each
            if isinstance(function, FunctionType):
                stack.callback(setattr, function, "__code__", function.__code__)
                function.__code__ = _renamed(function.__code__, name)
    if name in vars(cls):
        stack.callback(setattr, cls, name, vars(cls)[name])
        # The code stays in the class, under another name: other names stand in it.
        setattr(cls, f"{name}_renamed", vars(cls)[name])
        stack.callback(delattr, cls, f"{name}_renamed")
        delattr(cls, name)
    annotations = vars(cls).get("__annotations__", {})
    if name in annotations:
        stack.callback(annotations.__setitem__, name, annotations.pop(name))


def _renamed(code: CodeType, name: str) -> CodeType:
    other = f"{name}_renamed"
    constants = tuple(
        _renamed(each, name) if isinstance(each, CodeType) else other if each == name else each
        for each in code.co_consts
    )
    return code.replace(
        co_names=tuple(other if each == name else each for each in code.co_names), co_consts=constants
    )
