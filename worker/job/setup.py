"""What of lastcall runs inside a job process.

livekit-agents pickles `setup_fnc` by reference and runs it in each job process before any job does, so a
callable of this module is the public way in. It must be importable there before the user's path is set:
`sdk.child_processes` adds this module to the forkserver's preload list.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

from lastcall.worker.base.clock import now
from lastcall.worker.base.stopping import SHIELDED, STOP_SIGNALS
from lastcall.worker.job import teardown
from lastcall.worker.sdk import job_process

_PARENT = "LASTCALL_WORKER_PID"
# The rehearsal looks for these lines in what the workers write. Warnings, not info: an agent may log from
# warnings on.
HELD_IN_REHEARSAL = "entrypoint begins in the rehearsal"
FAILED_IN_REHEARSAL = "entrypoint failed in the rehearsal"
SHUTDOWN_IN_REHEARSAL = "shutdown was asked for in the rehearsal"
OVER_IN_REHEARSAL = "entrypoint is over in the rehearsal"

log = logging.getLogger("lastcall.worker")


def _ignore(number: int, frame: FrameType | None) -> None:
    """Take the signal and do nothing: the worker decides when a job ends."""


def unmask() -> None:
    """Let the programs that a job starts be stopped again, without letting the job itself be.

    A blocked or ignored signal is inherited through exec, a handler is not. So the mask that shielded the
    process while it started gives way to a handler that does nothing; handler first, then unmask, so that
    there is no instant in which the default action applies. Only in the main thread of a job process: with
    the thread executor the process is the worker's own, and its handlers are the stop itself.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if os.environ.get(_PARENT) == str(os.getpid()):
        return
    for number in SHIELDED:
        # Not add_signal_handler: there is no event loop here yet, and nothing to wake. A handler that is
        # there already is livekit-agents' own, for stack dumps, and harmless.
        if number in STOP_SIGNALS or signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED)


def has_handler() -> bool:
    """Tell whether the agent has put a handler of its own for SIGTERM into this job process."""
    if os.environ.get(_PARENT) == str(os.getpid()):
        return False  # the thread executor: the handler is the worker's
    return signal.getsignal(signal.SIGTERM) not in (_ignore, signal.SIG_IGN, signal.SIG_DFL)


class Setup:
    """The worker's `setup_fnc`: ours, then the user's. Gives the job its end (`teardown`)."""

    def __init__(self, user: Callable[[Any], Any] | None) -> None:
        self.user = user

    def __call__(self, process: Any) -> Any:
        unmask()
        # Here and not above: it imports livekit-agents, and the forkserver has imported this module first.
        from lastcall.worker.inworld.plugin.attached import plugin_connections

        teardown.begin(process, {"inworld": plugin_connections.aclose})
        job_process.at_job_end(teardown.end)
        return None if self.user is None else self.user(process)


class Held:
    """A rehearsal's entrypoint: the user's for so many seconds, and the job held open until they are over.

    In a mock room the user's own may fail, wait for ever, or shut the job down for want of a caller; none of
    these says anything about a stop. A shutdown by a signal handler of its own does, so each is told.
    """

    def __init__(self, user: Callable[[Any], Awaitable[None]], seconds: float) -> None:
        self.user = user
        self.seconds = seconds

    async def __call__(self, context: Any) -> None:
        end = asyncio.get_running_loop().time() + self.seconds
        which = {"held_job": context.job.id}
        log.warning(HELD_IN_REHEARSAL, extra=which)

        def asked(*_: object, **__: object) -> None:
            extra = {**which, "held_at": now(), "has_handler": has_handler()}
            log.warning(SHUTDOWN_IN_REHEARSAL, extra=extra)

        shutdown, context.shutdown = context.shutdown, asked
        try:
            async with asyncio.timeout_at(end):
                await self.user(context)
        except TimeoutError:
            pass  # ours, or its own: held or failed, the job goes on to its end
        except Exception as error:
            log.warning(FAILED_IN_REHEARSAL, extra={"error": repr(error)})
        await asyncio.sleep(end - asyncio.get_running_loop().time())
        log.warning(OVER_IN_REHEARSAL, extra=which)
        shutdown(reason="the rehearsal is over")
