"""How long the pool is patient, in one value that tests make small."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """All in seconds."""

    dial: float = 10.0
    # A dial older than this gets a second beside it, so that one hung handshake holds nobody up.
    slow_dial: float = 1.0
    retry_first: float = 0.5
    retry_cap: float = 8.0
    create: float = 5.0
    # Where cancel_context is not answered so soon, close_context, which every server knows, is sent too.
    cancel_hint: float = 1.0
    cancel: float = 10.0
    silence: float = 10.0
    # A peer that reads nothing of ours for so long is dead.
    stall: float = 10.0
    # The server closes an idle connection after 600 s; the warm one is replaced before.
    warm: float = 540.0
    # For the closing handshake of one connection.
    goodbye: float = 3.0
    # For aclose() without a deadline of the caller's.
    aclose: float = 5.0
