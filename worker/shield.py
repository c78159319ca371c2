"""Keep stop signals, and those that mean something to the supervisor, away from forkserver and jobs; look.

Problem: a stop that reaches a whole group or cgroup reaches the jobs too. livekit-agents sets the job's
dispositions when one of its modules is first imported in a process named job_proc; from 1.8 on that module
is preloaded in the forkserver, so forked jobs never run the line and die of the first SIGTERM.

Options: patch the module (private, differs per version); wrap the user's entrypoint (too late, a process
that is still starting would die); block the signals in the thread that starts the processes. A signal mask
survives fork and exec, so the last covers forkserver, jobs and inference process from their first
instruction, on every version. livekit-agents starts processes with `run_in_executor(None, proc.start)`:
the worker can set the default executor of the loop.

Cost: the mask is inherited by whatever a job starts, too. `job.setup` trades it for a handler that
does nothing, which exec resets, once the job process is up.
"""

from __future__ import annotations

import asyncio
import multiprocessing.resource_tracker
import signal
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

from lastcall.worker.base.stopping import SHIELDED, STOP_SIGNALS, SUPERVISOR_SIGNALS


def raise_shield(loop: asyncio.AbstractEventLoop) -> None:
    """Have every process that livekit-agents starts from now on be born with the stop signals blocked."""
    _start_tracker()
    executor = ThreadPoolExecutor(
        thread_name_prefix="shielded",
        initializer=signal.pthread_sigmask,
        initargs=(signal.SIG_BLOCK, SHIELDED),
    )
    loop.set_default_executor(executor)


def _start_tracker() -> None:
    """Start multiprocessing's resource tracker now, and lose no signal by it.

    It unblocks both signals in the thread that starts it. Later that thread would be one of the executor's;
    now a signal that waits for the loop's handlers would kill us. So it is caught, and made to wait again.
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
