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
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import Counts
from lastcall.worker.inworld.plugin import private_names
from lastcall.worker.inworld.plugin.arguments import broker_arguments

log = logging.getLogger("lastcall.inworld")

# Parts of the time to close: by when contexts have ended, close frames are answered, and the plugin's own
# close has returned. Ours: a context may have to speak to its end, a close frame is one round trip, and the
# last tenth is for reporting the counts.
CONTEXTS_SHARE, CONNECTIONS_SHARE, PLUGIN_SHARE = 0.5, 0.8, 0.9
# Seconds that a cancelled task has to end. Ours: the plugin swallows a cancellation (<= 1.8.8), and the job
# must not wait for that.
CANCEL_TIMEOUT = 0.1


class LoopConnections:
    """What was opened on one loop. Once `is_over` is set nothing may be opened there."""

    def __init__(self) -> None:
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self.streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self.connections: list[Any] = []
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

    def attach(self, environ: Mapping[str, str]) -> None:
        """Watch the plugin, which has been imported, and point it at the broker if there is one."""
        cls = private_names.tts_class()
        if cls is None:
            return
        unknown = private_names.prefill(cls, broker_arguments(environ))
        if unknown:
            text = "the inworld plugin can't be pointed at the pool; use lastcall.inworld.TTS"
            log.warning(text, extra={"no_keywords": unknown})
        private_names.watch(cls, used=self._used, opened=self._opened, is_over=self._is_over)

    @property
    def is_needed(self) -> bool:
        """Whether anything was used on the running loop."""
        here = self._here()
        return bool(here.users or here.connections)

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

    def _used(self, tts: Any, stream: Any) -> None:
        here = self._here()
        here.users.add(tts)
        self._last_used[tts] = weakref.ref(here)
        if stream is not None:
            here.streams.add(stream)

    def _opened(self, connection: Any) -> None:
        here = self._here()
        # A strong reference: the plugin forgets a connection that broke, and leaves its socket open.
        here.connections = [each for each in here.connections if not _is_done(each)]
        here.connections.append(connection)


def _is_done(connection: Any) -> bool:
    return bool(getattr(connection, "_closed", False)) and not private_names.is_open(connection)


async def _all(waits: Sequence[Coroutine[Any, Any, Any]], deadline: float) -> int:
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
