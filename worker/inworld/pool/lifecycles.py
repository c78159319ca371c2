"""The states of a context and of a connection, as tables.

`scripts/states` renders both into the architecture page, and a test compares.
"""

from __future__ import annotations

import enum
from types import MappingProxyType


class ContextState(enum.Enum):
    """Where one context is, as its owner on this side sees it."""

    WAITING = "waiting"
    CREATING = "creating"
    OPEN = "open"
    CLOSING = "closing"
    CANCELLING = "cancelling"
    ENDED = "ended"


class ContextEvent(enum.Enum):
    """What can happen to it."""

    GRANT = "grant"
    CREATED = "created"
    CLOSE = "close"
    CANCEL = "cancel"
    RETRY = "retry"
    END = "end"


S, E = ContextState, ContextEvent

# END is contextClosed, an error that ends the context, a lost connection, or patience that is over. A slot
# is free only after it, except where the server never got the create, or has just refused it.
CONTEXT_TABLE = MappingProxyType(
    {
        (S.WAITING, E.GRANT): S.CREATING,
        (S.WAITING, E.END): S.ENDED,
        (S.CREATING, E.CREATED): S.OPEN,
        (S.CREATING, E.CLOSE): S.CLOSING,
        (S.CREATING, E.CANCEL): S.CANCELLING,
        (S.CREATING, E.RETRY): S.WAITING,
        (S.CREATING, E.END): S.ENDED,
        (S.OPEN, E.CLOSE): S.CLOSING,
        (S.OPEN, E.CANCEL): S.CANCELLING,
        (S.OPEN, E.END): S.ENDED,
        (S.CLOSING, E.CREATED): S.CLOSING,  # create, text and close go out in one burst
        (S.CLOSING, E.CANCEL): S.CANCELLING,
        (S.CLOSING, E.RETRY): S.WAITING,
        (S.CLOSING, E.END): S.ENDED,
        (S.CANCELLING, E.CREATED): S.CANCELLING,
        (S.CANCELLING, E.END): S.ENDED,
    }
)


class LineState(enum.Enum):
    """Where one connection is. All but GONE count against the account's limit."""

    DIALLING = "dialling"
    OPEN = "open"
    RETIRED = "retired"
    CLOSING = "closing"
    GONE = "gone"


class LineEvent(enum.Enum):
    """What can happen to it."""

    CONNECT = "connect"
    RETIRE = "retire"
    CLOSE = "close"
    END = "end"


L, V = LineState, LineEvent

# A retired connection takes no new contexts and is closed when the last of its own has ended.
LINE_TABLE = MappingProxyType(
    {
        (L.DIALLING, V.CONNECT): L.OPEN,
        (L.DIALLING, V.CLOSE): L.CLOSING,  # nobody waits for it any more
        (L.DIALLING, V.END): L.GONE,
        (L.OPEN, V.RETIRE): L.RETIRED,
        (L.OPEN, V.CLOSE): L.CLOSING,
        (L.OPEN, V.END): L.GONE,
        (L.RETIRED, V.CLOSE): L.CLOSING,
        (L.RETIRED, V.END): L.GONE,
        (L.CLOSING, V.END): L.GONE,
    }
)
