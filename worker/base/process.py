"""The process that runs this code: its memory, its core dumps, its end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
# The name of a forkserver that was forked from its worker, and of the job processes that it forks: they have
# the command line of the worker. A program that a job starts by exec has another name.
FORKSERVER = b"forkserver"
# The name of a resource tracker that was forked from its worker.
TRACKER = b"tracker"
# Seconds for a resource tracker to remove shared memory and semaphores, once all processes that know of them
# have ended. Ours: a few milliseconds are usual.
TRACKER_ENDS_WITHIN = 0.5
# The name of an image, which has the command line of a worker too, and of its forks until they are workers.
IMAGE = b"lastcall-image"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def rss_bytes() -> int:
    """Return the resident size of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE_BYTES


def forbid_dumps() -> bool:
    """Keep secrets out of core dumps, and from casual reads of the memory; False where the system can't.

    That is no boundary: another process of the same user may still trace this one.
    """
    return bool(ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


def end_with_parent() -> None:
    """Have the kernel kill this process at the end of its parent, stopped or not. No fork inherits that."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> bool:
    """Become the parent of descendants whose own parent ends; False where the system can't."""
    return bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def set_name(name: bytes) -> None:
    """Name the calling thread, and the process if it has no other: /proc/PID/comm, at most 15 bytes."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)


def name() -> bytes:
    """Return the name of this process, as `set_name` sets it."""
    return Path("/proc/self/comm").read_bytes().rstrip(b"\n")


def rewrite_variable(name: str, value: str) -> None:
    """Change a variable of this process where other processes read it, in /proc/PID/environ, and for exec.

    The kernel shows the memory that held the environment at exec, and a fork copies that memory. Raises
    OSError where the variable is not there, or its value has another length.
    """
    # The fields 50 and 51 of proc_pid_stat(5). The third one follows the name, which may contain anything.
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(stat[50 - 3]), int(stat[51 - 3])
    text = ctypes.string_at(start, end - start) if start else b""
    head = b"\0" + os.fsencode(name) + b"="
    at = (b"\0" + text).find(head)
    new = os.fsencode(value)
    first = at + len(head) - 1
    if at < 0 or text.find(b"\0", first) - first != len(new):
        raise OSError(f"{name} can't be changed in place")
    ctypes.memmove(start + first, new, len(new))
    os.environ[name] = value


def leave(code: int) -> NoReturn:
    """End this process at once, with its output written, and without the end of the interpreter.

    The interpreter would join every thread first, and a thread that hangs in a write would hold it for ever.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # nobody reads any more, or the stream is closed
    os._exit(code)
