"""Looks for the private names of `names` before anything is done that needs them.

Three looks, all before the worker registers, so that no caller waits for a worker that can't be stopped:

    the packages are imported    every name; an attribute of objects in the code of their class
    the target is loaded         the same: a target may have replaced parts of livekit-agents
    `worker_started`             the attributes of the server and of its pool, on the objects themselves

The objects of a server exist only while it runs (`_proc_pool` is assigned in `run()`). So an attribute counts
as there when code of its class assigns it.
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, FunctionType
from typing import Any  # Any: classes, functions and objects of the packages that are looked at

from lastcall.worker.base.errors import Incompatible
from lastcall.worker.sdk.names import INWORLD, LIVEKIT, NAMES, PLUGIN, POOL, PYTHON, SERVER, PrivateName

STORE_ATTR, EXTENDED_ARG = dis.opmap["STORE_ATTR"], dis.opmap["EXTENDED_ARG"]


# The newest versions that the tests of the image were run with: major and minor number.
TRIED_UNTIL = {PYTHON: (3, 14), LIVEKIT: (1, 8)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """A private name that the installed version lacks, or has in another form."""

    name: PrivateName
    is_changed: bool = False

    @property
    def text(self) -> str:
        """One line that says which name is not there."""
        name = self.name
        has = f"has {name.text}, but not as {name.signature}" if self.is_changed else f"has no {name.text}"
        return f"{name.package} {version_of(name.package)} {has}"


def check() -> list[Lack]:
    """Look for every name; return those that a stop can do without. Raises Incompatible for any other."""
    return _judged(lacks())


def check_running(server: Any) -> None:
    """Look for the names of a started server, and of its pool. Raises Incompatible as `check` does."""
    found = []
    pool = getattr(server, "_proc_pool", None)
    for name in expected(NAMES):
        thing = {SERVER: server, POOL: pool}.get(name.owner)
        if thing is not None and name.kind in ("attribute", "method") and not hasattr(thing, name.name):
            found.append(Lack(name=name))
    _judged(found)


def _judged(found: list[Lack]) -> list[Lack]:
    for lack in found:
        if not lack.name.without:
            older = f"use an older {lack.name.package}, or a newer lastcall"
            raise Incompatible(f"{lack.text}, which {lack.name.needed_by} needs: {older}")
    return found


def lacks(names: Iterable[PrivateName] = NAMES) -> list[Lack]:
    """Return the names that the installed versions lack. Raises Incompatible without a livekit-agents.

    The Inworld plugin is looked at only where something has imported it.
    """
    try:
        importlib.import_module("livekit.agents")
    except ImportError as error:
        raise Incompatible(
            f"livekit-agents can't be imported ({error}): install lastcall into the agent's environment"
        ) from None
    found = []
    attributes = functools.cache(attributes_of)
    for name in expected(names):
        if name.package == INWORLD and PLUGIN not in sys.modules:
            continue
        owner = _owner(name)
        if not _is_there(name, owner, attributes):
            found.append(Lack(name=name))
        elif not _fits(name, owner):
            found.append(Lack(name=name, is_changed=True))
    return found


def expected(names: Iterable[PrivateName]) -> list[PrivateName]:
    """Return the names that the installed versions should have."""
    return [name for name in names if _is_expected(name)]


def _is_expected(name: PrivateName) -> bool:
    installed = _numbers(version_of(name.package))
    return not (
        (name.since and installed < _numbers(name.since))
        or (name.until and installed >= _numbers(name.until))
    )


@functools.cache
def version_of(package: str) -> str:
    """Return the installed version; "" where there is none."""
    if package == PYTHON:
        return ".".join(map(str, sys.version_info[:3]))
    if package == LIVEKIT:
        return str(getattr(sys.modules.get("livekit.agents"), "__version__", ""))
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def untried() -> str:
    """Say which version is newer than those that an image was tried with; empty if none is.

    An image depends on what an import leaves in the process, which no name tells.
    """
    for package, last in TRIED_UNTIL.items():
        if _numbers(version_of(package))[:2] > last:
            tried = ".".join(map(str, last))
            return f"{package} {version_of(package)} is newer than {tried}, the last that was tried"
    return ""


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def _owner(name: PrivateName) -> Any:
    """Return the module or the class; None where there is none."""
    module, _, owner = name.owner.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    return getattr(found, owner, None) if owner else found


def _is_there(name: PrivateName, owner: Any, attributes: Any) -> bool:
    if owner is None:
        return False
    if name.kind == "attribute":
        return name.name in attributes(owner)
    if name.kind == "event":
        return any(name.name in code.co_consts for code in _codes(owner))
    return hasattr(owner, name.name)


def _fits(name: PrivateName, owner: Any) -> bool:
    """Tell whether a function can be called as lastcall calls it; True for what has no signature."""
    if not name.signature:
        return True
    function = getattr(owner, name.name)
    asynchronous, _, listed = name.signature.rpartition("(")
    words = [word for word in listed.rstrip(")").split(", ") if word]
    keywords = {word.rstrip("="): None for word in words if word.endswith("=")}
    try:
        inspect.signature(function).bind(*words[: len(words) - len(keywords)], **keywords)
    except (TypeError, ValueError):
        return False
    return not asynchronous or inspect.iscoroutinefunction(inspect.unwrap(function))


# -- what a class's code says ------------------------------------------------------------------------------


def attributes_of(cls: type) -> frozenset[str]:
    """Return the attributes of a class, and those that its code assigns to objects."""
    found: set[str] = set()
    for each in cls.__mro__:
        found.update(vars(each))
        found.update(vars(each).get("__annotations__", ()))
    for code in _codes(cls):
        found.update(_assigned(code))
    return frozenset(found)


def _codes(cls: type) -> Iterator[CodeType]:
    """Yield the code of every method and property of a class and its bases, inner functions included."""
    for each in cls.__mro__:
        for member in list(vars(each).values()):
            functions = (getattr(member, part, None) for part in ("fget", "fset", "__func__"))
            for function in (member, *functions):
                inner = inspect.unwrap(function) if callable(function) else function
                if isinstance(inner, FunctionType):
                    yield from _within(inner.__code__)


def _within(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _within(constant)


def _assigned(code: CodeType) -> Iterator[str]:
    """Yield the attributes that a code assigns. Not by `dis`, which takes 20 times as long."""
    high = 0
    for operation, low in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        argument = high << 8 | low
        if operation == STORE_ATTR:
            yield code.co_names[argument]
        high = argument if operation == EXTENDED_ARG else 0
