"""Signals and other reasons to stop, as one event with a reason; and which signals a process is open to.

A handler records and wakes, nothing else. Ordinary code reads `Stopping` afterwards, and decides.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lastcall.worker.base.condition import Condition

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
# The supervisor acts on these. A process group that gets one of them has the supervisor in it.
SUPERVISOR_SIGNALS = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
SHIELDED = STOP_SIGNALS | SUPERVISOR_SIGNALS


class Stopping:
    """Set once, by the first reason; later reasons change nothing."""

    def __init__(self, changed: Condition) -> None:
        self.reason = ""
        self.is_set = False
        self._changed = changed

    def begin(self, reason: str) -> None:
        """Record a reason to stop, and wake everybody who waits for one."""
        if not self.is_set:
            self.reason = reason
            self.is_set = True
        self._changed.notify()


@contextmanager
def stop_on_signals(loop: asyncio.AbstractEventLoop, stopping: Stopping) -> Iterator[None]:
    """Let SIGTERM and SIGINT begin the stop for as long as the block runs.

    The caller has blocked both signals since its first statement; they are let in here, once the handlers
    stand, so that one which came early is handled late instead of killing the process.
    """
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stopping.begin, signal.Signals(number).name)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        # Blocked again before the handlers go: between the two a signal would find the default action.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)


def unshielded(pid: int) -> frozenset[signal.Signals]:
    """Return the shielded signals that would end the process: neither blocked, ignored nor caught.

    Read from /proc/PID/status. A process that has ended, or may not be looked at, gives an empty set.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return frozenset()
    safe = 0
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in ("SigBlk", "SigIgn", "SigCgt"):
            safe |= int(value, 16)
        elif name == "State" and value.strip().startswith("Z"):
            return frozenset()
    return frozenset(number for number in SHIELDED if not safe >> (number - 1) & 1)
