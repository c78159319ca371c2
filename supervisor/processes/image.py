"""The image of one program: a process that has imported what its workers import, and forks them.

    idle ──first worker──► making ──ready──► ready ──ends, is silent──► failed ──pause──► making
                             │                 │                          ▲
                             ├─ ends, late ────│──────────────────────────┘
                             └─ unfit ─► off   └─ close ──► closed

While the image is made for the first time, workers wait for it: a worker that imported by itself meanwhile
would take as long. Whenever else there is no image that is ready, a worker is started by exec.

Starts take turns, and only the one whose turn it is has descriptors open.

An image that does not answer is killed. It can't fork a second worker into a slot when it wakes: nobody gives
GO to a worker of a request that was given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from lastcall.supervisor.errors import SpawnError
from lastcall.supervisor.processes import cgroup, descendants
from lastcall.supervisor.processes.child import Child, high, pipe, spawn
from lastcall.supervisor.processes.output_reader import OutputReader
from lastcall.supervisor.processes.reaper import ExitStatus, Reaper
from lastcall.worker.base.backoff import Backoff
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.image_wire import GO, GO_FD, MAX_BYTES, Answer, Request
from lastcall.worker.base.memory import FIRST_TO_DIE, die_before
from lastcall.worker.base.records import dataclass
from lastcall.worker.base.stopping import SHIELDED
from lastcall.worker.base.variables import MARK

# Seconds for the imports. Ours: they take one or two, and a worker may take as long for the same.
MADE_WITHIN = 60.0
# Seconds for the answer to a request. Ours: a fork takes tens of milliseconds. An image that takes longer is
# of less use than a worker that is started by exec.
ANSWERS_WITHIN = 1.0
# Seconds until an image that has ended is made again, doubling. Ours: imports take two seconds of a
# processor, and those that end again and again should take less than a hundredth of it.
AGAIN_AFTER = 1.0
AGAIN_AFTER_AT_MOST = 300.0
# Packets that are read after the end of an image. Ours: a stop of a thousand workers is far below.
LAST_PACKETS = 64
# The image's number of its channel, as the one of a worker's control channel.
CHANNEL_FD = 3


@dataclass(slots=True, eq=False)
class _Asked:
    """One request: its answer, and what is awaited of it."""

    answer: Answer | None = None
    pidfd: int | None = None


@dataclass(frozen=True, slots=True)
class Forked:
    """A worker that waits: `go` has it begin, `end` has it end. One of them is to be called."""

    child: Child
    _writer: int

    def go(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has been killed meanwhile
            os.write(self._writer, GO)
        os.close(self._writer)

    def end(self) -> None:
        self.child.send(signal.SIGKILL)
        os.close(self._writer)  # after it, or the worker would sometimes end by itself


class Image:
    """The image of one launcher; there is a process from the first turn on.

    `reason` says why workers are started by exec, for good or until the image is made again; empty while it
    is made or in use. `lacks_memory` tells that it has forked no worker yet, because the kernel killed it for
    its memory, or its scout. `left_out` says by package why the image has not imported it. `known_pids` are
    the children that no sweep may touch. `is_stopping` tells whether a stop has begun: no image is made in
    one.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        reaper: Reaper,
        write_output: Callable[[bytes], None],
        write_errors: Callable[[bytes], None],
        known_pids: set[int],
        is_stopping: Callable[[], bool],
        log: Any,
    ) -> None:
        self.reason = ""
        self.left_out: dict[str, str] = {}
        self.is_ready = False
        self.lacks_memory = False
        self._argv = list(argv)
        self._environment = dict(environment)
        self._reaper = reaper
        self._writes = (write_output, write_errors)
        self._known_pids = known_pids
        self._is_stopping = is_stopping
        self._log = log
        # Until the first one is ready, or has failed to be.
        self._is_first = True
        self._is_off = False
        self._is_closed = False
        self._ready_at: float | None = None
        self._oom_kills: int | None = None
        self._child: Child | None = None
        self._channel: socket.socket | None = None
        self._relays: tuple[OutputReader, ...] = ()
        self._numbers = 0
        self._asked: dict[int, _Asked] = {}
        # One for each that waits: two generations of a slot share its condition.
        self._waiters: list[Condition] = []
        self._turn = asyncio.Lock()
        self._again = Backoff(AGAIN_AFTER, AGAIN_AFTER_AT_MOST, jitter=0.1, random=random.Random())
        self._timer: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    @property
    def state(self) -> str:
        if self._is_off or self._is_closed:
            return "off"
        if self.is_ready:
            return "ready"
        if self._is_first:
            return "idle" if self._child is None else "making"
        return "failed" if self._child is None or self.reason else "making"

    @property
    def starts_within(self) -> float:
        """Return the seconds that a start may have to wait for the image."""
        return MADE_WITHIN if self._is_first else 0.0

    # -- what a launcher asks -------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def turn(self, *, changed: Condition, is_wanted: Callable[[], bool]) -> AsyncIterator[None]:
        """Wait until a worker can be forked, or has to be started by exec. Only one start is in the block.

        `changed` is notified when `is_wanted` may have another answer.
        """
        if self._is_first and self._child is None:
            self._make()
        due = now() + MADE_WITHIN
        with self._notified(changed):
            await changed.until(
                lambda: not is_wanted() or self._child is None or not self._is_first, lambda: due
            )
        async with self._turn:  # bounded: each turn takes ANSWERS_WITHIN at most
            yield

    async def fork(
        self,
        settings: str,
        mark: str,
        descriptors: Mapping[int, int],
        on_exit: Callable[[ExitStatus], None],
        *,
        changed: Condition,
        is_wanted: Callable[[], bool],
    ) -> Forked | None:
        """Return a worker that waits for its go, or None if it has to be started by exec.

        To be called in a turn. Raises OSError where the supervisor has no descriptor left.
        """
        if not self.is_ready or not is_wanted():
            return None
        with self._notified(changed):
            return await self._ask(settings, mark, descriptors, on_exit, changed, is_wanted)

    @contextlib.contextmanager
    def _notified(self, changed: Condition) -> Iterator[None]:
        self._waiters.append(changed)
        try:
            yield
        finally:
            self._waiters.remove(changed)

    async def _ask(
        self,
        settings: str,
        mark: str,
        descriptors: Mapping[int, int],
        on_exit: Callable[[ExitStatus], None],
        changed: Condition,
        is_wanted: Callable[[], bool],
    ) -> Forked | None:
        assert self._channel is not None
        self._numbers += 1
        number, asked = self._numbers, _Asked()
        go_read, go_write = pipe()
        self._asked[number] = asked
        given = {**descriptors, GO_FD: go_read}
        request = Request(number=number, settings=settings, mark=mark, numbers=list(given))
        try:
            try:
                socket.send_fds(self._channel, [request.encode()], list(given.values()))
            except OSError as error:
                self._give_up(f"does not read: {error.strerror}")
                return None
            finally:
                os.close(go_read)
            due = now() + ANSWERS_WITHIN
            answered = await changed.until(
                lambda: asked.answer is not None or not self.is_ready or not is_wanted(), lambda: due
            )
            if not answered:
                self._read()  # the answer is there if it was the supervisor that was late
            if not answered and asked.answer is None and self.is_ready:
                self._give_up(f"silent for {ANSWERS_WITHIN:g} s")
            answer = asked.answer
            if answer is None or asked.pidfd is None or not is_wanted():
                if answer is not None and asked.pidfd is None:
                    self._log.warning("image could not fork", reason=answer.error or "no descriptor is left")
                return None
            child = Child(answer.pid, self._reaper, on_exit, pidfd=asked.pidfd)
            asked.pidfd = None
            forked = Forked(child, go_write)
            self.lacks_memory = False
            go_write = -1
            return forked
        finally:
            del self._asked[number]
            if asked.pidfd is not None:
                os.close(asked.pidfd)
            if go_write >= 0:
                os.close(go_write)  # the end of file ends a worker that has been forked all the same

    # -- the process ----------------------------------------------------------------------------------

    def _make(self) -> None:
        self._timer = None
        if self._is_closed or self._is_off or self._is_stopping():
            return
        if not self._reaper.is_subreaper:
            self._turn_off("the supervisor can't adopt processes (PR_SET_CHILD_SUBREAPER)")
            return
        try:
            os.close(os.pidfd_open(os.getpid()))
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EPERM):  # an old kernel; a filter of system calls
                self._turn_off(f"the system has no pidfds (pidfd_open: {error.strerror})")
            else:
                self._fail(None, f"can't be started: {error}")
            return
        self.reason = ""
        theirs: list[int] = []
        ours: list[int] = []
        try:
            null = high(os.open(os.devnull, os.O_RDONLY))
            theirs.append(null)
            out, out_write = pipe()
            ours.append(out)
            theirs.append(out_write)
            err, err_write = pipe()
            ours.append(err)
            theirs.append(err_write)
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            channel = high(near.detach())
            ours.append(channel)
            theirs.append(high(far.detach()))
            self._child = spawn(
                self._argv,
                environment=self._environment,
                descriptors=dict(zip((0, 1, 2, CHANNEL_FD), theirs, strict=True)),
                blocked=SHIELDED,
                reaper=self._reaper,
                on_exit=self._on_exit,
            )
        except (OSError, SpawnError) as error:
            for fd in ours:
                os.close(fd)
            self._fail(None, f"can't be started: {error}")
            return
        finally:
            for fd in theirs:
                os.close(fd)
        # Not by the image itself: the modules that it needs for that may be too much already.
        die_before(FIRST_TO_DIE, self._child.pid)
        self._oom_kills = cgroup.oom_kills()
        self._known_pids.add(self._child.pid)
        self._channel = socket.socket(fileno=channel)
        self._channel.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(channel, self._read)
        self._relays = tuple(
            OutputReader(fd, write) for fd, write in zip((out, err), self._writes, strict=True)
        )
        self._timer = loop.call_later(MADE_WITHIN, self._give_up, f"not ready within {MADE_WITHIN:g} s")
        self._log.info("image starts", pid=self._child.pid)

    def _read(self) -> bool:
        """Take one packet; tell whether there was one."""
        if self._channel is None:
            return False
        try:
            packet, fds, *_ = socket.recv_fds(self._channel, MAX_BYTES, 1)
        except BlockingIOError:
            return False
        except OSError:
            packet, fds = b"", []
        if not packet:  # its end is seen by the pidfd
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            return False
        pidfd = _high_of(fds)  # which no child inherits
        try:
            answer = Answer.decode(packet)
        except (ValueError, TypeError) as error:
            if pidfd is not None:
                os.close(pidfd)
            self._give_up(f"says nonsense: {error}")
            return True
        if answer.ready is not None:
            self._on_ready(answer)
        asked = self._asked.get(answer.number)
        if asked is not None and asked.answer is None:
            asked.answer, asked.pidfd = answer, pidfd
        elif pidfd is not None:  # of a worker that was given up: it gets no GO
            os.close(pidfd)
        self._notify()
        return True

    def _on_ready(self, answer: Answer) -> None:
        if self.reason or self._is_closed:  # it was killed before it said so
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if answer.ready:
            self._turn_off(answer.ready)
            return
        # Of a later image it says nothing new: the workers have imported the target since.
        self.lacks_memory = self._is_first and answer.scout_was_killed and self._kills() > 0
        self.is_ready, self._is_first = True, False
        self._ready_at = now()
        self.left_out = answer.left_out
        self._sweep()
        self._log.info("image ready", pid=self.pid, packages=answer.packages)
        if answer.left_out:
            self._log.warning("image leaves packages out", packages=answer.left_out)

    def _give_up(self, why: str) -> None:
        """Kill the process, because it does not do what it is for. `_on_exit` does the rest.

        A process that can't be killed has no successor, and nobody waits for its end.
        """
        self.is_ready = self._is_first = False
        self.reason = why
        self._log.warning("image is killed", pid=self.pid, reason=why)
        self._kill()
        self._notify()

    def _kill(self) -> None:
        if self._child is not None:
            self._child.send(signal.SIGKILL)
            self._child.send(signal.SIGCONT)

    def _turn_off(self, why: str) -> None:
        """Have no image until a reload: the next one would be no better."""
        self.is_ready = self._is_first = False
        self._is_off, self.reason = True, why
        self._log.warning("workers start without an image", reason=why)
        self._kill()
        self._notify()

    def _on_exit(self, status: ExitStatus) -> None:
        assert self._child is not None
        pid, errors = self._child.pid, self._relays[1]
        self._known_pids.discard(pid)
        for _ in range(LAST_PACKETS):  # of its workers too; and the reason why it was unfit
            if not self._read():
                break
        self._clear()
        self._sweep()
        if self._is_closed or self._is_off or self._is_stopping():
            self._notify()
            return
        words = b"\n".join(errors.last).decode(errors="replace")
        if self._ready_at is not None:
            was_ready_for, self._ready_at = now() - self._ready_at, None
            if was_ready_for > AGAIN_AFTER_AT_MOST:
                self._again.succeed()
            self._fail(pid, self.reason or f"ended: {status}")
        else:
            told = f": {words}" if words else ""
            is_killed = status.signal is signal.SIGKILL and not self.reason
            self.lacks_memory |= self._is_first and is_killed and self._kills() > 0
            self._fail(pid, self.reason or f"ended before it was ready: {status}{told}")

    def _sweep(self) -> None:
        """Kill the programs that the target started when it ran in a fork of the image, and left behind."""
        pids = descendants.adopted(self._known_pids)
        descendants.kill(descendants.marked(pids, self._environment[MARK], unmarked=False))

    def _fail(self, pid: int | None, why: str) -> None:
        """Make another one after a pause."""
        self._is_first = False
        self.reason = why
        pause = self._again.fail()
        facts = {"oom_kills_meanwhile": kills} if (kills := self._kills()) else {}
        self._log.warning("image has ended", pid=pid, reason=why, again_in=round(pause, 3), **facts)
        self._timer = asyncio.get_running_loop().call_later(pause, self._make)
        self._notify()

    def _kills(self) -> int:
        return cgroup.oom_kills_since(self._oom_kills)

    def _clear(self) -> None:
        self.is_ready = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
        for relay in self._relays:
            relay.close()
        self._child, self._channel, self._relays = None, None, ()

    def close(self) -> None:
        """Kill the process: no worker of this program is to be started any more. May be called again."""
        self._is_closed = True
        self.is_ready = self._is_first = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._kill()
        self._notify()

    def _notify(self) -> None:
        for changed in self._waiters:
            changed.notify()


def _high_of(fds: Sequence[int]) -> int | None:
    """Return the one descriptor of a packet above those of children; None where there is no number left."""
    try:
        return high(fds[0]) if fds else None
    except OSError:
        return None
