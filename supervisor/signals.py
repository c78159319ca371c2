"""Signals, received by the loop and kept until somebody decides.

A handler records which signal came and when, and wakes; it does not log, raise, or touch state.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.records import dataclass
from lastcall.worker.base.stopping import STOP_SIGNALS

_ONE_MORE_OR_FEWER = (
    "one worker more, one fewer. With a terminal both are ignored, because the terminal sends them to a"
    " background job; `lastcall scale` does the same"
)
# Each signal that is received, and its meaning, which `scripts/reference` renders into docs/signals.md.
MEANINGS = {
    signal.SIGTERM: "stop: nothing new is accepted, jobs end by themselves within grace. Repeats change"
    " nothing",
    signal.SIGINT: "the same. On a terminal a second one (0.3 s later or more) asks the jobs to shut down"
    " now, a third kills",
    signal.SIGQUIT: "kill now, with a receipt",
    signal.SIGHUP: "rolling reload; on a terminal a stop, because the terminal was closed",
    signal.SIGUSR1: "hold: accept nothing new until it comes again",
    signal.SIGUSR2: "each worker writes the stack of its main thread to standard error",
    signal.SIGTTIN: _ONE_MORE_OR_FEWER,
    signal.SIGTTOU: _ONE_MORE_OR_FEWER,
}
RECEIVED = tuple(MEANINGS)
# The terminal driver sends these to a background job that reads or writes (termios(3), `stty tostop`).
FROM_THE_TERMINAL = (signal.SIGTTIN, signal.SIGTTOU)
# Signals that wait to be read. Ours: far more than anybody sends between two turns of the loop.
MAX_UNREAD_SIGNALS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedSignal:
    """A signal, and when the loop was told of it, by the monotonic clock."""

    signal: signal.Signals
    at: float


class Inbox:
    """The signals received and not yet read. Beyond MAX_UNREAD_SIGNALS the oldest are dropped."""

    def __init__(self) -> None:
        self.changed = Condition()
        self._received: deque[ReceivedSignal] = deque(maxlen=MAX_UNREAD_SIGNALS)

    def put(self, number: int) -> None:
        """Record a signal, and wake."""
        self._received.append(ReceivedSignal(signal=signal.Signals(number), at=now()))
        self.changed.notify()

    async def get(self) -> ReceivedSignal:
        """Return the next signal, waiting for one."""
        await self.changed.until(lambda: self._received)
        return self._received.popleft()


@contextmanager
def receive(loop: asyncio.AbstractEventLoop, inbox: Inbox) -> Iterator[None]:
    """Have the signals go to the inbox for as long as the block runs, and let in what was blocked before.

    A SIGHUP that was ignored when the program began stays ignored: somebody said nohup. With a controlling
    terminal SIGTTIN and SIGTTOU are ignored, because there the terminal driver sends them and no operator
    does. A handler is no way out: the kernel restarts the write that SIGTTOU has interrupted, without end.
    """
    ignored = FROM_THE_TERMINAL if has_terminal() else ()
    handled = [
        number
        for number in RECEIVED
        if number not in ignored
        and not (number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN)
    ]
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)  # not undone below: the last lines are still being written
    for number in handled:
        loop.add_signal_handler(number, inbox.put, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        # Blocked again before the handlers go: between the two a signal would find the default action.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for number in handled:
            loop.remove_signal_handler(number)


def has_terminal() -> bool:
    """Tell whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
