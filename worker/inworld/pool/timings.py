"""How long the pool waits for the server, in one value that tests make small."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """All in seconds."""

    # One handshake. livekit-plugins-inworld 1.8.9 gives a handshake as long (`tts.py`).
    dial: float = 10.0
    # A handshake older than this gets a second one beside it. Ours: so that one that hangs holds up nobody.
    slow_dial: float = 1.0
    # The back-off after a 429: first step and cap. Ours: 429 lasts until another client of the
    # account closes a connection, and a longer pause than 8 s would be most of an acquire timeout of 30 s.
    retry_first: float = 0.5
    retry_cap: float = 8.0
    # How long an outage is remembered: callers are told of it without a handshake. Ours: a call notices a
    # second, and one handshake a second from each machine harms no server.
    outage: float = 1.0
    # After an outage, a connection that stands for so long ends the outage. Ours: a proxy that accepts a
    # handshake for a server that is down closes the connection at once, and a call does not notice 0.2 s.
    settle: float = 0.2
    # From a create to contextCreated. Ours: two tries fit into an acquire timeout of 30 s, dial included.
    create: float = 5.0
    # A create that is not answered so soon may go out on another connection. The time follows from the
    # answers (`second_tries`); these are the value before the first answer, as in RFC 6298, and the least.
    # Ours: a listener notices 0.3 s, and a working network answers sooner.
    second_try_first: float = 1.0
    second_try_least: float = 0.3
    # Between pings on an idle connection. Ours: half of the minute after which the strictest of the common
    # firewalls forget a connection.
    ping: float = 30.0
    # From a ping to its pong. Ours: as `silence`.
    pong: float = 10.0
    # A cancel_context that is not answered so soon is followed by close_context. Ours: Inworld's pages know
    # no cancel_context, and a server that knows only close_context answers that.
    cancel_hint: float = 1.0
    # From cancel_context to the end of the context. Ours: as `silence`.
    cancel: float = 10.0
    # How long a closed context may say nothing. Ours: the server speaks to the end first, and a pause in
    # speech is far shorter.
    silence: float = 10.0
    # A peer that reads nothing for so long is given up. Ours: as `silence`.
    stall: float = 10.0
    # The one idle connection that is kept is replaced after this. Inworld's WebSocket page: a connection
    # without activity is closed after 10 minutes. Ours: a minute less.
    warm: float = 540.0
    # The closing handshake of one connection. Ours: many round trips, and less than `aclose`.
    close_handshake: float = 3.0
    # For aclose() without a deadline of the caller's. Ours: as the default of `[stop] companion`.
    aclose: float = 5.0
