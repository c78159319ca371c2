"""Signals and other reasons to stop, as one event with a reason and a count.

A handler records and wakes, nothing else. Whoever decides reads `Stopping` afterwards, from ordinary code.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from lastcall.worker.base.condition import Condition

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
# What they ask for is the supervisor's to do; whoever sends them to a whole group means it, too.
OTHERS = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
SHIELDED = STOP_SIGNALS | OTHERS


class Stopping:
    """Set once, by the first reason; later ones only count."""

    def __init__(self, changed: Condition) -> None:
        self.reason = ""
        self.count = 0
        self._changed = changed

    @property
    def is_set(self) -> bool:
        return self.count > 0

    def begin(self, reason: str) -> None:
        """Record a reason to stop and wake who waits for one."""
        self.count += 1
        if self.count == 1:
            self.reason = reason
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
