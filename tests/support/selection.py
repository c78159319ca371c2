"""The markers that no test has to carry by hand: `quick`, and the group of those that one process runs.

Of the processes that run tests side by side, one runs the tests of a group, one after another. pytest-xdist
begins with the largest groups. Two groups have the tests that wait most: `long`, and those of systems and
containers. So their waits lie beside the tests that compute, and no process is left with a long test when the
others are done. Tests that share a fixture of their module are a group too, or each process would make it. So
are those that read the sources, which take a second to parse.

A test is `quick` when it starts no process. That is read from the code of the test and of the helpers that it
uses, and then held while the test runs: a `quick` test that starts a process all the same fails.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

# A test that uses one of these fixtures or names starts processes. The names are of the standard library, of
# tests/support and of what lastcall offers for it.
FIXTURES = {"run", "podman", "machine", "wheel", "installed"}
NAMES = {
    "subprocess",
    "multiprocessing",
    "create_subprocess_exec",
    "fork",
    "Run",
    "Stage",
    "play",
    "trial",
    "Sources",
}
# The group of each test with the marker.
GROUPS = {"long": "long", "systemd": "machines", "container": "machines"}
# Fixtures that are made once for a module.
SHARED = {"wheel", "installed", "browser", "machine", "built"}
# Audit events of CPython that stand for a new process.
EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
_quick: list[str] = []  # the test that runs now, when it is a quick one


def mark(items: list[pytest.Item]) -> None:
    """Mark what starts no process as `quick`, and what one process has to run as a group."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        group = next((name for marker, name in GROUPS.items() if item.get_closest_marker(marker)), "")
        names = names_of(item.function)
        if not group and "nodes_of" in names:
            group = "sources"
        if not starts_processes(item, names):
            item.add_marker("quick")
        if not group and SHARED & set(item.fixturenames):
            group = item.path.stem
        if group:
            item.add_marker(pytest.mark.xdist_group(group))


def starts_processes(item: pytest.Function, names: frozenset[str]) -> bool:
    """Tell whether a test starts processes, by its markers, its fixtures and the names that the code uses."""
    if any(item.get_closest_marker(name) for name in ("lint", "promtool", "browser")) or FIXTURES & set(
        item.fixturenames
    ):
        return True
    return not NAMES.isdisjoint(names)


@functools.cache
def names_of(function: FunctionType) -> frozenset[str]:
    """Return each name in the code of a test, and in what it uses of the tests' own."""
    return frozenset(_names(function, set()))


def _names(thing: Any, seen: set[int]) -> Iterator[str]:  # Any: whatever a module of the tests may hold
    """Yield each name in the code of a function or class, and in what it uses of the tests' own."""
    thing = getattr(thing, "__wrapped__", thing)
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, type):
        for member in vars(thing).values():
            yield from _names(getattr(member, "fget", member), seen)
    if isinstance(thing, FunctionType):
        for name in _names_of_code(thing.__code__):
            yield name
            used = thing.__globals__.get(name)
            if isinstance(used, ModuleType):
                yield used.__name__
            elif getattr(used, "__module__", "").startswith("tests."):
                yield from _names(used, seen)


def _names_of_code(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_of_code(constant)


def watch() -> None:
    """Have a new process fail the quick test that starts it, from now on and for as long as Python runs."""

    def refuse(event: str, _arguments: tuple[object, ...]) -> None:
        if _quick and event in EVENTS:
            raise AssertionError(
                f"{_quick[0]} starts a process ({event}), and was taken for a quick test;"
                f" name what starts it in {os.path.basename(__file__)}"
            )

    sys.addaudithook(refuse)


def begin(item: pytest.Item) -> None:
    """Watch a quick test until `end`."""
    if item.get_closest_marker("quick"):
        _quick.append(item.nodeid)


def end() -> None:
    """Watch no longer."""
    _quick.clear()
