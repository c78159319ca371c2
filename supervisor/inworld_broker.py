"""The Inworld broker: one process for every job of the machine, up before the workers and closed last.

`worker/inworld/broker/broker_process.py` has the contract with the broker. A broker that dies is replaced on
the same endpoint (`inworld_endpoint`), and is told the API key over its control socket.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, assert_never

from lastcall.supervisor.config import Inworld
from lastcall.supervisor.errors import SpawnError, TransitionError
from lastcall.supervisor.fleet.restarts import RestartPolicy, Restarts
from lastcall.supervisor.fleet.states import (
    ALIVE,
    COMPANION_LOG_EVENT,
    SLOT_TABLE,
    SlotEvent,
    SlotState,
)
from lastcall.supervisor.inworld_endpoint import BrokerEndpoint
from lastcall.supervisor.processes.child import Child
from lastcall.supervisor.processes.output_reader import OutputReader
from lastcall.supervisor.processes.reaper import Reaper
from lastcall.supervisor.processes.worker_channel import Channel
from lastcall.supervisor.receipt import ResourceEntry, ResourceFate, StopRecord
from lastcall.worker.base import variables
from lastcall.worker.base.broker_settings import COMPANION_NAME
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

# Ours: a broker that died is replaced within a second, because jobs wait in the backlog meanwhile. It is
# replaced however often it has failed, so `intensity` is a number that no broker reaches.
RESTART_POLICY = RestartPolicy(intensity=1_000_000, period=60.0, first=0.1, cap=0.8)
# Seconds until the first broker has to serve. Ours: its imports take about one second. After ten seconds the
# workers are started all the same, because a job may not need the broker.
READY_TIMEOUT = 10.0
# Seconds from SIGKILL, or from an exit, to its last consequence. Ours: the kernel needs milliseconds.
EXIT_TIMEOUT = 1.0
# Seconds of the broker's share of a stop that are kept for its exit after the close, and seconds that the
# close gets at least. Ours: an interpreter ends in a tenth of a second or two, and sockets are taken away at
# once without any time.
EXIT_SECONDS = 0.25
MIN_CLOSE_SECONDS = 0.05


class Companion:
    """Keeps one broker up for as long as there are workers."""

    def __init__(
        self,
        config: Inworld,
        *,
        key: str,
        keys_in_use: Callable[[], Iterable[str]],
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
        self.name = COMPANION_NAME
        self.state = S.STOPPED
        self.restarts = 0
        self.figures: dict[str, Any] = {}
        self.changed = Condition()
        self._key = key
        # The digests of the keys of a program that is yet to take over, and a function that returns those of
        # all workers.
        self._offered_keys: frozenset[str] = frozenset()
        self._keys_in_use = keys_in_use
        self._told: Key | None = None
        self._close = close
        self._id = supervisor_id
        self._reaper = reaper
        self._record = record
        self._stop_has_begun = is_stopping
        self._known_pids = known_pids
        self._write = write
        self._on_change = on_change
        self._log = log.bind(companion=COMPANION_NAME)
        self._restarts = Restarts(RESTART_POLICY, random.Random())
        self._endpoint = BrokerEndpoint(config, close=close, grace=grace, environment=environment)
        self._child: Child | None = None
        self._channel: Channel[BrokerHears, BrokerSays] | None = None
        self._channel_lost = False
        self._ready_at: float | None = None
        self._is_stopping = False
        self._was_told = False
        self._has_served = False

    # -- what workers are given -----------------------------------------------------------------------

    @property
    def lifeline(self) -> int:
        """The descriptor that a worker holds for as long as it lives."""
        return self._endpoint.lifeline

    def environment_for_workers(self, environment: Mapping[str, str], key: str) -> dict[str, str]:
        """Return the environment with the way to the broker in it, for workers whose pool is to have `key`.

        Their keys are accepted from now on; `settle` ends that, or makes `key` that of the pool.
        """
        found = self._endpoint.environment_for_workers(environment, key)
        self._offered_keys = frozenset(found[variables.INWORLD_KEYS].split())
        self._tell_keys()
        return found

    # -- what others see ------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self.state in ALIVE else None

    @property
    def is_ready(self) -> bool:
        return self.state is S.READY

    def document(self) -> dict[str, Any]:
        """Return the broker's part of the status, ready for JSON."""
        return {
            "name": COMPANION_NAME,
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
            self._endpoint.close()

    async def until_ready(self, is_stopping: Callable[[], object]) -> bool:
        """Wait for the first broker, or for a stop; False when neither comes in time."""
        due = now() + READY_TIMEOUT
        return await self.changed.until(lambda: self.is_ready or is_stopping(), lambda: due)

    def wake(self) -> None:
        """Have every waiter look again."""
        self.changed.notify()

    def settle(self, key: str, *, is_taken_over: bool) -> None:
        """Use `key` for new connections if its program has taken over; else forget it.

        The keys of workers that live, and of the program of the next start, are accepted in any case.
        """
        self._offered_keys = frozenset()
        if is_taken_over:
            self._key = key
        self._tell_keys(again=True)

    def at_next_restart(self, environment: Mapping[str, str]) -> list[str]:
        """Return the variables that no broker gets before a restart, because it started with other values."""
        return self._endpoint.differing(environment)

    async def stop(self, deadlines: Callable[[], Deadlines]) -> None:
        """Have the pool closed to the last context, within its share; kill what does not end in time."""
        self._is_stopping = True
        self.changed.notify()
        child = self._child
        if child is None or child.status is not None:
            # The connections of the broker went with the process of the broker; none was closed in order. A
            # broker that never served has opened none.
            self._note("forced" if self._has_served else "closed")
            return
        self._change(E.FENCE)
        self._change(E.CLOSE)
        share = max(0.0, min(self._close, deadlines().end_at - now()))
        due = now() + share
        self._say(Close(close_at=due - min(EXIT_SECONDS, share - MIN_CLOSE_SECONDS)))
        if await self.changed.until(lambda: child.status is not None, lambda: min(due, deadlines().end_at)):
            # How it closed may still be unread. `_live` takes the channel away once it has read everything.
            at = now() + EXIT_TIMEOUT
            await self.changed.until(lambda: self._channel is None, lambda: at)
            return
        self._change(E.KILL)
        child.send(signal.SIGKILL)
        if self._ready_at is not None:  # a broker that never served has nothing open
            killed = {"what": "companion", "name": COMPANION_NAME, "pid": child.pid}
            self._record.killed.append(killed)
        if not self._was_told:
            self._note("closed" if self._ready_at is None else "forced")
        at = now() + EXIT_TIMEOUT
        await self.changed.until(lambda: child.status is not None, lambda: at)

    def _change(self, event: SlotEvent, **why: Any) -> None:
        try:
            after = SLOT_TABLE[self.state, event]
        except KeyError:
            raise TransitionError(f"{COMPANION_NAME}: {event.name} in state {self.state.name}") from None
        before, self.state = self.state, after
        write = self._log.warning if after is S.FAILED else self._log.info
        write(COMPANION_LOG_EVENT[after], was=before.value, **why)
        self.changed.notify()
        self._on_change()

    async def _live(self) -> None:
        self._ready_at = None
        self._channel_lost = False
        self.figures = {}
        try:
            child, control, output = self._endpoint.spawn(
                mark=f"{self._id}:{COMPANION_NAME}:{self.restarts}",
                reaper=self._reaper,
                on_exit=lambda _status: self.changed.notify(),
            )
        except (SpawnError, OSError) as error:
            self._change(E.FAIL, reason=str(error))
            return
        relay = OutputReader(output, self._write)
        self._child = child
        self._known_pids.add(child.pid)
        self._change(E.SPAWN, pid=child.pid)
        try:
            self._channel = await Channel.open(control, OF_BROKER, self._on_message, self._on_lost)
            self._tell_keys(again=True)
            await self.changed.until(lambda: child.status is not None)
        except asyncio.CancelledError:
            child.send(signal.SIGKILL)
            raise
        due = now() + EXIT_TIMEOUT
        await self.changed.until(lambda: self._channel_lost, lambda: due)
        self._channel.close()
        self._channel = None
        relay.close()
        self._known_pids.discard(child.pid)
        was_asked = self.state in (S.CLOSING, S.KILLING)
        if not was_asked and self._ready_at is not None and self._stop_has_begun():
            self._note("forced")  # what was open is cut, and the next broker knows nothing of it
        self._change(E.EXIT if was_asked else E.FAIL, exit=str(child.status))

    def _note(self, fate: ResourceFate) -> None:
        """Put a broker that has said nothing of its close into the receipt."""
        counts = {what: {"cut": self.figures[what]} for what in ("connections", "contexts") if self.figures}
        known = {what: each for what, each in counts.items() if each["cut"]}
        entry = ResourceEntry(name=COMPANION_NAME, fate=fate, counts=known if fate != "closed" else {})
        self._record.resources.append(entry)

    # -- what is said ---------------------------------------------------------------------------------

    def _tell_keys(self, *, again: bool = False) -> None:
        """Tell the broker the key, and which keys jobs may show, if that is new or `again` is set.

        The keys of earlier reloads count for as long as a worker has them.
        """
        if self._channel is None:
            return
        told = Key(key=self._key, accepts=" ".join(sorted(self._offered_keys.union(self._keys_in_use()))))
        if again or told != self._told:
            self._told = told
            self._say(told)

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
                self._has_served = True
                if self.state is S.STARTING:
                    self._change(E.REGISTER)
            case BrokerBeat():
                self.figures = asdict(message)
                self._tell_keys()
            case Resource(fate=fate, counts=counts):
                self._was_told = True
                if self._is_stopping:
                    self._record.resources.append(
                        ResourceEntry(name=COMPANION_NAME, fate=fate, counts=counts)
                    )
            case Fault():
                self._log.error("companion failed", reason=message.message, traceback=message.traceback)
            case _:
                assert_never(message)
        self.changed.notify()
        self._on_change()
