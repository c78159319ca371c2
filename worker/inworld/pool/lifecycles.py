"""The states of a context and of a connection, as tables.

The text below a state says three things: the meaning, which frames may pass, and the way out.
`scripts/states` renders tables and texts into the architecture page, and a test compares.
"""

from __future__ import annotations

import enum
from types import MappingProxyType


class TableKey(enum.Enum):
    """A state or an event. The tables are read at each step, and the hash of Enum is a function in Python."""

    __hash__ = object.__hash__


class ContextState(TableKey):
    """The state of one context, as its owner in this process sees it."""

    WAITING = "waiting"
    """The context has no place; frames to the server are kept. A place, a cancel or the acquire timeout ends
    the state."""

    CREATING = "creating"
    """The create and all kept frames were sent, and later frames follow them; the server has not answered.
    `contextCreated` ends the state; without it in time the context is tried on another connection."""

    OPEN = "open"
    """The server knows the context: text goes out, and audio comes in. A close or cancel of the owner ends
    the state, or the server does."""

    CLOSING = "closing"
    """`close_context` was sent: no frame but a cancel may follow, and audio still comes in.
    `contextClosed` ends the state; after too long a silence the pool cancels the context and gives it up."""

    CANCELLING = "cancelling"
    """`cancel_context` was sent: audio that comes in is dropped, and the place stays taken. The server ends
    the state; without an answer in time the pool gives the context up and retires the connection."""

    ENDED = "ended"
    """The place is free, and the owner has been told. No frame may pass, and no event follows."""


class ContextEvent(TableKey):
    """An event that changes the state of a context."""

    GRANT = "grant"
    CREATED = "created"
    CLOSE = "close"
    CANCEL = "cancel"
    RETRY = "retry"
    END = "end"


S, E = ContextState, ContextEvent

# END is contextClosed, an error that ends the context, a lost connection, or a timeout. A place is free only
# after END: the server counts the context until then, and would refuse the next create. A context that is
# retried leaves its place to a remainder, which is cancelled; a lost connection takes the place along.
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
        (S.CLOSING, E.CREATED): S.CLOSING,  # the close may be sent before the server has answered the create
        (S.CLOSING, E.CANCEL): S.CANCELLING,
        (S.CLOSING, E.RETRY): S.WAITING,
        (S.CLOSING, E.END): S.ENDED,
        (S.CANCELLING, E.CREATED): S.CANCELLING,
        (S.CANCELLING, E.END): S.ENDED,
    }
)


class ConnectionState(TableKey):
    """The state of one connection. All but GONE count against the account's limit."""

    DIALLING = "dialling"
    """The handshake is under way, and no context may use the connection. The answer ends the state, or the
    dial's timeout does, or a close when no context waits any more."""

    OPEN = "open"
    """The connection takes new contexts. A retirement, a close after idle time, or the loss of the socket
    ends the state."""

    RETIRED = "retired"
    """The connection takes no new context, and the contexts on it go on. The end of the last context ends
    the state: the connection is then closed."""

    CLOSING = "closing"
    """The close frame is sent and its answer awaited, or a dial is cancelled; no context may use the
    connection. The end of the socket ends the state, after the close timeout at the latest."""

    GONE = "gone"
    """The socket is closed, and the connection no longer counts against the account's limit."""


class ConnectionEvent(TableKey):
    """An event that changes the state of a connection."""

    CONNECT = "connect"
    RETIRE = "retire"
    CLOSE = "close"
    END = "end"


L, V = ConnectionState, ConnectionEvent

# A connection that is RETIRED is closed by the pool once the last context on the connection has ended.
CONNECTION_TABLE = MappingProxyType(
    {
        (L.DIALLING, V.CONNECT): L.OPEN,
        (L.DIALLING, V.CLOSE): L.CLOSING,  # no context waits for the connection any more, or the pool closes
        (L.DIALLING, V.END): L.GONE,
        (L.OPEN, V.RETIRE): L.RETIRED,
        (L.OPEN, V.CLOSE): L.CLOSING,
        (L.OPEN, V.END): L.GONE,
        (L.RETIRED, V.CLOSE): L.CLOSING,
        (L.RETIRED, V.END): L.GONE,
        (L.CLOSING, V.END): L.GONE,
    }
)
