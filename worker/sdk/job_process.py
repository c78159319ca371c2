"""The private names of livekit-agents that lastcall touches inside job processes.

Apart from `agent_server`, whose names are the worker's: this module is imported in the forkserver and in
every job. `preflight` has looked for the names, in the worker.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import Any


def on_plugin(package: str, registered: Callable[[], None]) -> None:
    """Call back when the plugin of this package registers itself, at once if it has. Public, undocumented."""
    from livekit.agents import Plugin

    def on_registered(plugin: Any) -> None:
        if plugin.package == package:
            registered()

    Plugin.emitter.on("plugin_registered", on_registered)
    for plugin in list(Plugin.registered_plugins):
        on_registered(plugin)


def at_job_end(end: Callable[[Any], Awaitable[None]]) -> None:
    """Have `end(ctx)` awaited as the last thing of each job that may still use the network.

    In front of `http_context._close_http_ctx`, which ends the job's HTTP session: after the session, the
    user's shutdown callbacks and the job's tasks, on each version, and on 1.8 also when the job is cancelled.
    """
    from livekit.agents import get_job_context
    from livekit.agents.utils import http_context

    original = http_context._close_http_ctx
    if getattr(original, "is_job_end", False):
        return

    async def close_http_ctx() -> None:
        try:
            try:
                ctx = get_job_context()
            except RuntimeError:
                return  # `http_context.open()` in a script: no job ends
            await end(ctx)
        finally:
            await original()

    close_http_ctx.is_job_end = True  # type: ignore[attr-defined]  # a mark on the function above
    http_context._close_http_ctx = close_http_ctx


def dump_stacks_at(number: signal.Signals) -> None:
    """Have the job write its stacks at this signal, which livekit-agents sends before it kills a stuck job.

    livekit-agents sets the handler while a job process imports its module. A process that was forked with
    the module imported has no handler. Nothing is written without `LK_DUMP_STACK_TRACES`.
    """
    from livekit.agents.ipc import proc_client

    if hasattr(proc_client, "_dump_stack_traces"):
        signal.signal(number, proc_client._dump_stack_traces)
