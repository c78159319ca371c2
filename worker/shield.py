"""Keep stop signals, and those that mean something to the supervisor, away from forkserver and jobs; look.

Problem: a stop that reaches a whole group or cgroup reaches the jobs too. A module of livekit-agents sets the
dispositions of a job process, once, when a process named job_proc first imports the module. From 1.8 on the
forkserver preloads the module. A forked job therefore never runs that line, and dies of the first SIGTERM.

There are three ways out. A patch of the module would depend on private code that differs per version. A
wrapper of the user's entrypoint comes too late, because a process that is still starting would die. The third
way blocks the signals in the thread that starts the processes. A signal mask survives fork and exec. The mask
of that thread therefore covers forkserver, jobs and inference process from their first instruction, on every
version. The worker can choose that thread: livekit-agents starts processes with
`run_in_executor(None, proc.start)`, and the worker sets the default executor of the loop.

Cost: every program that a job starts inherits the mask too. Once the job process is up, `job.setup` replaces
the mask by a handler that does nothing, which exec resets.
"""

from __future__ import annotations

import asyncio
import multiprocessing.resource_tracker
import signal
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

from lastcall.worker.base.stopping import SHIELDED, STOP_SIGNALS, SUPERVISOR_SIGNALS


def raise_shield(loop: asyncio.AbstractEventLoop) -> None:
    """Have every process that livekit-agents starts from now on begin with the stop signals blocked."""
    _start_tracker()
    executor = ThreadPoolExecutor(
        thread_name_prefix="shielded",
        initializer=signal.pthread_sigmask,
        initargs=(signal.SIG_BLOCK, SHIELDED),
    )
    loop.set_default_executor(executor)


def _start_tracker() -> None:
    """Start multiprocessing's resource tracker now, and lose no signal by it.

    `ensure_running` unblocks both stop signals in the calling thread. A later start would unblock them in a
    thread of the executor, and so in the jobs. A start now exposes the worker: a signal that waits for the
    loop's handlers would kill the worker. So a handler catches such a signal, and the worker raises it again
    once the signals are blocked.
    """
    caught: list[int] = []

    def catch(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    # Not add_signal_handler: no loop runs yet, and uvloop forgets what comes before one does.
    before = {number: signal.signal(number, catch) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_BLOCK, SUPERVISOR_SIGNALS)  # the tracker keeps these blocked
    try:
        multiprocessing.resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in caught:
            signal.raise_signal(each)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SUPERVISOR_SIGNALS)
