"""The settings of the local Inworld server, its faults, and the events that it reports.

Some behaviour of the real service is in no published text. Each such behaviour is a setting, and the value is
a guess: every code of `Codes`, `cancel`, `error_ends_context`, `idle_close_code`, `linger`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

EventKind = Literal[
    "connected",
    "refused",
    "connection_closed",
    "ping",
    "context_created",
    "context_refused",
    "text",
    "flush",
    "close_requested",
    "cancel_requested",
    "context_closed",
    "context_cut",
    "error",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of the server's log. `at` is CLOCK_MONOTONIC, comparable between processes of a machine.

    refused: a handshake was answered with `detail["status"]`.

    connection_closed: `detail` has the code, and whether the close frame of the client came (`clean`).

    context_cut: the connection ended while the context was open.
    """

    at: float
    kind: EventKind
    connection: int = 0
    context: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Limits:
    """The service's limits, with the values that Inworld's documentation of the WebSocket gives.

    `connections`: for the account. A newer text has ten for each generation that the plan allows at once.
    `contexts`: on one connection.
    `text`: characters in one send_text.
    `idle`: seconds without a frame, after which the server closes the connection.
    """

    connections: int = 20
    contexts: int = 5
    text: int = 1000
    idle: float = 600.0


@dataclass(slots=True, kw_only=True)
class Codes:
    """Numeric codes of errors; only `not_found` has been seen."""

    context_limit: int = 8
    text_limit: int = 3
    invalid: int = 3
    not_found: int = 5
    exists: int = 6
    failed: int = 13


@dataclass(slots=True, kw_only=True)
class Faults:
    """The faults of the server. Each field may be changed while the server serves. Times are seconds.

    handshake_*       delay it, answer it with an HTTP status, never answer it, or cut it
    create_*          delay or withhold contextCreated; answer with a status error, or with a top-level error
    malformed         sent before each contextCreated: no JSON, {"result": null}, or a list
    speech_error      a status error after the first chunk; `error_ends_context`: it ends the context
    closed_*          delay or withhold contextClosed; the context is counted until then
    cancel            stop at once and close; act as if cancel_context were not known; answer it with an error
                      of the context, or of none
    stop_reading      leave what clients send unread
    ping_unanswered   send no pong
    ignore_close      never answer a close frame, nor end the connection
    cut_rate          the chance that a frame received cuts its connection without a close frame
    linger            how long a connection that is gone still counts against the limit
    http_status       answer plain HTTP requests with it
    """

    handshake_delay: float = 0.0
    handshake_status: int = 0
    handshake_hang: bool = False
    handshake_cut: bool = False
    create_delay: float = 0.0
    create_unanswered: bool = False
    create_error: Literal["", "status", "top-level"] = ""
    malformed: Literal["", "text", "null", "list"] = ""
    speech_error: bool = False
    error_ends_context: bool = False
    closed_delay: float = 0.0
    closed_never: bool = False
    cancel: Literal["supported", "ignored", "error", "top-level"] = "supported"
    stop_reading: bool = False
    ping_unanswered: bool = False
    ignore_close: bool = False
    cut_rate: float = 0.0
    linger: float = 0.0
    idle_close_code: int = 1000
    http_status: int = 0
    codes: Codes = field(default_factory=Codes)
