"""Close what the Inworld plugin has opened on a loop, when that loop's job ends.

For agents that use livekit-plugins-inworld directly, without a change to them. Left alone, the plugin's
connections are dropped with the job's HTTP session: contexts are cut, no close frame is sent.

What belongs to a job is what lives on its loop. A job process has one loop and one job, a thread of the
thread executor too; and where a TTS object was made (in the entrypoint, in `setup_fnc`, at import) says
nothing about who speaks through it.
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

# Of the time to close: by when contexts have ended, close frames are answered, and the plugin's own close is
# through. The rest is for saying how it went.
CONTEXTS_SHARE, CONNECTIONS_SHARE, PLUGIN_SHARE = 0.5, 0.8, 0.9
# Seconds that something cancelled has to end.
STUBBORN = 0.1


class Held:
    """What was opened on one loop. Once it is over nothing may be opened there."""

    def __init__(self) -> None:
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self.streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self.connections: list[Any] = []
        self.is_over = False


class Closer:
    """Knows every connection of the plugin in this process, by loop."""

    def __init__(self) -> None:
        self._held: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Held] = weakref.WeakKeyDictionary()
        self._last: weakref.WeakKeyDictionary[Any, weakref.ref[Held]] = weakref.WeakKeyDictionary()

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
        held = self._here()
        return bool(held.users or held.connections)

    async def aclose(self, deadline: float) -> Counts:
        """Cancel every context of the running loop, close every connection; return how many of each how.

        What never was open is not in the counts; `tts` is there only for objects whose own close failed.
        """
        held = self._here()
        held.is_over = True
        # A TTS of the module's that another thread's job has taken over since is not this job's to close.
        users = [tts for tts in held.users if self._last[tts]() is held]
        for tts in users:
            private_names.shut(tts)
        began, seconds = now(), max(0.0, deadline - now())
        contexts_at = began + CONTEXTS_SHARE * seconds
        open_before = sum(map(private_names.contexts, held.connections))
        await _all([stream.aclose() for stream in list(held.streams)], contexts_at)
        connections = [each for each in held.connections if private_names.is_open(each)]
        await _all([private_names.cancel_contexts(each) for each in connections], contexts_at)
        await _all([private_names.contexts_end(connections)], contexts_at)
        cut = sum(map(private_names.contexts, connections))
        closes = [private_names.close_connection(each) for each in held.connections]
        forced = await _all(closes, began + CONNECTIONS_SHARE * seconds)
        # What is left is the plugin's own housekeeping, and all there is of one whose shape is unknown.
        failed = await _all([tts.aclose() for tts in users], began + PLUGIN_SHARE * seconds)
        held.connections.clear()
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

    def _here(self) -> Held:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return Held()  # nothing can be opened without a loop
        return self._held.setdefault(loop, Held())

    def _is_over(self) -> bool:
        return self._here().is_over

    def _used(self, tts: Any, stream: Any) -> None:
        held = self._here()
        held.users.add(tts)
        self._last[tts] = weakref.ref(held)
        if stream is not None:
            held.streams.add(stream)

    def _opened(self, connection: Any) -> None:
        held = self._here()
        # Strongly held, because the plugin forgets a connection that broke and leaves its socket open.
        held.connections = [each for each in held.connections if not _is_done(each)]
        held.connections.append(connection)


def _is_done(connection: Any) -> bool:
    return bool(getattr(connection, "_closed", False)) and not private_names.is_open(connection)


async def _all(waits: Sequence[Coroutine[Any, Any, Any]], deadline: float) -> int:
    """Run all of them at once until the deadline, and return how many overran or failed.

    Not `asyncio.timeout`: the plugin's aclose() swallows a cancellation (≤ 1.8.8), and would go on for as
    long as it likes. What does so is left to the end of its loop.
    """
    if not waits:
        return 0
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        _, late = await asyncio.wait(tasks, timeout=max(0.0, deadline - now()))
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=STUBBORN)
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
