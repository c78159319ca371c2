"""sd_notify: what is said when, and to a plain datagram socket that stands for the service manager."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from lastcall.supervisor.views.sd_notify import (
    EXTEND_EVERY,
    EXTENSION,
    STATUS_EVERY,
    Notifications,
    NotifySocket,
    Snapshot,
)
from tests.support.harness import AGENT, START, Run, StartRun
from tests.support.program import DEAF, Program, polite

UP = Snapshot(is_ready=True, text="running")


def test_ready_is_said_once() -> None:
    """Not before the workers have registered, and not again when a snapshot changes otherwise."""
    notifications = Notifications()
    assert notifications.due(Snapshot(text="starting"), 1.0) == ["STATUS=starting"]
    assert notifications.due(UP, 2.0) == ["READY=1", "STATUS=running"]
    assert notifications.due(UP, 3.0) == []
    assert notifications.due_at() is None


def test_reload_is_one_datagram_with_its_time() -> None:
    """RELOADING=1 and MONOTONIC_USEC together, READY=1 when it is over."""
    notifications = Notifications()
    notifications.due(UP, 1.0)
    assert notifications.due(Snapshot(is_ready=True, is_reloading=True, text="running"), 2.5) == [
        "RELOADING=1",
        "MONOTONIC_USEC=2500000",
    ]
    assert notifications.due(UP, 4.0) == ["READY=1"]


def test_a_stop_ends_a_reload() -> None:
    """STOPPING=1 once, and no READY=1 after it."""
    notifications = Notifications()
    notifications.due(Snapshot(is_ready=True, is_reloading=True, text="t"), 1.0)
    stopping = Snapshot(is_ready=True, text="t", end_at=100.0)
    assert notifications.due(stopping, 2.0) == ["STOPPING=1", "STATUS=t, 98 s left"]
    assert notifications.due(stopping, 2.1) == []


def test_extensions_reach_no_further_than_grace() -> None:
    """Said again in time while jobs live, each ending before grace does; none when no job is left."""
    notifications = Notifications()
    at, said = 10.0, []
    busy = Snapshot(is_busy=True, text="draining", end_at=10.0 + 2.5 * EXTENSION)
    while at < 10.0 + 3 * EXTENSION:
        for line in notifications.due(busy, at):
            if line.startswith("EXTEND"):
                said.append((at, int(line.partition("=")[2]) / 1e6))
        due = notifications.due_at()
        assert due is not None and due > at
        at = due
    assert busy.end_at is not None
    covered = said[0][0]
    for when, length in said:
        assert when <= covered and when + length <= busy.end_at + 1e-6
        covered = max(covered, when + length)
    assert covered == pytest.approx(busy.end_at)
    idle = Snapshot(text="closing", end_at=busy.end_at)
    assert not any("EXTEND" in line for line in notifications.due(idle, 10.0 + EXTEND_EVERY))


def test_a_start_is_extended_until_it_is_due() -> None:
    """Said again in time while workers start, never beyond their time. A stop does not wait for its turn."""
    notifications = Notifications()
    starting = Snapshot(text="starting", up_at=10.0 + 1.5 * EXTENSION)
    due: float | None = 10.0
    at = covered = 10.0
    while due is not None:
        at = due
        assert at <= covered
        usec = [line for line in notifications.due(starting, at) if line.startswith("EXTEND_TIMEOUT_USEC=")]
        covered = max([covered, *(at + int(line.partition("=")[2]) / 1e6 for line in usec)])
        due = notifications.due_at()
    assert starting.up_at is not None and covered == pytest.approx(starting.up_at)
    assert notifications.due_at() is None
    assert notifications.due(UP, covered) == ["READY=1", "STATUS=running"]

    notifications = Notifications()
    notifications.due(starting, 10.0)
    stopping = Snapshot(text="t", is_busy=True, end_at=20.0, up_at=starting.up_at)
    assert notifications.due(stopping, 11.0)[:2] == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=9000000"]


def test_a_reload_is_extended_while_its_workers_start() -> None:
    """The timer of a reload is that of a start, and a reload of many workers takes longer than one start."""
    notifications = Notifications()
    assert not notifications.due(UP, 1.0)[0].startswith("EXTEND")
    reloading = Snapshot(is_ready=True, is_reloading=True, up_at=130.0, text="running")
    lines = notifications.due(reloading, 10.0)
    assert lines == ["RELOADING=1", "MONOTONIC_USEC=10000000", "EXTEND_TIMEOUT_USEC=60000000"]
    assert notifications.due_at() == 10.0 + EXTEND_EVERY


def test_seconds_left_are_said_now_and_then() -> None:
    """In a stop the status is renewed although nothing else has changed."""
    notifications = Notifications()
    snapshot = Snapshot(text="draining: 1 job", end_at=100.0)
    assert notifications.due(snapshot, 10.0)[-1] == "STATUS=draining: 1 job, 90 s left"
    assert notifications.due(snapshot, 10.0 + STATUS_EVERY) == ["STATUS=draining: 1 job, 85 s left"]


def test_watchdog_is_fed_twice_in_its_time() -> None:
    """At once, then at half of what the service manager allows."""
    notifications = Notifications(watchdog=3.0)
    assert "WATCHDOG=1" in notifications.due(UP, 10.0)
    assert notifications.due_at() == 11.5
    assert notifications.due(UP, 11.0) == []
    assert notifications.due(UP, 11.5) == ["WATCHDOG=1"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_is_ours_or_nobodys(environment: dict[str, str], expected: float | None) -> None:
    """Only a watchdog meant for this process is fed; nonsense is none."""
    assert NotifySocket({"NOTIFY_SOCKET": "/run/x", **environment}, 7).watchdog == expected


@pytest.mark.parametrize("name", ["", "@", "vsock:2:1234", "relative"])
def test_no_service_manager(name: str) -> None:
    """No address, or one that is no unix socket: nothing is sent and nothing fails."""
    manager = NotifySocket({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000"}, 7)
    assert not manager.is_there and manager.watchdog is None
    manager.tell(["READY=1"])
    manager.close()


@pytest.mark.parametrize("is_abstract", [False, True])
def test_addresses(tmp_path: Path, is_abstract: bool) -> None:
    """A path or an abstract name; a listener that went away is no error, one that is full neither."""
    name = f"@lastcall-{os.getpid()}" if is_abstract else str(tmp_path / "n")
    manager = NotifySocket({"NOTIFY_SOCKET": name}, 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if is_abstract else name)
        listener.settimeout(5)
        manager.tell(["READY=1", "STATUS=up"])
        assert listener.recv(100) == b"READY=1\nSTATUS=up"
        for _ in range(2000):
            manager.tell(["STATUS=" + "x" * 1000])
    manager.tell(["STATUS=nobody hears"])
    manager.close()


class Listener:
    """The service manager's socket, and all that was said to it."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(str(path))
        self.environment = {"NOTIFY_SOCKET": str(path)}
        self._datagrams: list[list[str]] = []

    def datagrams(self) -> list[list[str]]:
        while True:
            try:
                self._datagrams.append(self.socket.recv(1 << 16).decode().split("\n"))
            except BlockingIOError:
                return self._datagrams

    def lines(self) -> list[str]:
        return [line for datagram in self.datagrams() for line in datagram]

    def said(self, start: str) -> list[str]:
        return [line for line in self.lines() if line.startswith(start)]


@pytest.fixture
def listener(tmp_path: Path) -> Any:
    listener = Listener(tmp_path / "notify")
    yield listener
    listener.socket.close()


SHOW = """
import json, os, sys, time
print(json.dumps(sorted(os.environ)), flush=True)
time.sleep(600)
"""


async def test_life_of_a_service(run: StartRun, listener: Listener) -> None:
    """READY, then STOPPING with its extension within grace, statuses with the seconds left; in that order."""
    r: Run = await run("run", "--grace", "20", *polite(1.0), livekit=False, environment=listener.environment)
    await r.until(lambda: "up" in r.out.read_text())
    await r.until(lambda: listener.said("READY=1"))
    r.kill()
    assert await r.exit() == 0
    lines = listener.lines()
    assert lines.count("READY=1") == lines.count("STOPPING=1") == 1
    assert lines.index("READY=1") < lines.index("STOPPING=1")
    (extension, *_) = listener.said("EXTEND_TIMEOUT_USEC=")
    assert 15 < int(extension.partition("=")[2]) / 1e6 <= 20
    assert "STATUS=running: 1 of 1 worker accepting, 0 jobs" in lines
    assert any(line.startswith("STATUS=draining: 0 jobs, ") for line in lines)
    assert not listener.said("WATCHDOG")


async def test_the_watchdog_starves_with_the_loop(run: StartRun, listener: Listener) -> None:
    """Fed while the supervisor supervises, and still fed while it drains; a stopped process feeds nobody."""
    r: Run = await run(
        *("run", "--grace", "6", "--", sys.executable, "-c", DEAF),
        livekit=False,
        environment={**listener.environment, "WATCHDOG_USEC": "400000"},
    )
    await r.until(lambda: len(listener.said("WATCHDOG=1")) >= 5)
    r.kill()
    await r.until(lambda: listener.said("STOPPING=1"))
    fed = len(listener.said("WATCHDOG=1"))
    await r.until(lambda: len(listener.said("WATCHDOG=1")) >= fed + 3)
    assert await r.exit() == 75


async def test_children_are_not_told_the_address(run: StartRun, listener: Listener) -> None:
    """No variable of the protocol reaches a worker, which would answer in the supervisor's name."""
    r: Run = await run(
        *("run", "--", sys.executable, "-c", SHOW),
        livekit=False,
        environment={
            **listener.environment,
            **dict.fromkeys(("WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"), "1"),
            "WATCHDOG_USEC": "1000000",
        },
    )
    await r.until(lambda: r.out.read_text().endswith("]\n"))
    assert not [name for name in ("NOTIFY_SOCKET", "WATCHDOG", "LISTEN_") if f'"{name}' in r.out.read_text()]
    r.kill()
    assert await r.exit() == 0


async def test_failed_reload_is_in_the_status(run: StartRun, program: Program, listener: Listener) -> None:
    """READY=1 ends a reload that has failed as well: the STATUS says why, and since when, until one works."""
    # On a busy machine it takes seconds until the broken program has read that it is to fail.
    program.config.write_text("[reload]\nsettle = 5\n")
    r: Run = await run("run", *program.arguments, livekit=False, environment=listener.environment)
    await r.until(lambda: listener.said("READY=1") and "up 1" in r.out.read_text())
    program.write("broken")
    r.kill(signal.SIGHUP)
    await r.until(lambda: len(listener.said("READY=1")) == 2)
    (failed,) = [lines for lines in listener.datagrams() if "READY=1" in lines][1:]
    (status,) = [line for line in failed if line.startswith("STATUS=")]
    assert "; reload failing since 2" in status and "the old program keeps serving" in status
    r.kill(signal.SIGHUP)
    await r.until(lambda: len(listener.said("READY=1")) == 3)
    since = status.partition("since ")[2].partition(": ")[0]
    assert since in listener.said("STATUS=")[-1]
    program.write("2")
    r.kill(signal.SIGHUP)
    await r.until(lambda: len(listener.said("READY=1")) == 4)
    await r.until(lambda: listener.said("STATUS=")[-1] == "STATUS=running: 1 of 1 worker accepting, 0 jobs")
    r.kill()
    assert await r.exit() == 0


async def test_ready_waits_for_every_worker(run: StartRun, listener: Listener) -> None:
    """READY=1 comes when both workers have registered; the drain's status counts the jobs."""
    r: Run = await run("run", "-w", "2", "--grace", "40", AGENT, environment=listener.environment)
    await r.ready(1)
    await r.until(lambda: listener.said("READY=1"), 40)
    assert len(r.events("registered")) == 2
    job = await r.dispatch(sleep=2)
    await r.job_says(job.job_id, "started")
    await r.until(lambda: "STATUS=running: 2 of 2 workers accepting, 1 job" in listener.lines())
    r.kill()
    assert await r.exit() == 0
    assert listener.said("STATUS=draining: 1 job, ")
    # The last one: those before were for the start.
    assert 30 < int(listener.said("EXTEND_TIMEOUT_USEC=")[-1].partition("=")[2]) / 1e6 <= 40
    await r.clean(job)


async def test_stop_before_ready(run: StartRun, listener: Listener) -> None:
    """A service that is stopped while it starts says STOPPING and never READY; the start was extended."""
    r: Run = await run("run", AGENT, environment={**listener.environment, "LIVEKIT_URL": "ws://127.0.0.1:9"})
    await r.until(lambda: r.log("slot starting"), START)
    await r.until(lambda: listener.said("EXTEND_TIMEOUT_USEC="))
    # Again every ten seconds, for as long as it takes to make the image.
    assert set(listener.said("EXTEND_TIMEOUT_USEC=")) == {"EXTEND_TIMEOUT_USEC=60000000"}
    r.kill()
    assert await r.exit() == 0
    assert "STOPPING=1" in listener.lines() and "READY=1" not in listener.lines()
