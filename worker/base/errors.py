"""Every exception the worker raises on purpose."""

from __future__ import annotations


class WorkerError(Exception):
    """Base of the errors below; the text is one line meant for the operator."""


class TargetError(WorkerError):
    """Raised when TARGET names no usable agent: no such file, attribute or type, or it can't be imported.

    `traceback` holds the user's own part of the traceback, when there is one.
    """

    def __init__(self, message: str, *, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class StartError(WorkerError):
    """Raised when the target was found, but the code of the target failed; a later start may succeed."""

    def __init__(self, message: str, *, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class WireError(WorkerError):
    """Raised when a control message is too long, is not JSON, or speaks another version."""


class Incompatible(WorkerError):
    """Raised when a livekit-agents version lacks something that a stop can't do without."""
