"""lastcall: a process supervisor for LiveKit agent workers. A stop cuts no call.

The command `lastcall`, also `python -m lastcall`, supervises the workers of an unmodified agent. An agent
imports this package for the following names, which are the whole public API:

call(ctx)
    The `Call` of the job of `ctx`. An agent hears through it that its worker stops, and until when the call
    should have ended: `notice = await call.stopping`, or `call.on_stopping(fn)`. Since 0.2.0.

    Where the agent keeps its state, by `call.keep`, the call can go on in another job. `call.on_takeover`,
    `call.on_take_back`, `call.busy` and `call.hand_over` are for the agent that leaves. `call.resumed` and
    `call.take_over` are for the one that goes on. Since 0.2.0.

Call, Notice, Resumed
    The classes of `call(ctx)`, of what a call is told, and of `call.resumed`, for annotations. Since 0.2.0.

Withdrawn
    Raised by `call.take_over()`, and by `ctx.connect()` of a successor, if the call stays where it is. Since
    0.2.0.

closing(ctx, closable)
    Closes `closable` when the job of `ctx` ends, and returns `closable`. Since 0.2.0.

inworld.TTS(**arguments)
    The text-to-speech class of livekit-plugins-inworld, pointed at lastcall's connection pool where there is
    one. `from lastcall import inworld` takes the place of `from livekit.plugins import inworld`. The first
    use of `inworld.TTS` raises ImportError where livekit-plugins-inworld is not installed; the extra
    `lastcall[inworld]` installs the plugin. Since 0.2.0.

resume_session(call, session, agents=[…])
    Has an AgentSession go on in another job when its call is handed over, and returns its `Resumption`.
    `is_resumed(agent)` tells `on_enter` of an agent whether it goes on with a call. Since 0.2.0.

__version__
    The version of the installed distribution, a str such as "0.2.0". Its use raises
    importlib.metadata.PackageNotFoundError where lastcall is on the path but not installed. Since 0.2.0.

`import lastcall` loads neither asyncio nor livekit nor aiohttp: each name is imported when it is first used.
Python runs this file before the first statement of every process of lastcall. That first statement blocks
the stop signals, and a SIGTERM that arrives earlier kills the process without a receipt.
"""

from __future__ import annotations

# Type checkers take a variable of this name for true. `from typing import TYPE_CHECKING` would load `typing`,
# which takes some milliseconds, before a process can block its stop signals.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from lastcall.worker import inworld
    from lastcall.worker.job.arriving import Resumed, Withdrawn
    from lastcall.worker.job.call import Call, Notice, call
    from lastcall.worker.job.session import Resumption, is_resumed, resume_session
    from lastcall.worker.job.teardown import closing

    __version__: str

__all__ = [
    "Call",
    "Notice",
    "Resumed",
    "Resumption",
    "Withdrawn",
    "__version__",
    "call",
    "closing",
    "inworld",
    "is_resumed",
    "resume_session",
]


def __getattr__(name: str) -> object:
    """Import a public name at its first use. Raises AttributeError for a name that is not public."""
    if name == "closing":
        from lastcall.worker.job.teardown import closing

        return closing
    if name in ("Call", "Notice", "call"):
        from lastcall.worker.job import call

        return getattr(call, name)
    if name in ("Resumed", "Withdrawn"):
        from lastcall.worker.job import arriving

        return getattr(arriving, name)
    if name in ("Resumption", "is_resumed", "resume_session"):
        from lastcall.worker.job import session

        return getattr(session, name)
    if name == "inworld":
        from lastcall.worker import inworld

        return inworld
    if name == "__version__":
        from importlib.metadata import version

        return version("lastcall")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names too, so that help() and completion show them before their first use."""
    return sorted({*globals(), *__all__})
