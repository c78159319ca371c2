"""Every private name that lastcall touches, on the installed livekit-agents."""

from __future__ import annotations

import asyncio
import multiprocessing.popen_forkserver
import multiprocessing.process
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from livekit.agents import AgentServer, JobRequest, WorkerOptions, cli
from livekit.protocol import agent

from lastcall.worker.base.errors import Incompatible
from lastcall.worker.sdk import agent_server, child_processes, preflight
from lastcall.worker.sdk.names import LIVEKIT, SERVER, PrivateName
from tests.agents.calls import entrypoint

pytestmark = pytest.mark.core


def server() -> AgentServer:
    made = AgentServer()
    made.rtc_session(entrypoint)
    return made


def test_names_are_there() -> None:
    """Every private name that a stop needs exists before the server runs. The error names a missing one."""
    assert preflight.check() == []
    made = server()
    nope = PrivateName(owner=SERVER, name="_nope", kind="attribute", needed_by="the fence")
    missing = rf"livekit-agents {preflight.version_of(LIVEKIT)} has no AgentServer._nope$"
    assert [lack.name for lack in preflight.lacks([nope])] == [nope]
    assert re.match(missing, preflight.Lack(name=nope).text)
    del made._draining
    with pytest.raises(Incompatible, match=r"has no AgentServer\._draining, which the fence needs"):
        preflight.check_running(made)


def test_what_is_a_server() -> None:
    """WorkerOptions become a server with an entrypoint; a bare function is no server."""
    options = WorkerOptions(entrypoint_fnc=entrypoint)
    made = agent_server.as_server(options)
    assert isinstance(made, AgentServer) and agent_server.has_entrypoint(made)
    assert not agent_server.has_entrypoint(AgentServer())
    assert agent_server.as_server(entrypoint) is None
    assert agent_server.agent_name(server()) == ""


def test_ports_are_private() -> None:
    """The server's own HTTP port is a free one of the loopback interface."""
    made = server()
    agent_server.use_private_ports(made)
    assert (made._port, made._host) == (0, "127.0.0.1")


def test_run_app_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both places from which user code can import it."""
    from livekit.agents.cli import cli as module

    monkeypatch.setattr(cli, "run_app", cli.run_app)
    monkeypatch.setattr(module, "run_app", getattr(module, "run_app", None), raising=False)
    seen: list[Any] = []

    def record(value: Any) -> Any:
        seen.append(value)

    agent_server.record_run_app(record)
    cli.run_app(server())
    assert len(seen) == 1


class Started:
    """As much of a multiprocessing.Process as a start looks at."""

    def __init__(self, popen: Any) -> None:
        self._popen = popen


class Child:
    """A real process with the attributes of a multiprocessing Popen."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid
        self.returncode: int | None = None
        self.sentinel, write = os.pipe()
        self.write: int | None = write

    def close_write(self) -> None:
        if self.write is not None:
            os.close(self.write)
            self.write = None


@contextmanager
def child() -> Iterator[Child]:
    with subprocess.Popen(["sleep", "60"]) as process:
        made = Child(process)
        try:
            yield made
        finally:
            process.kill()
            made.close_write()
            os.close(made.sentinel)


def test_poll_is_locked_once() -> None:
    """Patching twice leaves one lock; before its process ends a poll says None."""
    child_processes.lock_process_poll()
    popen_class: Any = multiprocessing.popen_forkserver.Popen
    first = popen_class.poll
    child_processes.lock_process_poll()
    assert popen_class.poll is first
    with child() as popen:
        assert first(popen) is None
        popen.returncode = 7
        assert first(popen) == 7


def test_end_of_file_is_no_end_of_a_process() -> None:
    """Where the forkserver is gone the process itself is waited for; only its status is lost."""
    child_processes.lock_process_poll()
    poll: Any = multiprocessing.popen_forkserver.Popen.poll
    with child() as popen:
        assert poll(popen) is None
        popen.close_write()
        assert poll(popen) is None and popen.returncode is None
        popen.process.kill()
        popen.process.wait()
        assert poll(popen, 0) == child_processes.STATUS_LOST


def test_start_while_another_process_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`close` in another thread has taken the Popen of a child away, and the child is in the set yet."""
    process: Any = multiprocessing.process
    monkeypatch.setattr(process, "_cleanup", process._cleanup)
    child_processes.start_while_others_end()
    made = [
        Started(popen)
        for popen in (None, *(SimpleNamespace(poll=lambda code=code: code) for code in (0, None)))
    ]
    monkeypatch.setattr(process, "_children", set(made))
    process._cleanup()
    assert process._children == {made[0], made[2]}


def test_process_whose_call_was_over_counts_as_good() -> None:
    """Its exit code is read as 0, however it ends, and the true one is kept; a thread has none."""
    child_processes.lock_process_poll()
    poll: Any = multiprocessing.popen_forkserver.Popen.poll
    with child() as popen:
        executor = SimpleNamespace(_proc=SimpleNamespace(_popen=popen))
        assert agent_server.call_is_over(executor) is popen
        assert poll(popen) is None
        popen.returncode = -9
        assert (poll(popen), popen.returncode) == (0, -9)
    assert agent_server.call_is_over(SimpleNamespace()) is None


@pytest.mark.parametrize("admitted", ["yes", "no", "never"])
async def test_the_gate(admitted: agent_server.Answer) -> None:
    """It lets the loop turn before it decides; a refusal is a no of its kind, an accept is settled."""
    made = server()
    turns: list[int] = []
    seen: list[Any] = []

    def admit(job: Any, _found: object) -> agent_server.Answer:
        seen.append(("admit", job.id, len(turns)))
        return admitted

    agent_server.gate_requests(made, admit=admit, settle=lambda id, error: seen.append(("settle", id, error)))

    async def accept(_arguments: Any) -> None:
        seen.append("accept")

    async def reject(terminate: bool) -> None:
        seen.append(("reject", terminate))

    offer = JobRequest(job=agent.Job(id="AJ_1"), on_accept=accept, on_reject=reject)

    async def count() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    request: Any = made._request_fnc
    await request(offer)
    counting.cancel()
    assert seen[0][:2] == ("admit", "AJ_1") and seen[0][2] >= 4
    assert seen[1:] == (
        ["accept", ("settle", "AJ_1", None)] if admitted == "yes" else [("reject", admitted == "never")]
    )


def test_announce_before_the_start_is_harmless() -> None:
    """A fence that comes before the server runs only sets the flag."""
    made = server()
    asyncio.run(agent_server.announce(made, full=True))
    assert made._draining is True
    assert agent_server.executors(made) == [] and not agent_server.is_connected(made)
