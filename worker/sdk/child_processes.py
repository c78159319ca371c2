"""Mend multiprocessing, and how livekit-agents uses it, once in a worker, before the target is loaded.

`preflight` has looked for the private names. No function does anything twice.
"""

from __future__ import annotations

import contextlib
import multiprocessing.context
import multiprocessing.popen_forkserver
import multiprocessing.process
import multiprocessing.util
import os
import socket
import sys
import threading
from multiprocessing.connection import wait as wait_readable
from typing import Any

# multiprocessing gives this exit code to a child whose status it can't read (popen_forkserver.py, `poll`).
STATUS_LOST = 255
# Job processes unpickle the `setup_fnc` from here. The forkserver imports it, before the user's path is set.
PRELOADED = ("lastcall.worker.job.preload", "lastcall.worker.job.setup")
# Imported too, in front of the plugin, where the user's module has imported the plugin.
PRELOADED_FOR = {"livekit.plugins.inworld": "lastcall.worker.inworld.plugin.attached"}


def lock_process_poll() -> None:
    """Read a forkserver child's exit status once, and take no living process for an ended one.

    Two threads poll one process: the join thread and the loop's `is_alive`. Both find the status pipe
    readable. The second reads end of file and takes that for exit code 255, and a job that ended well is
    reported failed. The lock lies around the read only: the join thread waits for hours.

    End of file is also all there is when the forkserver itself has been killed, and the job lives on. Taken
    for the end, it would have the job's channels closed, which ends the job. So a pidfd tells the end of the
    process. The first look at the process opens the pidfd, and the join thread looks at once.

    A process whose call was over (`count_as_good`) has ended well, however it ended. `returncode` stays true.
    """
    popen = multiprocessing.popen_forkserver.Popen
    original = popen.poll
    if getattr(original, "is_locked", False):
        return
    lock = threading.Lock()

    def poll(self: Any, flag: int = os.WNOHANG) -> int | None:
        timeout = 0 if flag == os.WNOHANG else None
        with lock:
            watch(self)
        if self.returncode is None:
            if not wait_readable([self.sentinel], timeout):
                return None
            with lock:
                if self.returncode is None:
                    original(self, os.WNOHANG)
                    if self.returncode == STATUS_LOST and not wait_readable([self.pidfd], 0):
                        self.returncode = None
            if self.returncode is None:  # alive, and its status will be told to nobody
                if not wait_readable([self.pidfd], timeout):
                    return None
                self.returncode = STATUS_LOST
        code: int | None = self.returncode
        return 0 if code is not None and getattr(self, "call_is_over", False) else code

    def watch(self: Any) -> None:
        if getattr(self, "pidfd", None) is None:
            self.pidfd = _pidfd(self.pid)
            multiprocessing.util.Finalize(self, os.close, (self.pidfd,))

    poll.is_locked = True  # type: ignore[attr-defined]  # a mark on the function above
    popen.poll = poll  # type: ignore[method-assign]  # that is the mend


def start_while_others_end() -> None:
    """Have the start of a process not fail because another one is being closed in another thread.

    A start looks at every child. `close` takes the Popen of its child away before it takes the child out of
    their set, and a look between the two raised AttributeError up to CPython 3.11.3
    (https://github.com/python/cpython/issues/104536). One start of some thousands failed so, when many jobs
    ended and began at once. A worker whose process has failed, and that has no other, takes no job for half a
    second.
    """
    process = multiprocessing.process
    if sys.version_info >= (3, 11, 4) or not (hasattr(process, "_cleanup") and hasattr(process, "_children")):
        return

    def cleanup() -> None:
        for child in list(process._children):  # type: ignore[attr-defined]  # not in its stub
            popen = child._popen
            if popen is not None and popen.poll() is not None:
                process._children.discard(child)  # type: ignore[attr-defined]

    process._cleanup = cleanup


def count_as_good(process: Any) -> Any:
    """Have the exit of a multiprocessing.Process read as 0; return what has the true `returncode`.

    Returns None for a thread. Works after `lock_process_poll`.
    """
    popen = getattr(process, "_popen", None)
    if popen is not None:
        popen.call_is_over = True
    return popen


def _pidfd(pid: int) -> int:
    """Return a descriptor that is readable once the process is gone; of one that is gone already, too."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return os.open(os.devnull, os.O_RDONLY)


def preload_ours() -> None:
    """Add modules of lastcall to every forkserver preload list. livekit-agents sets the list at its start."""
    context = multiprocessing.context.ForkServerContext
    original = context.set_forkserver_preload

    def set_forkserver_preload(self: Any, modules: list[str]) -> None:
        ours = [*PRELOADED, *(ours for theirs, ours in PRELOADED_FOR.items() if theirs in modules)]
        original(self, [*ours, *(name for name in modules if name not in ours)])

    context.set_forkserver_preload = set_forkserver_preload  # type: ignore[assignment]  # no public hook


def keep_interrupt_handler() -> None:
    """Stop livekit-agents from ignoring SIGINT in the main process while it starts a job process.

    It does so to protect the child; the shield protects it already, and a SIGINT in that window was lost.
    """
    from livekit.agents.ipc import supervised_proc

    if hasattr(supervised_proc, "_mask_ctrl_c"):
        supervised_proc._mask_ctrl_c = contextlib.nullcontext


def end_log_pipes() -> None:
    """Have the end of a job's process be the end of its log, also while another process holds the pipe.

    A process that a job forked inherits the pipe, and livekit-agents says that a job has ended only once the
    pipe is at end of file. The job's whole drain would be spent waiting for a child that it left behind. The
    worker still reads all that was written before.
    """
    from livekit.agents.ipc.log_queue import LogQueueListener

    original = LogQueueListener.stop
    if getattr(original, "is_bounded", False):
        return

    def stop(self: Any) -> None:
        pipe = self._duplex._sock
        if pipe is not None:  # it is None once the pipe was closed
            with contextlib.suppress(OSError):  # closed already
                pipe.shutdown(socket.SHUT_RD)
        original(self)

    stop.is_bounded = True  # type: ignore[attr-defined]  # a mark on the function above
    LogQueueListener.stop = stop
