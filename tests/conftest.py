"""Fixtures, and the running of async tests."""

from __future__ import annotations

import asyncio
import inspect
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.support import left_out, selection
from tests.support.harness import Run, StartRun
from tests.support.program import Program
from tests.support.terminal import Terminal


def pytest_configure(config: pytest.Config) -> None:
    """Set up the process that runs tests, before any test is imported."""
    config.addinivalue_line(
        "markers", "promtool: rules and queries under promtool, which scripts/fixtures gets"
    )
    config.addinivalue_line("markers", "browser: pages in Debian's Chromium, which scripts/fixtures installs")
    # Undo a nohup, or the `&` of a script, around the tests: a program that a test starts inherits an ignored
    # signal, and SIGHUP or SIGINT from the test would not reach it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # livekit-agents loads its local models into every forkserver, a quarter of a second and 250 MB each, and
    # no agent of the tests uses one. Containers and systemd units of the tests load the models as users' do.
    os.environ["LIVEKIT_AGENTS_PRELOAD_LOCAL_INFERENCE"] = "0"
    # A worker, its image and its broker each load the certificates that they trust. Those of a system take a
    # tenth of the processor time of a start, and no test leaves the machine: one certificate is enough.
    os.environ["SSL_CERT_FILE"] = str(Path(__file__).parent / "support" / "authority.pem")
    selection.watch()
    # Hypothesis fails an example that takes longer than 200 ms, or slow data; beside other tests both happen.
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("beside others", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("beside others")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what can't run here, and mark the rest; `-m` chooses among the marks after that."""
    left_out.leave_out(config, items)
    selection.mark(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail where pytest-xdist makes no groups.

    With pytest 9.2 it gave each process tests of every group, and said nothing: fixtures that a group shares
    were made four times, and long waits came one after another.
    """
    if getattr(session.config.option, "loadgroup", False):
        for item in session.items:
            grouped = item.get_closest_marker("xdist_group")
            assert grouped is None or "@" in item.nodeid, "pytest-xdist makes no groups with this pytest"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Hold a quick test to it."""
    selection.begin(item)
    try:
        yield
    finally:
        selection.end()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out, and how much of the processors was used."""
    left_out.say(terminalreporter)
    own, children = (resource.getrusage(each) for each in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in (own, children))
    terminalreporter.write_line(f"{seconds:.0f} s of CPU, of every process that was waited for")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests in a fresh loop each; `run` is theirs to start supervisors with."""
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function):
        return None
    names = inspect.signature(function).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}

    async def main() -> None:
        async with AsyncExitStack() as stack:
            for name, value in arguments.items():
                if isinstance(value, Starter):
                    arguments[name] = value.bind(stack)
            await function(**arguments)

    asyncio.run(main())
    return True


class Starter:
    """Starts runs that end with the test."""

    def __init__(self, tmp_path: Path) -> None:
        self._tmp_path = tmp_path
        self._count = 0

    def bind(self, stack: AsyncExitStack) -> StartRun:
        async def start(*arguments: str, **options: Any) -> Run:
            self._count += 1
            directory = self._tmp_path / str(self._count)
            directory.mkdir()
            run = Run(directory, *arguments, **options)
            return await stack.enter_async_context(run)

        return start


@pytest.fixture
def run(tmp_path: Path) -> Starter:
    """Start a supervisor by `await run("run", "agent.py", …)`. Every process ends with the test."""
    return Starter(tmp_path)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Return an opaque worker that a test can change."""
    return Program(tmp_path)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """Return a terminal, for `run(…, terminal=terminal)`."""
    made = Terminal()
    yield made
    made.hang_up()
