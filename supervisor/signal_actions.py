"""The meaning of each signal: the stop, or what a verb of the control socket does too."""

from __future__ import annotations

import enum
import signal
from typing import Any, assert_never

from lastcall.supervisor.errors import Refused
from lastcall.supervisor.fleet.operations import Operations
from lastcall.supervisor.shutdown import Shutdown
from lastcall.supervisor.signals import Inbox, ReceivedSignal
from lastcall.supervisor.views.commands import Commands

# Seconds within which two Ctrl-C count as one. Ours: a wrapper may pass on the signal that the terminal has
# sent to the whole group already, and a user may press the keys twice by accident.
DUPLICATE_WITHIN = 0.3


class CtrlC(enum.Enum):
    """The meaning of one Ctrl-C."""

    STOP = "stop"
    DUPLICATE = "duplicate"
    HURRY = "hurry"
    KILL = "kill"


def decide(count: int, since: float | None, *, has_terminal: bool, has_patience: bool) -> CtrlC:
    """Return what a SIGINT asks for.

    `count` is how many came before this one, duplicates left out. `since` is the seconds since the last one,
    duplicates included, or None for the first. Without a terminal a SIGINT comes from a platform, and repeats
    change nothing. Without `has_patience` the second SIGINT kills, and no job is asked to end first.
    """
    if not has_terminal or since is None:
        return CtrlC.STOP
    if since < DUPLICATE_WITHIN:
        return CtrlC.DUPLICATE
    return CtrlC.HURRY if count == 1 and has_patience else CtrlC.KILL


class SignalActions:
    """Reads the inbox, and does what the signals ask for, one after the other."""

    def __init__(
        self,
        inbox: Inbox,
        *,
        shutdown: Shutdown,
        commands: Commands,
        operations: Operations,
        has_terminal: bool,
        has_patience: bool,
        log: Any,
    ) -> None:
        self._inbox = inbox
        self._shutdown = shutdown
        self._commands = commands
        self._operations = operations
        self._has_terminal = has_terminal
        self._has_patience = has_patience
        self._log = log

    async def run(self) -> None:
        """Act on signals until cancelled."""
        while True:
            self._act(await self._inbox.get())

    def _act(self, received: ReceivedSignal) -> None:
        number = received.signal
        if number is signal.SIGTERM:
            self._shutdown.begin("SIGTERM", received.at)
        elif number is signal.SIGINT:
            self._interrupt(received.at)
        elif number is signal.SIGQUIT:
            self._shutdown.kill(self._shutdown.begin("SIGQUIT", received.at))
        elif number is signal.SIGHUP and self._has_terminal:
            self._shutdown.begin("SIGHUP: the terminal was closed", received.at)
        else:
            self._operate(number)

    def _operate(self, number: signal.Signals) -> None:
        try:
            if number is signal.SIGHUP:
                self._operations.reload()
            elif number is signal.SIGUSR1:
                self._commands.toggle_hold()
            elif number is signal.SIGUSR2:
                self._commands.dump()
            elif number is signal.SIGTTIN:
                self._operations.scale(self._operations.wanted + 1)
            elif number is signal.SIGTTOU:
                self._operations.scale(self._operations.wanted - 1)
        except Refused as error:
            self._log.warning("signal ignored", signal=number.name, reason=str(error))

    def _interrupt(self, at: float) -> None:
        stop = self._shutdown.begin("SIGINT", at)
        since = None if stop.pressed_at is None else at - stop.pressed_at
        action = decide(stop.presses, since, has_terminal=self._has_terminal, has_patience=self._has_patience)
        stop.pressed_at = at
        stop.presses += action is not CtrlC.DUPLICATE
        match action:
            case CtrlC.STOP:
                if self._has_terminal and self._has_patience:
                    self._log.info("Ctrl-C again ends the drain, a third time kills")
                elif self._has_terminal:
                    self._log.info("Ctrl-C again kills")
            case CtrlC.DUPLICATE:
                pass
            case CtrlC.HURRY:
                self._log.warning("second Ctrl-C: jobs are asked to shut down now")
                self._shutdown.hurry(stop)
            case CtrlC.KILL:
                self._log.warning("Ctrl-C again: killing")
                self._shutdown.kill(stop)
            case _:
                assert_never(action)
