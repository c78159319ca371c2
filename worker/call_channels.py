"""The way between the calls and their worker: each hears until when it may go on, and may ask for more.

    job                                   worker
    connects, CallJoined        ───────►  knows which job this is
                                ◄───────  Limit, once the fence is said, and whenever the deadline moves
    AskExtension                ───────►
                                ◄───────  Limit, with the id of the question

Every other message is about a handover, and goes to `hear` (`worker.handovers`).

A listening socket in the abstract namespace (unix(7)) is the one way in. No file has to be kept, no
descriptor has to be inherited, and a job whose code does not ask for its call costs nothing. Jobs in threads
of the worker connect as processes do. SOCK_SEQPACKET keeps messages apart, and a send is whole or fails. No
send waits: a job whose event loop is stuck finds the messages later, and one that leaves hundreds unread is
told no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from lastcall.worker.base import budget
from lastcall.worker.base.clock import now
from lastcall.worker.base.errors import WireError
from lastcall.worker.base.peers import is_of_this_user
from lastcall.worker.base.wire import (
    OF_CALL,
    AskExtension,
    AskHandover,
    AskRemoval,
    AskToSpeak,
    CallHears,
    CallJoined,
    CallKeeps,
    CallStep,
    Drain,
    Limit,
    MaySpeak,
    encode,
)

# The messages of a call about its handover.
AboutHandover = CallKeeps | CallStep | AskHandover | AskRemoval

log = logging.getLogger("lastcall.worker")

# Connections that wait to be let in while the loop of the worker is busy. Ours: more than a worker has jobs.
BACKLOG = 1024
# Connections at a time. Ours: some times the jobs of the largest worker, and less than its descriptors.
MAX_CHANNELS = 4096
# Bytes of a message, longer ones are cut off and then no message. Ours: a job's id has some dozens.
MAX_MESSAGE_BYTES = 8192
# Seconds until the next look, where no descriptor is left for a connection. Ours: as asyncio's own servers.
ACCEPT_AGAIN_AFTER = 1.0


@dataclass(slots=True, eq=False)
class _Channel:
    """The connection of one job."""

    sock: socket.socket
    job: str = ""


class Calls:
    """The calls that asked to be told. `close_needed`: seconds of the close that no extension takes.

    A security module may refuse the socket. `address` is then "", no call is told, and the worker runs on.
    """

    def __init__(self, *, close_needed: float) -> None:
        self.address = f"\0lastcall-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener: socket.socket | None = None
        self._refusal = ""
        try:
            self._listener = _listening(self.address)
        except OSError as error:
            self.address, self._refusal = "", repr(error)
        self._close_needed = close_needed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accept_again: asyncio.TimerHandle | None = None
        self._channels: set[_Channel] = set()
        self._deadlines: Drain | None = None
        self._extended: dict[str, float] = {}
        # Gets the id of a job, and what its call says about a handover.
        self.hear: Callable[[str, AboutHandover], None] = lambda _job, _message: None

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the calls in."""
        self._loop = loop
        if self._listener is None:
            log.warning("no call can be told of a stop", extra={"error": self._refusal})
            return
        loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Close every connection, and let nobody in any more."""
        if self._accept_again is not None:
            self._accept_again.cancel()
        for channel in list(self._channels):
            self._drop(channel)
        if self._listener is not None:
            if self._loop is not None and self._listener.fileno() >= 0:
                self._loop.remove_reader(self._listener.fileno())
            self._listener.close()

    def tell(self, deadlines: Drain) -> None:
        """Tell every call until when it may go on, those that join later too.

        An end of the drain that comes nearer ends all extensions: an operator wants the calls to end.
        """
        before, self._deadlines = self._deadlines, deadlines
        if before is not None and deadlines.drain_at < before.drain_at:
            self._extended.clear()
        for channel in list(self._channels):
            self._say_limit(channel)

    def due_at(self, job: str) -> float:
        """Return until when a job may go on that has asked for more; a time that is past for every other."""
        return self._extended.get(job, 0.0)

    def say(self, job: str, message: CallHears) -> bool:
        """Say something to the call of a job; False if it has not asked to be told, or is gone."""
        channels = [each for each in self._channels if each.job == job]
        return bool(channels) and self._send(channels[0], message)

    def forget(self, job: str) -> None:
        """Close what a job that has ended left open, as a program that it forked does."""
        self._extended.pop(job, None)
        for channel in [each for each in self._channels if each.job == job]:
            self._drop(channel)

    # -- one connection -------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._loop is not None and self._listener is not None
        for _ in range(BACKLOG):
            try:
                sock, _address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor is left: the socket stays readable until there is one
                log.warning("a call can't be let in", extra={"error": repr(error)})
                self._loop.remove_reader(self._listener.fileno())
                self._accept_again = self._loop.call_later(ACCEPT_AGAIN_AFTER, self.open, self._loop)
                return
            sock.setblocking(False)
            if len(self._channels) >= MAX_CHANNELS or not is_of_this_user(sock):
                sock.close()
                continue
            channel = _Channel(sock)
            self._channels.add(channel)
            self._loop.add_reader(sock.fileno(), self._read, channel)

    def _read(self, channel: _Channel) -> None:
        try:
            line = channel.sock.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            line = b""
        if not line:
            self._drop(channel)
            return
        try:
            message = OF_CALL.decode(line)
        except WireError as error:
            log.warning("a call said something wrong", extra={"job_id": channel.job, "error": str(error)})
            self._drop(channel)
            return
        match message:
            case CallJoined(job=job):
                channel.job = job
                self._say_limit(channel)
            case AskExtension():
                self._extend(channel, message)
            case AskToSpeak(id=id):
                self._send(channel, MaySpeak(id=id))
            case CallKeeps() | CallStep() | AskHandover() | AskRemoval():
                if channel.job:
                    self.hear(channel.job, message)
            case None:  # of a newer version
                pass
            case _:
                assert_never(message)

    def _extend(self, channel: _Channel, asked: AskExtension) -> None:
        deadlines = self._deadlines
        if deadlines is None or not channel.job:
            return
        before = max(deadlines.drain_at, self.due_at(channel.job))
        after = budget.extended(
            before,
            asked.seconds if now() < before else 0.0,  # after that the job has been asked to shut down
            drain_at=deadlines.drain_at,
            close_at=deadlines.close_at,
            close_needed=self._close_needed,
        )
        if after > before:
            self._extended[channel.job] = after
            fields = {"job_id": channel.job, "seconds": round(after - before, 3)}
            log.info("a call has more time", extra=fields)
        self._say_limit(channel, answers=asked.id)

    def _say_limit(self, channel: _Channel, answers: int = 0) -> None:
        deadlines = self._deadlines
        if deadlines is None or not channel.job:
            return
        due_at = max(deadlines.drain_at, self.due_at(channel.job))
        self._send(channel, Limit(cause=deadlines.cause, due_at=due_at, answers=answers))

    def _send(self, channel: _Channel, message: CallHears) -> bool:
        try:
            channel.sock.send(encode(message))
        except BlockingIOError:
            log.warning("a call does not listen, and is told no more", extra={"job_id": channel.job})
            self._drop(channel)
            return False
        except OSError:
            self._drop(channel)  # the job has ended
            return False
        return True

    def _drop(self, channel: _Channel) -> None:
        if channel in self._channels:
            assert self._loop is not None
            self._channels.remove(channel)
            self._loop.remove_reader(channel.sock.fileno())
            with contextlib.suppress(OSError):
                channel.sock.close()


def _listening(address: str) -> socket.socket:
    """Return a socket that listens at the address. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
