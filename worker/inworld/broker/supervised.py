"""The broker's process: alone, or as a companion of the supervisor. The contract between the two is here.

The supervisor starts `python -P -m lastcall.worker.inworld` with SIGTERM and SIGINT blocked and one variable,
LASTCALL_COMPANION, a JSON object (`Settings`):

    control_fd      our end of the control socketpair; without it the process is alone
    listen_fd       the listening socket, of 127.0.0.1; it is the supervisor's, and outlives us
    lifeline_fd     the read end of a pipe whose write end each worker holds; or left out
    token           what the jobs show in place of the API key
    close           seconds for the close, when nobody says
    grace           seconds that it serves on at most, once the supervisor is lost
    beat            seconds between two beats
    ws_url base_url max_connections max_contexts idle_connection_timeout acquire_timeout
                    [inworld] of the configuration; left out: its defaults

On the control socket, in the format of `lastcall.worker.base.wire`:

    companion says   when
    Serving          it accepts connections; after the first `Key`
    BrokerBeat       every `beat` seconds: its lag, memory and clients, and the figures of the pool
    Resource         closed: name "inworld-pool", counts {connections: {fate: n}, contexts: {fate: n}}
    Fault            it ends for a fault

    supervisor says  when
    Key              at the start, and again at any time, for connections made from then on
    Close            close by that time; again, to make it sooner

The key is in `Key` only: in no argument, variable, log line or answer. SIGTERM and SIGINT do nothing
here, because jobs that still speak need the broker: the supervisor's word ends it. If the control socket is
at its end, it serves on until the lifeline is too, or grace is over, and then closes by itself.

Exit code: 0 when everything was closed in order, 75 when something had to be forced, 70 for a fault of ours
or a key that never came, 78 for a command line without a key.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import traceback
from collections.abc import Callable, MutableMapping
from dataclasses import asdict, dataclass
from typing import assert_never

from lastcall.worker.base import variables
from lastcall.worker.base.budget import DEFAULT_GRACE
from lastcall.worker.base.channel import Control
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.process import rss_bytes
from lastcall.worker.base.stopping import Stopping, stop_on_signals
from lastcall.worker.base.wire import (
    FOR_BROKER,
    BrokerBeat,
    BrokerHears,
    BrokerSays,
    Close,
    Fault,
    Key,
    Resource,
    Serving,
)
from lastcall.worker.inworld.broker.broker import Broker, listen
from lastcall.worker.inworld.pool.close_report import CloseReport
from lastcall.worker.inworld.pool.pool import InworldPool

log = logging.getLogger("lastcall.inworld")

NAME = "inworld-pool"
KEY_PATIENCE = 30.0
INWORLD_WS_URL = "wss://api.inworld.ai/"
INWORLD_URL = "https://api.inworld.ai/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the process is told at its birth; see the module."""

    control_fd: int | None = None
    listen_fd: int | None = None
    lifeline_fd: int | None = None
    token: str
    close: float = 5.0
    grace: float = DEFAULT_GRACE
    beat: float = 1.0
    ws_url: str = INWORLD_WS_URL
    base_url: str = INWORLD_URL
    max_connections: int = 20
    max_contexts: int = 5
    idle_connection_timeout: float = 300.0
    acquire_timeout: float = 30.0

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Settings | None:
        """Read the settings and remove them from the environment; None when the process is alone."""
        text = environ.pop(variables.COMPANION, "")
        return cls(**json.loads(text)) if text else None


class Companion:
    """The life of the process: get the key, serve, close."""

    def __init__(self, settings: Settings, *, key: str = "") -> None:
        self.settings = settings
        self._changed = Condition()
        self.stopping = Stopping(self._changed)
        self._key = key
        self._broker: Broker | None = None
        self._close_at: float | None = None
        self._lost_at: float | None = None
        self._lifeline = settings.lifeline_fd
        self._lag = 0.0
        fd = settings.control_fd
        sock = None if fd is None else socket.socket(fileno=fd)
        self._control: Control[BrokerSays, BrokerHears] = Control(
            sock, FOR_BROKER, self._on_message, self._on_lost
        )

    async def run(self, on_ready: Callable[[Broker], None] = lambda _: None) -> int:
        """Serve until the end and return the exit code; `on_ready` hears where, once."""
        with stop_on_signals(asyncio.get_running_loop(), self.stopping):
            await self._control.connect()
            try:
                return await self._run(on_ready)
            except Exception as error:  # the supervisor is to hear of it, whatever it is
                text = "".join(traceback.format_exception(error))
                log.error("the broker failed", extra={"traceback": text})
                return self._fault(str(error), text)
            finally:
                self._let_lifeline_go()
                await asyncio.sleep(0)  # lets the last message out

    async def _run(self, on_ready: Callable[[Broker], None]) -> int:
        settings = self.settings
        key_at = now() + KEY_PATIENCE
        await self._changed.until(lambda: self._key or self._is_to_close(), lambda: self._sooner(key_at))
        if self._is_to_close() or self._lost_at is not None:
            return self._report(CloseReport())
        if not self._key:
            return self._fault(f"no API key came over the control socket within {KEY_PATIENCE:g} s", "")
        listener = listen() if settings.listen_fd is None else socket.socket(fileno=settings.listen_fd)
        pool = InworldPool(
            settings.ws_url,
            self._key,
            max_connections=settings.max_connections,
            max_contexts=settings.max_contexts,
            idle_connection_timeout=settings.idle_connection_timeout,
            acquire_timeout=settings.acquire_timeout,
        )
        with listener:
            async with pool:
                broker = Broker(
                    pool, listener, token=settings.token, key=self._key, base_url=settings.base_url
                )
                async with broker:
                    self._broker = broker
                    self._control.say(Serving())
                    on_ready(broker)
                    return self._report(await self._serve(broker))

    async def _serve(self, broker: Broker) -> CloseReport:
        async with asyncio.TaskGroup() as group:
            beating = group.create_task(self._beats())
            await self._changed.until(self._is_to_close, lambda: self._sooner(None))
            if self._close_at is None:
                self._close_at = _pool_close_at(now() + self.settings.close)
            report = await broker.aclose(self._close_at)
            beating.cancel()
        return report

    def _report(self, report: CloseReport) -> int:
        log.info("the Inworld pool is closed", extra={"fate": report.fate, **report.counts})
        self._control.say(Resource(name=NAME, fate=report.fate, counts=report.counts))
        return Exit.CLEAN if report.fate == "closed" else Exit.FORCED

    def _fault(self, message: str, text: str) -> int:
        self._control.say(Fault(exit=Exit.FAULT, message=message, traceback=text))
        return Exit.FAULT

    # -- when to end ----------------------------------------------------------------------------------

    def _is_to_close(self) -> bool:
        if self._close_at is not None:
            return True
        if not self._control.is_supervised:
            return self.stopping.is_set
        return self._lost_at is not None and self._lifeline is None

    def _sooner(self, at: float | None) -> float | None:
        if self._lost_at is None:
            return at
        over_at = self._lost_at + self.settings.grace
        return over_at if at is None else min(at, over_at)

    def _on_message(self, message: BrokerHears) -> None:
        match message:
            case Key(key=key):
                self._key = key
                if self._broker is not None:
                    self._broker.set_key(key)
            case Close(close_at=close_at):
                at = _pool_close_at(close_at)
                self._close_at = at if self._close_at is None else min(at, self._close_at)
                if self._broker is not None:
                    self._broker.pool.hurry(self._close_at)
            case _:
                assert_never(message)
        self._changed.notify()

    def _on_lost(self) -> None:
        self._lost_at = now()
        if self._lifeline is not None:
            asyncio.get_running_loop().add_reader(self._lifeline, self._read_lifeline)
        log.warning("the supervisor is gone; serving on until the last worker is")
        self._changed.notify()

    def _read_lifeline(self) -> None:
        assert self._lifeline is not None
        if not os.read(self._lifeline, 4096):
            self._let_lifeline_go()
            self._changed.notify()

    def _let_lifeline_go(self) -> None:
        fd, self._lifeline = self._lifeline, None
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    # -- what the supervisor hears --------------------------------------------------------------------

    async def _beats(self) -> None:
        while self._control.is_supervised:
            due = now() + self.settings.beat
            await asyncio.sleep(self.settings.beat)
            self._lag = max(0.0, now() - due)
            self._beat()

    def _beat(self) -> None:
        if self._broker is None:
            return
        self._control.say(
            BrokerBeat(
                lag_ms=round(self._lag * 1000, 2),
                rss_bytes=rss_bytes(),
                clients=len(self._broker.clients),
                **asdict(self._broker.pool.figures),
            )
        )


def _pool_close_at(close_at: float) -> float:
    """Keep some of the time for telling jobs and supervisor: who comes late with the census is killed."""
    return close_at - min(1.0, 0.2 * max(0.0, close_at - now()))
