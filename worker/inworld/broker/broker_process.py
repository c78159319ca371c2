"""The broker's process, alone or under a supervisor, and the contract between broker and supervisor.

The supervisor starts `python -P -m lastcall.worker.inworld` with SIGTERM and SIGINT blocked and one variable,
LASTCALL_COMPANION, a JSON object (`base.broker_settings.BrokerSettings`).

On the control socket, in the format of `lastcall.worker.base.wire`:

    the broker says  when
    Serving          it accepts connections; after the first `Key`
    BrokerBeat       every `beat` seconds: its lag, memory and clients, and the figures of the pool
    Resource         closed: name "inworld-pool", counts {connections: {fate: n}, contexts: {fate: n}}
    Fault            it ends for a fault

    supervisor says  when
    Key              at the start, and again at any time: the key for connections made from then on, and the
                     digests of all keys that jobs may show
    Close            close by that time; again, to make it sooner

The API key is in `Key` only: in no argument, variable, log line or answer. SIGTERM and SIGINT do nothing
here, because jobs that still speak need the broker: only the supervisor's `Close` ends a broker that has a
supervisor. When the control socket is at its end the supervisor is lost. The broker then serves on until the
lifeline is at its end too, because no worker lives any more, or until grace is over, and closes by itself.

The exit code is 0 when everything was closed in order, and 75 when something had to be forced. It is 70 for a
fault in lastcall or a key that never came, and 78 for a command line without a key.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import assert_never

from lastcall.worker.base import inworld_keys
from lastcall.worker.base.broker_settings import COMPANION_NAME, BrokerSettings
from lastcall.worker.base.channel import Control
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.process import rss_bytes
from lastcall.worker.base.proxies import proxy_to
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

# Seconds until the API key has to come. Ours: the supervisor sends it as soon as it has started the process.
KEY_TIMEOUT = 30.0
# The part of a close that is kept for the report to jobs and supervisor, in seconds and as a share of the
# whole. The smaller one holds. Ours: messages on one machine are fast, but a broker that reports after the
# deadline is killed.
MAX_REPORT_SECONDS = 1.0
REPORT_SHARE = 0.2


class BrokerProcess:
    """The life of the process: get the key, serve, close."""

    def __init__(self, settings: BrokerSettings, *, key: str = "") -> None:
        self.settings = settings
        self._changed = Condition()
        self.stopping = Stopping(self._changed)
        self._key = key
        self._accepts = ""
        self._broker: Broker | None = None
        self._close_at: float | None = None
        self._supervisor_lost_at: float | None = None
        self._lifeline = settings.lifeline_fd
        self._lag = 0.0
        fd = settings.control_fd
        sock = None if fd is None else socket.socket(fileno=fd)
        self._control: Control[BrokerSays, BrokerHears] = Control(
            sock, FOR_BROKER, self._on_message, self._on_lost
        )

    @property
    def key_digest(self) -> str:
        """The digest of the API key, for jobs."""
        return inworld_keys.digest(self.settings.token, self._key)

    async def run(self, on_ready: Callable[[Broker], None] = lambda _: None) -> int:
        """Serve until the end and return the exit code; `on_ready` gets the broker once it serves."""
        with stop_on_signals(asyncio.get_running_loop(), self.stopping):
            await self._control.connect()
            try:
                return await self._run(on_ready)
            except Exception as error:  # whatever it is: the supervisor is told before the process ends
                text = "".join(traceback.format_exception(error))
                log.error("the broker failed", extra={"traceback": text})
                return self._fault(str(error), text)
            finally:
                self._close_lifeline()
                await asyncio.sleep(0)  # lets the last message out

    async def _run(self, on_ready: Callable[[Broker], None]) -> int:
        settings = self.settings
        key_at = now() + KEY_TIMEOUT
        await self._changed.until(
            lambda: self._key or self._must_close(), lambda: self._bounded_by_grace(key_at)
        )
        if self._must_close() or self._supervisor_lost_at is not None:
            return self._report(CloseReport())
        if not self._key:
            return self._fault(f"no API key came over the control socket within {KEY_TIMEOUT:g} s", "")
        listener = listen() if settings.listen_fd is None else socket.socket(fileno=settings.listen_fd)
        pool = InworldPool(
            settings.ws_url,
            self._key,
            max_connections=settings.max_connections,
            max_contexts=settings.max_contexts,
            idle_connection_timeout=settings.idle_connection_timeout,
            acquire_timeout=settings.acquire_timeout,
            proxy=proxy_to(settings.ws_url, os.environ),
        )
        with listener:
            async with pool:
                broker = Broker(
                    pool,
                    listener,
                    token=settings.token,
                    key=self._key,
                    base_url=settings.base_url,
                    proxy=proxy_to(settings.base_url, os.environ),
                )
                broker.set_key(self._key, self._accepts)
                async with broker:
                    self._broker = broker
                    self._control.say(Serving())
                    on_ready(broker)
                    return self._report(await self._serve(broker))

    async def _serve(self, broker: Broker) -> CloseReport:
        async with asyncio.TaskGroup() as group:
            beating = group.create_task(self._beats())
            await self._changed.until(self._must_close, lambda: self._bounded_by_grace(None))
            if self._close_at is None:
                self._close_at = _pool_close_at(now() + self.settings.close)
            report = await broker.aclose(self._close_at)
            beating.cancel()
        return report

    def _report(self, report: CloseReport) -> int:
        log.info("the Inworld pool is closed", extra={"fate": report.fate, **report.counts})
        self._control.say(Resource(name=COMPANION_NAME, fate=report.fate, counts=report.counts))
        return Exit.CLEAN if report.fate == "closed" else Exit.FORCED

    def _fault(self, message: str, text: str) -> int:
        self._control.say(Fault(exit=Exit.FAULT, message=message, traceback=text))
        return Exit.FAULT

    # -- when to end ----------------------------------------------------------------------------------

    def _must_close(self) -> bool:
        if self._close_at is not None:
            return True
        if not self._control.is_supervised:
            return self.stopping.is_set
        return self._supervisor_lost_at is not None and self._lifeline is None

    def _bounded_by_grace(self, at: float | None) -> float | None:
        """Return the deadline, or the end of grace if that is sooner and the supervisor is lost."""
        if self._supervisor_lost_at is None:
            return at
        over_at = self._supervisor_lost_at + self.settings.grace
        return over_at if at is None else min(at, over_at)

    def _on_message(self, message: BrokerHears) -> None:
        match message:
            case Key(key=key, accepts=accepts):
                self._key, self._accepts = key, accepts
                if self._broker is not None:
                    self._broker.set_key(key, accepts)
            case Close(close_at=close_at):
                at = _pool_close_at(close_at)
                self._close_at = at if self._close_at is None else min(at, self._close_at)
                if self._broker is not None:
                    self._broker.pool.hurry(self._close_at)
            case _:
                assert_never(message)
        self._changed.notify()

    def _on_lost(self) -> None:
        self._supervisor_lost_at = now()
        if self._lifeline is not None:
            asyncio.get_running_loop().add_reader(self._lifeline, self._read_lifeline)
        log.warning("the supervisor is gone; serving on until the last worker is")
        self._changed.notify()

    def _read_lifeline(self) -> None:
        assert self._lifeline is not None
        if not os.read(self._lifeline, 4096):
            self._close_lifeline()
            self._changed.notify()

    def _close_lifeline(self) -> None:
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
            try:
                self._beat()
            except Exception as error:  # the group would end the broker with all speech
                if self._broker is not None:
                    self._broker.pool.faults.note("a beat", error)

    def _beat(self) -> None:
        if self._broker is None:
            return
        self._control.say(
            BrokerBeat(
                lag_ms=round(self._lag * 1000, 2),
                rss_bytes=rss_bytes(),
                clients=len(self._broker.clients),
                direct=self._broker.direct,
                **asdict(self._broker.pool.figures),
            )
        )


def _pool_close_at(close_at: float) -> float:
    """Return by when the pool has to be closed, so that jobs and supervisor can be told by `close_at`."""
    return close_at - min(MAX_REPORT_SECONDS, REPORT_SHARE * max(0.0, close_at - now()))
