"""Every private name of livekit-plugins-inworld that lastcall touches.

    version     connections                         the end of a context
    ≤ 1.8.8     in a pool, `TTS._get_pool`          `close_context(id)`: the server speaks to the end first
    ≥ 1.8.9     one, `TTS._get_connection`          `close_context(id, cancel=True)`

On both a connection is an `_InworldConnection` with `_contexts`, an `_outbound_queue`, its socket in `_ws`
and its end in `_closed`. `sdk.names` lists the names. Where the installed plugin lacks one, `watch` leaves
its connections alone: the streams are closed, then the TTS itself, by their public `aclose()`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from lastcall.worker.sdk import preflight
from lastcall.worker.sdk.names import INWORLD, NAMES

log = logging.getLogger("lastcall.inworld")

PACKAGE = "livekit.plugins.inworld"

# Loop turns after which the plugin's sender has written an item that it took out of its queue. The sender
# waits in `asyncio.wait_for`, which hands an item over in up to three turns. Ours: two more.
SENDER_TURNS = 5
# Seconds between two looks at a queue or at contexts. Ours: the plugin has no event for either, and 5 ms are
# short beside a round trip to Inworld.
POLL_INTERVAL = 0.005


def load() -> ModuleType:
    """Import the plugin. Raises ImportError with one line that says how to install it."""
    try:
        return importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"lastcall.inworld.TTS needs livekit-plugins-inworld ({error}): pip install 'lastcall[inworld]'"
        ) from None


def tts_class() -> Any | None:
    """Return the plugin's TTS class if the plugin has been imported."""
    return getattr(sys.modules.get(PACKAGE), "TTS", None)


# -- before it is used -------------------------------------------------------------------------------------


def direct(
    cls: Any, *, route: Callable[[Any, Mapping[str, Any]], dict[str, Any]], session: Callable[[Any], Any]
) -> list[str]:
    """Put `route` in front of the constructor; return the names without which that can't be.

    `route(tts, arguments)` returns the arguments to construct the TTS with. `session(tts)` returns the HTTP
    session that the TTS has to use; None for the plugin's own.
    """
    if getattr(cls.__init__, "is_routed", False):
        return []
    keywords = getattr(inspect.unwrap(cls.__init__), "__kwdefaults__", None) or {}
    missing = {"api_key", "ws_url", "base_url"} - keywords.keys()
    if not hasattr(cls, "_ensure_session"):
        missing |= {"_ensure_session"}
    if missing:
        return sorted(missing)
    init, ensure_session = cls.__init__, cls._ensure_session

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **arguments: Any) -> None:
        init(self, *args, **route(self, arguments))

    @functools.wraps(ensure_session)
    def choose_session(self: Any) -> Any:
        chosen = session(self)
        return ensure_session(self) if chosen is None else chosen

    construct.is_routed = True  # type: ignore[attr-defined]  # a mark, for the next call
    cls.__init__, cls._ensure_session = construct, choose_session
    return []


def watch(
    cls: Any, *, used: Callable[[Any, Any], None], opened: Callable[[Any], None], is_over: Callable[[], bool]
) -> None:
    """Report every use of a TTS and every new connection, and refuse a connection once `is_over()` is true.

    `used` gets the TTS and its new stream, or None for a prewarm. `opened` gets the connection. The reports
    come from the uses and not from the constructor of the TTS, because a connection lives on the loop of the
    use.
    """
    if getattr(getattr(cls, "stream", None), "is_watched", False):
        return
    for name in ("stream", "synthesize", "prewarm"):  # public
        if hasattr(cls, name):
            setattr(cls, name, _reported(getattr(cls, name), used))

    lacks = preflight.lacks(name for name in NAMES if name.package == INWORLD)
    if lacks:
        text = "a private name is missing"
        log.warning(text, extra={"missing": lacks[0].text, "instead": lacks[0].name.without})
        return

    def refuse(_self: Any) -> None:
        if is_over():
            raise over_error()

    for name in ("_get_pool", "_get_connection"):
        if hasattr(cls, name):
            setattr(cls, name, _before(getattr(cls, name), refuse))
    connection = getattr(sys.modules[cls.__module__], "_InworldConnection", None)
    if connection is not None:
        connection.__init__ = _before(_before(connection.__init__, opened), refuse)


def _before(method: Any, call: Callable[[Any], None]) -> Any:
    """Return the method with `call(self)` in front of it."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        call(self)
        return method(self, *args, **kwargs)

    return wrapper


def _reported(method: Any, call: Callable[[Any, Any], None]) -> Any:
    """Return the method with `call(self, result)` behind it."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        call(self, result)
        return result

    wrapper.is_watched = True  # type: ignore[attr-defined]  # a mark on the wrapper
    return wrapper


def over_error() -> Exception:
    """Return the error of a call that comes after the end of the job."""
    from livekit.agents import APIConnectionError

    text = "the job has ended, and its Inworld connections with it"
    error: Exception = APIConnectionError(text, retryable=False)
    return error


# -- the end -----------------------------------------------------------------------------------------------


def shut(tts: Any) -> None:
    """Have the pool take nobody in any more, and stop a prewarm that is under way."""
    pool = getattr(tts, "_pool", None)
    if pool is not None and hasattr(pool, "_closed"):
        pool._closed = True
    prewarm = getattr(tts, "_prewarm_task", None)
    if prewarm is not None:
        prewarm.cancel()


def contexts(connection: Any) -> int:
    """Return how many contexts the server may still count on a connection."""
    return len(getattr(connection, "_contexts", ())) if is_open(connection) else 0


def is_open(connection: Any) -> bool:
    """Tell whether the connection's socket is open; also of one that the plugin has given up (≤ 1.8.8)."""
    ws = getattr(connection, "_ws", None)
    return ws is not None and not ws.closed


async def cancel_contexts(connection: Any) -> None:
    """Ask the server to stop every context that its stream has not cancelled.

    livekit-plugins-inworld up to 1.8.8 has no cancel, and after its close the server speaks to the end. This
    function therefore sends the frame itself. It waits until the sender has emptied its queue, because a
    cancel that overtook its create would leave the context open.
    """
    close = getattr(connection, "close_context", None)
    if close is not None and "cancel" in inspect.signature(close).parameters:
        for context in list(connection._contexts.values()):
            if context.state.value != "closing":
                close(context.context_id, cancel=True)
        return
    queue = getattr(connection, "_outbound_queue", None)
    while queue is not None and not queue.empty() and not connection._closed:  # noqa: ASYNC110  # nobody tells
        await asyncio.sleep(POLL_INTERVAL)
    for _ in range(SENDER_TURNS):
        await asyncio.sleep(0)
    for id in list(getattr(connection, "_contexts", ())):
        if is_open(connection):
            await connection._ws.send_str(json.dumps({"cancel_context": {}, "contextId": id}))


async def contexts_end(connections: Iterable[Any]) -> None:
    """Wait until the server has closed every context."""
    watched = list(connections)
    while any(contexts(each) for each in watched):  # noqa: ASYNC110  # the plugin has no event for it
        await asyncio.sleep(POLL_INTERVAL)


async def close_connection(connection: Any) -> None:
    """Close a connection with a close frame and wait for the server's.

    The plugin cancels its reader first, and an interrupted reader makes aiohttp skip the reply. Closed from
    beside it, the reader ends by itself.
    """
    connecting = getattr(connection, "_connect_task", None)
    if connecting is not None and not connecting.done():
        connecting.cancel()
        await asyncio.wait([connecting])
    connection._closed = True
    if is_open(connection):
        await connection._ws.close()
    await connection.aclose()
