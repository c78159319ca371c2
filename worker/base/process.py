"""The process that runs this code: its memory, its core dumps, its end."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import NoReturn

# linux/prctl.h
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
# The name of a forkserver that was forked from its worker, and of the job processes that it forks: they have
# the command line of the worker. A program that a job starts by exec has another name.
FORKSERVER = b"forkserver"
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


def set_name(name: bytes) -> None:
    """Name the calling thread, and the process if it has no other: /proc/PID/comm, at most 15 bytes."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)


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
