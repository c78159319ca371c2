"""The companion `inworld-pool`: one broker for every job of the machine, up before the workers, closed last.

`worker/inworld/companion.py` has the contract. What has to outlive a broker that dies is kept here and handed
to each one: the listening socket, so that its port stays and connections made in between wait in the backlog;
the token that jobs show; the lifeline, a pipe whose write end every worker holds. The real key goes over the
control socket only, and workers are given the token in its place.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, assert_never

from lastcall.supervisor.config import Inworld
from lastcall.supervisor.errors import ConfigError, SpawnError, TransitionError
from lastcall.supervisor.fleet.restarts import RestartPolicy, Restarts
from lastcall.supervisor.fleet.states import ALIVE, SLOT_TABLE, SlotEvent, SlotState
from lastcall.supervisor.processes.child import Child, high, pipe, spawn
from lastcall.supervisor.processes.output_reader import Relay
from lastcall.supervisor.processes.reaper import Reaper
from lastcall.supervisor.processes.worker_channel import Channel
from lastcall.supervisor.receipt import ResourceEntry, ResourceFate, StopRecord
from lastcall.supervisor.signals import SHIELDED
from lastcall.worker.base import variables
from lastcall.worker.base.budget import Deadlines
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.wire import (
    OF_BROKER,
    BrokerBeat,
    BrokerHears,
    BrokerSays,
    Close,
    Fault,
    Key,
    Resource,
    Serving,
)

E, S = SlotEvent, SlotState

NAME = "inworld-pool"
CONTROL_FD, LISTEN_FD, LIFELINE_FD = 3, 4, 5
BACKLOG = 512
# Utterances wait for a new broker in its backlog, so it is never given up, and never later than in a second.
POLICY = RestartPolicy(intensity=1_000_000, period=60.0, first=0.1, cap=0.8)
READY = 10.0
KILLED_IN = 1.0
# What a broker needs of the environment: to find programs and certificates, and the way out.
PASSED_ON = frozenset({"PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH"})
PASSED_ON |= {"VIRTUAL_ENV", "SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}
PASSED_ON |= {"http_proxy", "https_proxy", "no_proxy"}


def key_of(config: Inworld, environment: Mapping[str, str]) -> str:
    """Return the API key. Raises ConfigError when there is none."""
    if not config.api_key_file:
        key = environment.get(variables.INWORLD_API_KEY, "").strip()
        if not key:
            raise ConfigError("inworld.enabled: no API key: set INWORLD_API_KEY, or inworld.api_key_file")
        return key
    try:
        key = Path(config.api_key_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"inworld.api_key_file: {config.api_key_file!r} can't be read: {error}") from error
    if not key:
        raise ConfigError(f"inworld.api_key_file: {config.api_key_file!r} is empty; expected the API key")
    return key


class Companion:
    """Keeps one broker up for as long as there are workers."""

    def __init__(
        self,
        config: Inworld,
        *,
        key: str,
        grace: float,
        close: float,
        supervisor_id: str,
        environment: Mapping[str, str],
        reaper: Reaper,
        record: StopRecord,
        is_stopping: Callable[[], bool],
        known_pids: set[int],
        write: Callable[[bytes], None],
        on_change: Callable[[], None],
        log: Any,
    ) -> None:
        self.name = NAME
        self.state = S.STOPPED
        self.restarts = 0
        self.figures: dict[str, Any] = {}
        self.changed = Condition()
        self._config = config
        self._key = key
        self._grace = grace
        self._close = close
        self._id = supervisor_id
        self._environment = {name: environment[name] for name in PASSED_ON if name in environment}
        self._reaper = reaper
        self._record = record
        self._stop_has_begun = is_stopping
        self._known_pids = known_pids
        self._write = write
        self._on_change = on_change
        self._log = log.bind(companion=NAME)
        self._restarts = Restarts(POLICY, random.Random())
        self._token = secrets.token_urlsafe(32)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self._lifeline, self._held_by_workers = pipe()
        self._child: Child | None = None
        self._channel: Channel[BrokerHears, BrokerSays] | None = None
        self._channel_lost = False
        self._ready_at: float | None = None
        self._is_stopping = False
        self._was_told = False

    # -- what workers are given -----------------------------------------------------------------------

    @property
    def lifeline(self) -> int:
        """The descriptor that a worker holds for as long as it lives."""
        return self._held_by_workers

    def environment_for_workers(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return the environment with the way to the broker in it, and without the key."""
        port = self._listener.getsockname()[1]
        return {
            **environment,
            variables.INWORLD_WS_URL: f"ws://127.0.0.1:{port}/",
            variables.INWORLD_URL: f"http://127.0.0.1:{port}/",
            variables.INWORLD_TOKEN: self._token,
            variables.INWORLD_API_KEY: self._token,
        }

    # -- what others see ------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self.state in ALIVE else None

    @property
    def is_ready(self) -> bool:
        return self.state is S.READY

    def document(self) -> dict[str, Any]:
        """Return its part of the status, ready for JSON."""
        return {
            "name": NAME,
            "state": self.state.value,
            "pid": self.pid,
            "restarts": self.restarts,
            **self.figures,
        }

    # -- life -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a broker up until it is stopped."""
        try:
            while not self._is_stopping:
                await self._live()
                if self._is_stopping:
                    break
                uptime = 0.0 if self._ready_at is None else now() - self._ready_at
                delay = self._restarts.delay(now(), uptime=uptime) or 0.0
                self.restarts += 1
                self._change(E.RETRY, delay=round(delay, 3))
                due = now() + delay
                await self.changed.until(lambda: self._is_stopping, lambda due=due: due)  # type: ignore[misc]
            if self.state is not S.STOPPED:
                self._change(E.STOP)
        finally:
            self._listener.close()
            for fd in (self._lifeline, self._held_by_workers):
                os.close(fd)

    async def until_ready(self, is_stopping: Callable[[], object]) -> bool:
        """Wait for the first broker, or for a stop; False when neither comes in time."""
        due = now() + READY
        return await self.changed.until(lambda: self.is_ready or is_stopping(), lambda: due)

    def wake(self) -> None:
        """Have whoever waits here look again."""
        self.changed.notify()

    def set_key(self, key: str) -> None:
        """Use another key for new connections."""
        self._key = key
        self._say(Key(key=key))

    async def stop(self, deadlines: Callable[[], Deadlines]) -> None:
        """Have the pool closed to the last context, within its share; kill what does not end in time."""
        self._is_stopping = True
        self.changed.notify()
        child = self._child
        if child is None or child.status is not None:
            # Whatever it had open went with it; nobody closed that in order.
            self._note("forced")
            return
        self._change(E.FENCE)
        self._change(E.CLOSE)
        share = max(0.0, min(self._close, deadlines().end_at - now()))
        due = now() + share
        self._say(Close(close_at=due - min(0.25, share - 0.05)))
        if await self.changed.until(lambda: child.status is not None, lambda: min(due, deadlines().end_at)):
            return
        self._change(E.KILL)
        child.send(signal.SIGKILL)
        if self._ready_at is not None:  # one that never served has nothing that could be lost
            killed = {"what": "companion", "name": NAME, "pid": child.pid}
            self._record.killed.append(killed)
        if not self._was_told:
            self._note("closed" if self._ready_at is None else "forced")
        at = now() + KILLED_IN
        await self.changed.until(lambda: child.status is not None, lambda: at)

    def _change(self, event: SlotEvent, **why: Any) -> None:
        try:
            after = SLOT_TABLE[self.state, event]
        except KeyError:
            raise TransitionError(f"{NAME}: {event.name} in state {self.state.name}") from None
        before, self.state = self.state, after
        write = self._log.warning if after is S.FAILED else self._log.info
        write("companion " + after.value, was=before.value, **why)
        self.changed.notify()
        self._on_change()

    async def _live(self) -> None:
        self._ready_at = None
        self._channel_lost = False
        self.figures = {}
        try:
            child, control, relays = self._spawn()
        except (SpawnError, OSError) as error:
            self._change(E.FAIL, reason=str(error))
            return
        self._child = child
        self._known_pids.add(child.pid)
        self._change(E.SPAWN, pid=child.pid)
        try:
            self._channel = await Channel.open(control, OF_BROKER, self._on_message, self._on_lost)
            self._say(Key(key=self._key))
            await self.changed.until(lambda: child.status is not None)
        except asyncio.CancelledError:
            child.send(signal.SIGKILL)
            raise
        due = now() + KILLED_IN
        await self.changed.until(lambda: self._channel_lost, lambda: due)
        self._channel.close()
        self._channel = None
        for relay in relays:
            relay.close()
        self._known_pids.discard(child.pid)
        was_asked = self.state in (S.CLOSING, S.KILLING)
        if not was_asked and self._ready_at is not None and self._stop_has_begun():
            self._note("forced")  # what it had open was cut; the next one knows nothing of it
        self._change(E.EXIT if was_asked else E.FAIL, exit=str(child.status))

    def _spawn(self) -> tuple[Child, socket.socket, list[Relay]]:
        settings = {
            "control_fd": CONTROL_FD,
            "listen_fd": LISTEN_FD,
            "lifeline_fd": LIFELINE_FD,
            "token": self._token,
            "close": self._close,
            "grace": self._grace,
            **self._config.model_dump(exclude={"enabled", "api_key_file"}),
        }
        environment = {
            **self._environment,
            variables.MARK: f"{self._id}:{NAME}:{self.restarts}",
            variables.COMPANION: json.dumps(settings),
            "PYTHONUNBUFFERED": "1",
        }
        ours: list[int] = []
        theirs: dict[int, int] = {}
        control, far = socket.socketpair()
        try:
            out, out_write = pipe()
            ours.append(out)
            theirs = {
                0: high(os.open(os.devnull, os.O_RDONLY)),
                1: out_write,
                2: high(os.dup(out_write)),
                CONTROL_FD: high(far.detach()),
                LISTEN_FD: high(os.dup(self._listener.fileno())),
                LIFELINE_FD: high(os.dup(self._lifeline)),
            }
            child = spawn(
                [sys.executable, "-P", "-m", "lastcall.worker.inworld"],
                environment=environment,
                descriptors=theirs,
                blocked=SHIELDED,
                reaper=self._reaper,
                on_exit=lambda _status: self.changed.notify(),
            )
        except BaseException:
            for fd in ours:
                os.close(fd)
            control.close()
            raise
        finally:
            for fd in theirs.values():
                os.close(fd)
        return child, control, [Relay(out, self._write)]

    def _note(self, fate: ResourceFate) -> None:
        """Put a broker that could not say itself how it closed into the receipt."""
        counts = {what: {"cut": self.figures[what]} for what in ("connections", "contexts") if self.figures}
        known = {what: each for what, each in counts.items() if each["cut"]}
        entry = ResourceEntry(name=NAME, fate=fate, counts=known if fate != "closed" else {})
        self._record.resources.append(entry)

    # -- what is said ---------------------------------------------------------------------------------

    def _say(self, message: BrokerHears) -> None:
        if self._channel is not None:
            self._channel.say(message)

    def _on_lost(self, wrong: str) -> None:
        self._channel_lost = True
        self.changed.notify()
        if wrong:
            self._log.warning("control channel closed", reason=wrong)

    def _on_message(self, message: BrokerSays) -> None:
        match message:
            case Serving():
                self._ready_at = now()
                if self.state is S.STARTING:
                    self._change(E.REGISTER)
            case BrokerBeat():
                self.figures = asdict(message)
            case Resource(fate=fate, counts=counts):
                self._was_told = True
                if self._is_stopping:
                    self._record.resources.append(ResourceEntry(name=NAME, fate=fate, counts=counts))
            case Fault():
                self._log.error("companion failed", reason=message.message, traceback=message.traceback)
            case _:
                assert_never(message)
        self.changed.notify()
        self._on_change()
