"""The connections that the Inworld plugin has opened, by event loop, and the close of one loop's.

For agents that use livekit-plugins-inworld directly, without a change to them. Left alone, the plugin's
connections are dropped with the job's HTTP session: contexts are cut, and no close frame is sent.

A connection belongs to the job of the loop that it lives on. A job process has one loop and one job, and so
has a thread of the thread executor. The place where a TTS object was made (the entrypoint, `setup_fnc`, the
top level of a module) does not say which job speaks through that object.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any
from urllib.parse import urljoin

import aiohttp

from lastcall.worker.base import variables
from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import Counts
from lastcall.worker.inworld.plugin import private_names
from lastcall.worker.inworld.plugin.arguments import DIRECT_PATH, Reason, way_of

log = logging.getLogger("lastcall.inworld")

# Parts of the time to close: by when contexts have ended, close frames are answered, and the plugin's own
# close has returned. Ours: a context may have to speak to its end, a close frame is one round trip, and the
# last tenth is for reporting the counts.
CONTEXTS_SHARE, CONNECTIONS_SHARE, PLUGIN_SHARE = 0.5, 0.8, 0.9
# Seconds that a cancelled task has to end. Ours: the plugin swallows a cancellation (<= 1.8.8), and the job
# must not wait for that.
CANCEL_TIMEOUT = 0.1
# Seconds to tell the broker of a TTS that goes beside the pool. Ours: the broker is on this machine.
TELL_TIMEOUT = 5.0


class LoopConnections:
    """The TTS objects, streams and connections of one loop. Once `is_over` is set the loop opens no more."""

    def __init__(self) -> None:
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self.streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self.connections: list[Any] = []
        # Tasks that tell the broker something, and the session for the broker alone.
        self.telling: set[asyncio.Task[None]] = set()
        self.session: aiohttp.ClientSession | None = None
        self.is_over = False


class PluginConnections:
    """Every connection of the plugin in this process, by loop."""

    def __init__(self) -> None:
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopConnections] = (
            weakref.WeakKeyDictionary()
        )
        self._last_used: weakref.WeakKeyDictionary[Any, weakref.ref[LoopConnections]] = (
            weakref.WeakKeyDictionary()
        )
        self._pooled: weakref.WeakSet[Any] = weakref.WeakSet()
        # Why a TTS goes beside the pool, until the broker is told.
        self._direct: weakref.WeakKeyDictionary[Any, Reason] = weakref.WeakKeyDictionary()

    def attach(self) -> None:
        """Watch the plugin, if it has been imported, and have its TTS objects find the broker."""
        cls = private_names.tts_class()
        if cls is None:
            return
        missing = private_names.direct(cls, route=self._route, session=self._session_of)
        if missing and variables.INWORLD_WS_URL in os.environ:
            text = "the inworld plugin can't be pointed at the pool: its TTS objects go to Inworld directly"
            log.warning(text, extra={"missing": missing})
        private_names.watch(cls, used=self._used, opened=self._opened, is_over=self._is_over)

    @property
    def is_needed(self) -> bool:
        """Whether anything was used on the running loop."""
        here = self._here()
        return bool(here.users or here.connections or here.session)

    async def aclose(self, deadline: float) -> Counts:
        """Cancel every context of the running loop, close every connection; return how many of each how.

        Kinds of which nothing was open are not in the counts. `tts` counts the objects whose own close
        failed.
        """
        here = self._here()
        here.is_over = True
        # A TTS of the agent's module may have been used by another thread's job since: that job closes it.
        users = [tts for tts in here.users if self._last_used[tts]() is here]
        for tts in users:
            private_names.shut(tts)
        began, seconds = now(), max(0.0, deadline - now())
        contexts_at = began + CONTEXTS_SHARE * seconds
        open_before = sum(map(private_names.contexts, here.connections))
        await _all([stream.aclose() for stream in list(here.streams)], contexts_at)
        connections = [each for each in here.connections if private_names.is_open(each)]
        await _all([private_names.cancel_contexts(each) for each in connections], contexts_at)
        await _all([private_names.contexts_end(connections)], contexts_at)
        cut = sum(map(private_names.contexts, connections))
        closes = [private_names.close_connection(each) for each in here.connections]
        forced = await _all(closes, began + CONNECTIONS_SHARE * seconds)
        # For a plugin with other private names this is the whole close, for others it ends helper tasks.
        failed = await _all([tts.aclose() for tts in users], began + PLUGIN_SHARE * seconds)
        here.connections.clear()
        await _all(list(here.telling), deadline)
        if here.session is not None:
            await _all([here.session.close()], deadline)
            here.session = None
        counts: Counts = {}
        if open_before:
            counts["contexts"] = {"closed": max(0, open_before - cut), "forced": cut}
        if connections or forced:
            closed = max(0, len(connections) - forced)
            counts["connections"] = {"closed": closed, "forced": forced}
        if failed:
            counts["tts"] = {"forced": failed}
        if not counts:
            return {}
        level = logging.WARNING if cut or forced or failed else logging.INFO
        log.log(level, "inworld connections closed", extra={"counts": counts})
        return counts

    # -- what the plugin does -------------------------------------------------------------------------

    def _here(self) -> LoopConnections:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return LoopConnections()  # nothing can be opened without a loop
        return self._by_loop.setdefault(loop, LoopConnections())

    def _is_over(self) -> bool:
        return self._here().is_over

    def _route(self, tts: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        way = way_of(arguments, os.environ)
        if way.is_pooled:
            self._pooled.add(tts)
        elif way.reason is not None:
            self._direct[tts] = way.reason
        return way.arguments

    def _session_of(self, tts: Any) -> aiohttp.ClientSession | None:
        """Return the session for the broker: the job's own would go through the proxy, with the key."""
        return self._broker_session() if tts in self._pooled else None

    def _broker_session(self) -> aiohttp.ClientSession:
        here = self._here()
        if here.is_over:
            raise private_names.over_error()
        if here.session is None:
            here.session = aiohttp.ClientSession()
        return here.session

    async def _tell(self, reason: Reason, session: aiohttp.ClientSession) -> None:
        url = urljoin(os.environ.get(variables.INWORLD_URL, ""), DIRECT_PATH)
        headers = {"Authorization": f"Basic {os.environ.get(variables.INWORLD_TOKEN)}"}
        timeout = aiohttp.ClientTimeout(total=TELL_TIMEOUT)
        try:
            async with session.post(url, data=reason, headers=headers, timeout=timeout) as answer:
                answer.raise_for_status()
        except (OSError, aiohttp.ClientError) as error:
            text = "the pool could not be told of a TTS that goes to Inworld directly"
            log.warning(text, extra={"reason": reason, "error": repr(error)})

    def _used(self, tts: Any, stream: Any) -> None:
        here = self._here()
        here.users.add(tts)
        self._last_used[tts] = weakref.ref(here)
        reason = self._direct.pop(tts, None)
        if reason is not None and not here.is_over:
            telling = asyncio.ensure_future(self._tell(reason, self._broker_session()))
            here.telling.add(telling)
            telling.add_done_callback(here.telling.discard)
        if stream is not None:
            here.streams.add(stream)

    def _opened(self, connection: Any) -> None:
        here = self._here()
        # A strong reference: the plugin forgets a connection that broke, and leaves its socket open.
        here.connections = [each for each in here.connections if not _is_done(each)]
        here.connections.append(connection)


def _is_done(connection: Any) -> bool:
    return bool(getattr(connection, "_closed", False)) and not private_names.is_open(connection)


async def _all(waits: Sequence[Awaitable[Any]], deadline: float) -> int:
    """Run all of them at once until the deadline, and return how many overran or failed.

    `asyncio.timeout` would not do: the plugin's aclose() swallows a cancellation (<= 1.8.8), and would go on
    for as long as it likes. A task that does so is left to the end of its loop.
    """
    if not waits:
        return 0
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        _, late = await asyncio.wait(tasks, timeout=max(0.0, deadline - now()))
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=CANCEL_TIMEOUT)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
    return len(late) + sum(_has_failed(task) for task in tasks if task not in late)


def _has_failed(task: asyncio.Task[Any]) -> bool:
    error = None if task.cancelled() else task.exception()
    if error is not None:  # the plugin's or a subclass's own; the others are closed all the same
        log.warning("an inworld resource failed to close", extra={"error": repr(error)})
    return error is not None
