"""The stop of a worker as its host runs it, over a real control channel, with an engine that is faked."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY

from lastcall.supervisor.processes.worker_channel import Channel
from lastcall.worker import orphan_output
from lastcall.worker.base.budget import Shares
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.base.stopping import Stopping
from lastcall.worker.base.wire import (
    OF_WORKER,
    AskMetrics,
    Beat,
    Counts,
    Drain,
    Drained,
    Fence,
    Fenced,
    Hold,
    MetricsText,
    Resource,
    Terminate,
    WorkerHears,
    WorkerSays,
)
from lastcall.worker.engine import Engine
from lastcall.worker.host import Host
from lastcall.worker.orphan_output import OrphanOutput, peer_pid
from tests.support.hearing import last_of

PATIENCE = 20.0
SETTINGS = WorkerSettings(grace=60.0, shares=Shares(close=10.0), beat=30.0)


class Jobs(list[str]):
    """Jobs that run, and how many were cut."""

    cut = 0


class FakeMemoryWatch:
    """A look at the memory of jobs that finds nothing."""

    async def run(self) -> None:
        await asyncio.Event().wait()


class FakeHandovers:
    """Handovers of an engine that hands nothing over."""

    def hear(self, job_id: str, message: object) -> None:
        pass

    def due_at(self, job_id: str) -> float:
        return 0.0

    def tell_keeps(self) -> None:
        pass


@dataclass
class FakeEngine:
    """An engine that runs nothing, and notes what it is told."""

    jobs: Jobs
    changed: Condition
    ended: bool = False
    is_lost: bool = False
    is_registered: bool = True
    accepts: bool = True
    is_warm: bool = True
    full_because: str | None = None
    load: float = float("nan")
    error: BaseException | None = None
    is_fenced: bool = False
    hangs: bool = False
    ends: list[tuple[float, float]] = field(default_factory=list)
    memory: FakeMemoryWatch = field(default_factory=FakeMemoryWatch)
    terminations: FakeMemoryWatch = field(default_factory=FakeMemoryWatch)
    handovers: FakeHandovers = field(default_factory=FakeHandovers)

    async def run(self) -> None:
        await self.changed.until(lambda: self.ended)

    async def keep_told(self) -> None:
        await asyncio.Event().wait()

    async def see_processes_out(self) -> None:
        await asyncio.Event().wait()

    async def fence(self) -> None:
        self.is_fenced = True

    def hand_over_before(
        self, drain_at: Callable[[], float | None], late_at: Callable[[], float | None]
    ) -> None:
        pass

    async def end_jobs(self, kill_at: float, give_up_at: float, due_at: Callable[[str], float]) -> None:
        self.ends.append((kill_at, give_up_at))
        self.jobs.cut += len(self.jobs)
        self.jobs.clear()

    async def close(self, deadline: float) -> Counts:
        if self.hangs:
            await asyncio.Event().wait()
        self.ended = True
        self.changed.notify()
        return {}


@dataclass
class Pair:
    """A host that runs, and the supervisor's end of the control channel."""

    engine: FakeEngine
    running: asyncio.Task[int]
    channel: Channel[WorkerHears, WorkerSays]
    heard: list[WorkerSays]
    changed: Condition

    async def hears(self, kind: type[Any]) -> Any:  # the message of that class; no narrower type fits all
        return await last_of(kind, self.heard, self.changed, patience=PATIENCE)

    async def ends(self) -> int:
        async with asyncio.timeout(PATIENCE):
            return await self.running


@asynccontextmanager
async def pair(*jobs: str, settings: WorkerSettings = SETTINGS) -> AsyncIterator[Pair]:
    ours, theirs = socket.socketpair()
    changed, heard_changed = Condition(), Condition()
    host = Host(replace(settings, control_fd=theirs.detach()), Stopping(changed), changed)
    engine = FakeEngine(jobs=Jobs(jobs), changed=changed)
    host.engine = cast(Engine, engine)
    host.resources.join("livekit", engine.close)
    heard: list[WorkerSays] = []

    def on_message(message: WorkerSays) -> None:
        heard.append(message)
        heard_changed.notify()

    running = asyncio.create_task(host._run())
    channel: Channel[WorkerHears, WorkerSays] = await Channel.open(
        ours, OF_WORKER, on_message, lambda _: heard_changed.notify()
    )
    try:
        yield Pair(engine=engine, running=running, channel=channel, heard=heard, changed=heard_changed)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        channel.close()
        await asyncio.sleep(0)


async def test_the_stop_over_the_wire() -> None:
    """Fence, and a drain that ends when the last job does: fenced, drained, the connection closed, exit 0."""
    async with pair("AJ_1") as p:
        before = now()
        p.channel.say(Fence(reason="SIGTERM"))
        p.channel.say(Drain(drain_at=now() + 600, close_at=now() + 610))
        fenced = await p.hears(Fenced)
        assert fenced.reason == "SIGTERM" and before <= fenced.at <= now()
        assert p.engine.is_fenced and not any(isinstance(message, Drained) for message in p.heard)
        p.engine.jobs.clear()
        p.engine.changed.notify()
        await p.hears(Drained)
        assert await p.hears(Resource) == Resource(name="livekit", fate="closed", counts={})
        assert await p.ends() == Exit.CLEAN
        assert p.engine.ends == []


async def test_deadlines_that_move_over_the_wire() -> None:
    """An earlier time ends the drain at once; the jobs have what the close has, and no more."""
    async with pair("AJ_1") as p:
        p.channel.say(Fence(reason="SIGTERM"))
        p.channel.say(Drain(drain_at=now() + 600, close_at=now() + 610))
        await p.hears(Fenced)
        close_at = now() + 10
        p.channel.say(Drain(drain_at=now(), close_at=close_at))
        assert await p.ends() == Exit.FORCED
        ((kill_at, give_up_at),) = p.engine.ends
        assert give_up_at <= close_at and give_up_at - 5 <= kill_at < give_up_at


async def test_terminate_over_the_wire() -> None:
    """Nothing is waited for: jobs are killed now, and a drain that is said later changes nothing."""
    async with pair("AJ_1") as p:
        p.channel.say(Terminate())
        p.channel.say(Drain(drain_at=now() + 600, close_at=now() + 610))
        assert await p.ends() == Exit.FORCED
        ((kill_at, give_up_at),) = p.engine.ends
        assert max(kill_at, give_up_at) <= now()


async def test_a_close_that_is_given_up_keeps_no_worker() -> None:
    """The server would run on for ever: the worker ends all the same, and says that the close was forced."""
    async with pair(settings=replace(SETTINGS, beat=0.01)) as p:
        p.engine.hangs = True
        await p.hears(Beat)
        p.channel.say(Terminate())
        assert await p.ends() == Exit.FORCED
        assert (await p.hears(Resource)).fate == "forced" and not p.engine.ended


@pytest.mark.parametrize("was_told", [False, True])
async def test_a_lost_supervisor_begins_the_stop(was_told: bool) -> None:
    """End of file: the worker stops by itself, by the deadlines that it was told, or by its settings."""
    settings = WorkerSettings(grace=0.4, shares=Shares(close=0.2), beat=30.0)
    async with pair("AJ_1", settings=settings) as p:
        if was_told:
            p.channel.say(Drain(drain_at=now() + 0.1, close_at=now() + 30))
            await asyncio.sleep(0)
        lost_at = now()
        p.channel.close()
        assert await p.ends() == Exit.FORCED
        ((kill_at, give_up_at),) = p.engine.ends
        assert p.engine.is_fenced and kill_at < give_up_at
        if was_told:
            assert lost_at + 1 < give_up_at <= lost_at + 30 + 0.2
        else:
            drain_at = settings.plan(lost_at).drain_at
            assert drain_at <= now() and give_up_at <= settings.plan(now()).close_at


async def test_a_lost_supervisor_after_a_close_of_every_descriptor() -> None:
    """Code that has closed the channel may have closed the output's pipes too: the worker stops."""
    read, write = os.pipe()
    os.close(write)
    async with pair(settings=replace(SETTINGS, output_fds=(read,))) as p:
        await asyncio.sleep(0)
        os.close(read)
        p.channel.close()
        assert await p.ends() == Exit.CLEAN


def waiting(fd: int) -> int:
    """Return how many bytes of a pipe are unread."""
    (count,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(count)


async def test_output_is_left_to_a_supervisor_that_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is cut off reads its output only once the supervisor is gone, and never another file."""
    monkeypatch.setattr(orphan_output, "LOOK_AGAIN_AFTER", 0.01)
    monkeypatch.setattr(os, "pidfd_open", lambda _pid: os.open(os.devnull, os.O_RDONLY))
    near, far = socket.socketpair()
    assert peer_pid(near) == peer_pid(far) == os.getpid()
    pipes = [os.pipe() for _ in range(3)]
    (own, write), (reused, _), (stranger, write_stranger) = pipes
    output = OrphanOutput((own, reused), os.getppid())
    os.dup2(stranger, reused)
    os.write(write, b"line\n")
    os.write(write_stranger, b"line\n")
    output.watch()
    await asyncio.sleep(0.1)  # some looks
    assert waiting(own) == waiting(stranger) == 5
    monkeypatch.setattr(os, "getppid", lambda: 1)
    async with asyncio.timeout(PATIENCE):
        while waiting(own):
            await asyncio.sleep(0.01)
    assert waiting(stranger) == 5
    for fd in (fd for pipe in pipes for fd in pipe):
        os.close(fd)
    near.close()
    far.close()


async def test_what_is_no_number_is_not_said() -> None:
    """A load_fnc may return anything: a beat has a number all the same, and a request is answered."""
    async with pair(settings=replace(SETTINGS, beat=0.01)) as p:
        beat = await p.hears(Beat)
        assert beat.load == 0.0 and beat.rss_bytes > 0 and beat.accepting
        p.channel.say(AskMetrics(id=7))
        assert (await p.hears(MetricsText)).id == 7


class Broken:
    """A collector of an agent that raises, as a gauge whose function divides by zero."""

    def collect(self) -> Iterator[Any]:
        raise ZeroDivisionError
        yield

    def describe(self) -> list[Any]:
        return []


async def test_metrics_that_can_not_be_read(caplog: pytest.LogCaptureFixture) -> None:
    """A collector of the agent's that raises costs the metrics, told once, and not the control channel."""
    broken: Any = Broken()
    REGISTRY.register(broken)
    try:
        async with pair() as p:
            at = now() + PATIENCE
            for number in (1, 2):
                p.channel.say(AskMetrics(id=number))
                assert await p.changed.until(
                    lambda number=number: MetricsText(id=number, text="") in p.heard,  # type: ignore[misc]
                    lambda: at,
                )
            told = [record for record in caplog.records if "metrics" in record.message]
            assert len(told) == 1 and told[0].exc_info
            assert not p.running.done()
            p.channel.say(Terminate())
            await p.ends()
    finally:
        REGISTRY.unregister(broken)


async def test_a_message_that_can_not_be_followed() -> None:
    """A fault in what follows a message is told, and the next message is followed: on both ends."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with pair() as p:
        engine: Any = p.engine
        engine.hold = None  # calling it raises
        p.channel.say(Hold(on=True))
        p.channel.say(AskMetrics(id=7))
        await p.hears(MetricsText)
        assert [context["message"] for context in told] == ["not followed: Hold"]

        faults = iter([RuntimeError()])
        hear = p.channel._on_message

        def raise_once(message: WorkerSays) -> None:
            for fault in faults:
                raise fault
            hear(message)

        p.channel._on_message = raise_once
        p.channel.say(AskMetrics(id=8))
        p.channel.say(AskMetrics(id=9))
        at = now() + PATIENCE
        assert await p.changed.until(lambda: any(getattr(m, "id", 0) == 9 for m in p.heard), lambda: at)
        assert [context["message"] for context in told] == ["not followed: Hold", "not followed: MetricsText"]
        p.channel.say(Terminate())
        await p.ends()
