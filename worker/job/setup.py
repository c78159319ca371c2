"""The part of lastcall that runs in a job process before the job does.

livekit-agents pickles `setup_fnc` by reference and runs it in each job process before any job does, so a
callable of this module is the public way in. The module must be importable there before the user's path is
set: `sdk.child_processes` adds it to the forkserver's preload list.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from lastcall.worker.base import calls_over, loggers, setup_errors
from lastcall.worker.base.memory import die_before, oom_adjustment
from lastcall.worker.base.stopping import SHIELDED, STOP_SIGNALS
from lastcall.worker.base.variables import WORKER_PID
from lastcall.worker.base.wire import Counts
from lastcall.worker.job import call, room_watch, teardown
from lastcall.worker.sdk import job_process

# Steps of oom_score_adj above that of the worker, in thousandths of the memory. Ours: a forkserver holds
# about as much as a job, and all of its jobs end with it.
JOBS_DIE_BEFORE = 50


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
    if os.environ.get(WORKER_PID) == str(os.getpid()):
        return
    for number in SHIELDED:
        # Not add_signal_handler: there is no event loop here yet, and nothing to wake. A handler that is
        # there already is livekit-agents' or the agent's, and harmless.
        if number in STOP_SIGNALS or signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _ignore)
            if number == signal.SIGUSR1:
                job_process.dump_stacks_at(number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED)


def has_handler() -> bool:
    """Tell whether the agent has set a handler for SIGTERM in this job process."""
    if os.environ.get(WORKER_PID) == str(os.getpid()):
        return False  # the thread executor: the handler is the worker's
    return signal.getsignal(signal.SIGTERM) not in (_ignore, signal.SIG_IGN, signal.SIG_DFL)


class Setup:
    """The `setup_fnc` of the worker: prepare the process and the end of its job, then call the user's."""

    def __init__(
        self, user: Callable[[Any], Any] | None, over: Connection, calls: str, *, is_local: bool = False
    ) -> None:
        self.user = user
        self.over = over  # the writer of `CallsOver`: a descriptor, which only multiprocessing can pickle
        self.calls = calls  # the address of `worker.call_channels`
        self.is_local = is_local  # whether jobs have the room of `worker.local`, for want of a media server

    def __call__(self, process: Any) -> Any:
        unmask()
        loggers.enable()
        if os.environ.get(WORKER_PID) != str(os.getpid()):
            die_before(oom_adjustment() + JOBS_DIE_BEFORE)
        # Here and not above: it imports livekit-agents, and the forkserver has imported this module first.
        from lastcall.worker.inworld.plugin.attached import plugin_connections

        os.set_inheritable(self.over.fileno(), False)  # none of the programs that the job starts
        tell = functools.partial(calls_over.tell, self.over)
        call.begin(process, self.calls)

        async def end_call(_deadline: float) -> Counts:
            return await call.end(process)

        teardown.begin(process, {"inworld": plugin_connections.aclose, "call": end_call}, tell)
        room_watch.begin(process, tell)
        job_process.at_job_end(teardown.end)
        if self.is_local:
            from lastcall.worker.local import room

            room.install()
        return None if self.user is None else self._set_up(self.user, process)

    @staticmethod
    def _set_up(user: Callable[[Any], Any], process: Any) -> Any:
        """Call the user's function. An exception always has a text.

        livekit-agents sends the text to the worker, and takes an empty one, as that of a bare `assert`, for
        success (ipc/proc_client.py and ipc/supervised_proc.py).
        """
        try:
            return user(process)
        except Exception as error:
            text = str(error) or repr(error)
            if os.environ.get(WORKER_PID) == str(os.getpid()):
                setup_errors.tell(text)
            if text == str(error):
                raise
            raise RuntimeError(text) from error
