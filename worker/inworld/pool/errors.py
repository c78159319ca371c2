"""Every error that the pool raises on purpose, and the status codes on the wire."""

from __future__ import annotations

from lastcall.worker.base.errors import WorkerError

# Inworld's status codes are gRPC's (google/rpc/code.proto). livekit-plugins-inworld 1.5.7, 1.8.8 and 1.8.9
# retry a context with its text after RESOURCE_EXHAUSTED.
CANCELLED = 1
UNKNOWN = 2
INVALID_ARGUMENT = 3
NOT_FOUND = 5
ALREADY_EXISTS = 6
RESOURCE_EXHAUSTED = 8
UNAVAILABLE = 14
UNAUTHENTICATED = 16


class InworldError(WorkerError):
    """Base of the errors below. `code` is the status code that a client of the broker is told."""

    code = UNKNOWN


class Malformed(InworldError):
    """Raised when a frame is not JSON, or not an object of the shape that the protocol has."""


class PoolClosed(InworldError):
    """Raised when a context is asked of a pool that is closing or closed, or not yet open."""

    code = UNAVAILABLE


class AcquireTimeout(InworldError):
    """Raised when no capacity came free in time, or the server did not answer in time."""

    code = RESOURCE_EXHAUSTED


class KeyRefused(InworldError):
    """Raised when the server refuses the key; waiting would not help."""

    code = UNAUTHENTICATED


class Unreachable(InworldError):
    """Raised when no handshake with the server succeeds; the text has the cause."""

    code = UNAVAILABLE


class ConnectionLost(InworldError):
    """Raised when the connection ended under an open context."""

    code = UNAVAILABLE


class Silent(InworldError):
    """Raised when the server owes a context an answer for longer than it has."""

    code = UNAVAILABLE


class Overflow(InworldError):
    """Raised when more is unread, or unsent, than may be buffered."""

    code = RESOURCE_EXHAUSTED


class LastcallFault(InworldError):
    """Raised when an exception that nobody foresaw has ended a context. The log has the traceback."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"a fault in lastcall, {type(error).__name__}; its log has more")


class ContextCancelled(InworldError):
    """Raised to a reader whose context the client, and not the server, has cancelled."""

    code = CANCELLED


class ContextError(InworldError):
    """Raised when the server reports an error for a context. `code` is the server's."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code
