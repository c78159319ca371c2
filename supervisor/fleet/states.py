"""The states of a generation and the phases of the supervisor, as tables.

The text below a state or a phase says three things: the meaning, which processes may run, and the way out.
`scripts/states` renders tables and texts into the architecture page, and a test compares.
"""

from __future__ import annotations

import enum
from types import MappingProxyType


class SlotState(enum.Enum):
    """The state of one generation, and through its current generation the state of a slot."""

    STOPPED = "stopped"
    """The program was not started yet, or has ended as it was asked to. No process runs. A spawn leads on."""

    STARTING = "starting"
    """The program runs and is not registered with the LiveKit server: it loads, its first job process is
    not warm yet, or it has lost its connection and old jobs run on. The registration of a worker that has
    been warm ends the state; the first one has `[start] timeout`."""

    READY = "ready"
    """The worker is registered, a process of it has been warm, and jobs run; load, cap and hold change
    nothing about the state. An opaque program is ready once it is spawned. A lost connection, a stall, a
    fence or the end of the program ends the state."""

    STALLED = "stalled"
    """The worker has missed `[stall] misses` beats; its jobs run on, each in a process. A beat, the
    fence that follows a replacement, or a kill where no replacement could be had ends the state."""

    DRAINING = "draining"
    """The worker accepts nothing new, and its jobs run on until the last has ended, or until `drain_at`. An
    opaque program was sent SIGTERM and has until `terminate_at`."""

    CLOSING = "closing"
    """The worker shuts down jobs that are left, closes its resources and exits. The exit ends the state, or
    the end of the close share, which begins with the state."""

    TERMINATING = "terminating"
    """The worker was told to kill its jobs and to exit at once. The exit ends the state, or the end of the
    terminate share, which begins with the state."""

    KILLING = "killing"
    """The program and every process below it were sent SIGKILL, and none may run on. The exit status from
    the kernel ends the state."""

    FAILED = "failed"
    """The program has ended unasked or with a wrong exit status, or could not be started. No process runs.
    Back-off or quarantine ends the state at once; after a wrong target only the stop does."""

    BACKOFF = "backoff"
    """The slot waits before its next start, and no process of this generation runs. The end of the delay, a
    reload, a recycle or the stop ends the state."""

    QUARANTINED = "quarantined"
    """The slot has failed more than `[restart] intensity` times within `period` and is started no more. No
    process runs. A reload, a recycle or the stop ends the state."""


class SlotEvent(enum.Enum):
    """An event that changes the state of a generation."""

    SPAWN = "spawn"
    REGISTER = "register"
    UNREGISTER = "unregister"
    STALL = "stall"
    RECOVER = "recover"
    FENCE = "fence"
    CLOSE = "close"
    TERMINATE = "terminate"
    KILL = "kill"
    EXIT = "exit"
    FAIL = "fail"
    RETRY = "retry"
    QUARANTINE = "quarantine"
    STOP = "stop"


S, E = SlotState, SlotEvent

# EXIT is an end that was asked for; FAIL is every other end, exit code 0 included.
SLOT_TABLE = MappingProxyType(
    {
        (S.STOPPED, E.SPAWN): S.STARTING,
        (S.STOPPED, E.FAIL): S.FAILED,  # the spawn failed
        (S.STOPPED, E.STOP): S.STOPPED,
        (S.STARTING, E.REGISTER): S.READY,
        (S.STARTING, E.FENCE): S.DRAINING,
        (S.STARTING, E.TERMINATE): S.TERMINATING,  # not ready in time
        (S.STARTING, E.KILL): S.KILLING,
        (S.STARTING, E.FAIL): S.FAILED,
        (S.READY, E.UNREGISTER): S.STARTING,
        (S.READY, E.STALL): S.STALLED,
        (S.READY, E.FENCE): S.DRAINING,
        (S.READY, E.KILL): S.KILLING,
        (S.READY, E.FAIL): S.FAILED,
        (S.STALLED, E.RECOVER): S.READY,
        (S.STALLED, E.FENCE): S.DRAINING,
        (S.STALLED, E.KILL): S.KILLING,
        (S.STALLED, E.FAIL): S.FAILED,
        (S.DRAINING, E.CLOSE): S.CLOSING,
        (S.DRAINING, E.TERMINATE): S.TERMINATING,  # an opaque program can't be told to close
        (S.DRAINING, E.KILL): S.KILLING,
        (S.DRAINING, E.EXIT): S.STOPPED,
        (S.DRAINING, E.FAIL): S.FAILED,
        (S.CLOSING, E.TERMINATE): S.TERMINATING,
        (S.CLOSING, E.KILL): S.KILLING,
        (S.CLOSING, E.EXIT): S.STOPPED,
        (S.CLOSING, E.FAIL): S.FAILED,
        (S.TERMINATING, E.KILL): S.KILLING,
        (S.TERMINATING, E.EXIT): S.STOPPED,
        (S.TERMINATING, E.FAIL): S.FAILED,
        (S.KILLING, E.EXIT): S.STOPPED,
        (S.KILLING, E.FAIL): S.FAILED,
        (S.FAILED, E.RETRY): S.BACKOFF,
        (S.FAILED, E.QUARANTINE): S.QUARANTINED,
        (S.FAILED, E.STOP): S.STOPPED,
        (S.BACKOFF, E.SPAWN): S.STARTING,
        (S.BACKOFF, E.FAIL): S.FAILED,
        (S.BACKOFF, E.STOP): S.STOPPED,
        (S.QUARANTINED, E.RETRY): S.BACKOFF,  # a reload or a recycle may bring a better program
        (S.QUARANTINED, E.STOP): S.STOPPED,
    }
)

# The log event of each state that a slot enters; whole, so that `grep` finds it.
SLOT_LOG_EVENT = MappingProxyType(
    {
        S.STOPPED: "slot stopped",
        S.STARTING: "slot starting",
        S.READY: "slot ready",
        S.STALLED: "slot stalled",
        S.DRAINING: "slot draining",
        S.CLOSING: "slot closing",
        S.TERMINATING: "slot terminating",
        S.KILLING: "slot killing",
        S.FAILED: "slot failed",
        S.BACKOFF: "slot backoff",
        S.QUARANTINED: "slot quarantined",
    }
)

# The same for the Inworld broker, which is never stalled, terminated or quarantined.
COMPANION_LOG_EVENT = MappingProxyType(
    {
        S.STOPPED: "companion stopped",
        S.STARTING: "companion starting",
        S.READY: "companion ready",
        S.DRAINING: "companion draining",
        S.CLOSING: "companion closing",
        S.KILLING: "companion killing",
        S.FAILED: "companion failed",
        S.BACKOFF: "companion backoff",
    }
)

ALIVE = frozenset({S.STARTING, S.READY, S.STALLED, S.DRAINING, S.CLOSING, S.TERMINATING, S.KILLING})


class Phase(enum.IntEnum):
    """The phase of the whole supervisor. A stop only ever goes forward."""

    STARTING = 0
    """Workers start, and none has been ready yet. The first worker that is ready ends the phase, or a reason
    to stop does."""

    RUNNING = 1
    """Workers are ready, and jobs run. The first reason to stop ends the phase; a time without any worker
    that is ready does not."""

    FENCING = 2
    """Each worker was told to accept nothing new, and jobs run on. The last acknowledgement ends the phase,
    or `fence_at` does."""

    DRAINING = 3
    """No worker accepts a job, and jobs run to their ends. The end of the last job ends the phase, or
    `drain_at` does."""

    CLOSING = 4
    """Workers shut down jobs that are left, close their resources and exit. The last exit ends the phase, or
    the close share of the last worker does."""

    TERMINATING = 5
    """Workers that have not exited kill their jobs and exit. The last exit ends the phase, or the terminate
    share of the last worker does."""

    KILLING = 6
    """Workers that are left were sent SIGKILL with every process below them. The last exit status from the
    kernel ends the phase."""

    SWEEPING = 7
    """All workers and the broker have ended, and every descendant that is left is killed. The phase ends
    when none is left, or at `end_at`."""

    STOPPED = 8
    """No descendant runs, or the receipt counts those that do under `left`. The supervisor writes the
    receipt and exits."""

    @property
    def text(self) -> str:
        return self.name.lower()


# The log event of each phase that a stop enters. The two phases before a stop have other events.
STOP_LOG_EVENT = MappingProxyType(
    {
        Phase.FENCING: "stop fencing",
        Phase.DRAINING: "stop draining",
        Phase.CLOSING: "stop closing",
        Phase.TERMINATING: "stop terminating",
        Phase.KILLING: "stop killing",
        Phase.SWEEPING: "stop sweeping",
        Phase.STOPPED: "stop stopped",
    }
)

# The phase that a living generation's state stands for. The generation that is furthest from its end decides
# the phase of the stop.
PHASE_OF = MappingProxyType(
    {
        S.STARTING: Phase.FENCING,
        S.READY: Phase.FENCING,
        S.STALLED: Phase.FENCING,
        S.DRAINING: Phase.DRAINING,
        S.CLOSING: Phase.CLOSING,
        S.TERMINATING: Phase.TERMINATING,
        S.KILLING: Phase.KILLING,
    }
)
