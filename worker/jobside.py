"""What of lastcall runs inside a job process.

livekit-agents pickles `setup_fnc` by reference and runs it in each job process before any job does, so a
callable of this module is the public way in. It must be importable there before the user's path is set:
`compat` adds this module to the forkserver's preload list.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from . import compat_jobs, jobend
from .stopping import STOP_SIGNALS

_PARENT = "LASTCALL_WORKER_PID"


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
    for number in STOP_SIGNALS:
        # Not add_signal_handler: there is no event loop here yet, and nothing to wake.
        signal.signal(number, _ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class Setup:
    """The worker's `setup_fnc`: ours, then the user's. Gives the job its end (`jobend`)."""

    def __init__(self, user: Callable[[Any], Any] | None) -> None:
        self.user = user

    def __call__(self, process: Any) -> Any:
        unmask()
        # Here and not above: it imports livekit-agents, and the forkserver has imported this module first.
        from .inworld.attached import closer

        jobend.begin(process, {"inworld": closer.aclose})
        compat_jobs.at_job_end(jobend.end)
        return None if self.user is None else self.user(process)
