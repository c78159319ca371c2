"""Signals, received by the loop and kept until somebody decides.

A handler records which signal came and when, and wakes; it does not log, raise, or touch state.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
# What workers are born with blocked: they let each in once it can do no harm.
SHIELDED = STOP_SIGNALS | {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
RECEIVED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
BOUND = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A signal, and when the loop was told of it."""

    signal: signal.Signals
    at: float


class Inbox:
    """What has been received and not yet been read. Holds at most BOUND; more of the same say nothing new."""

    def __init__(self) -> None:
        self.changed = Condition()
        self._received: deque[Received] = deque(maxlen=BOUND)

    def put(self, number: int) -> None:
        self._received.append(Received(signal=signal.Signals(number), at=now()))
        self.changed.notify()

    async def get(self) -> Received:
        """Return the next signal, waiting for one."""
        await self.changed.until(lambda: self._received)
        return self._received.popleft()


@contextmanager
def receive(loop: asyncio.AbstractEventLoop, inbox: Inbox) -> Iterator[None]:
    """Have the signals go to the inbox for as long as the block runs, and let in what was blocked before.

    A SIGHUP that was ignored when the program began stays ignored: somebody said nohup.
    """
    handled = [
        number
        for number in RECEIVED
        if not (number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN)
    ]
    for number in handled:
        loop.add_signal_handler(number, inbox.put, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for number in handled:
            loop.remove_signal_handler(number)
