"""The states of a slot and of the whole supervisor, as tables.

`scripts/states` renders both into the architecture page, and a test compares.
"""

from __future__ import annotations

import enum
from types import MappingProxyType


class SlotState(enum.Enum):
    """Where the program of a slot is."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    STALLED = "stalled"
    DRAINING = "draining"
    CLOSING = "closing"
    TERMINATING = "terminating"
    KILLING = "killing"
    FAILED = "failed"
    BACKOFF = "backoff"
    QUARANTINED = "quarantined"


class SlotEvent(enum.Enum):
    """What can happen to it."""

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

# EXIT is an end that somebody asked for; FAIL is every other end, exit code 0 included.
SLOT_TABLE = MappingProxyType(
    {
        (S.STOPPED, E.SPAWN): S.STARTING,
        (S.STOPPED, E.FAIL): S.FAILED,  # could not be spawned at all
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
        (S.DRAINING, E.TERMINATE): S.TERMINATING,  # opaque: it has no closing of its own
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
        (S.QUARANTINED, E.RETRY): S.BACKOFF,  # asked for: a reload or a recycle may bring a better program
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

# The same for a companion, which has no candidates, and is never stalled or quarantined.
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
    """Where the whole supervisor is. A stop only ever goes forward."""

    STARTING = 0
    RUNNING = 1
    FENCING = 2
    DRAINING = 3
    CLOSING = 4
    TERMINATING = 5
    KILLING = 6
    SWEEPING = 7
    STOPPED = 8

    @property
    def text(self) -> str:
        return self.name.lower()


# The log event of each phase that a stop enters. The two phases before a stop have events of their own.
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

# The phase of a stop that a living worker's state stands for; the stop is where its last worker is.
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
