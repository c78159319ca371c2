"""When the next handshake may begin, and whether the server is known to be down. Pure.

A 429 says that the account is full. Another client of the account may close a connection at any time, so
callers wait, and the pool tries again after a delay that doubles. Every other failure is an outage: waiting
would not help a caller, and a caller that is told at once can use another provider. An outage is remembered
for a moment, so that a hundred calls do not dial a hundred times. After that moment one handshake finds out
for all. If that one hangs, the callers are told, and another may begin for the next caller. The first
connection that stands ends the outage: a proxy may accept a handshake only to close the connection at once.
A connection that ends before the server has said anything is a handshake that failed.
"""

from __future__ import annotations

import random

from lastcall.worker.base.backoff import Backoff
from lastcall.worker.inworld.pool.dialling import DialError
from lastcall.worker.inworld.pool.errors import InworldError, KeyRefused, Unreachable
from lastcall.worker.inworld.pool.timer import NEVER
from lastcall.worker.inworld.pool.timings import Timings

# Part of each delay that is random. Ours: machines that Inworld refused together must not come back together.
REDIAL_JITTER = 0.5
# Failures in a row after which callers that wait beside an open connection are told too. Ours: the
# first failure may be an accident while the server works, and the second comes within `Timings.outage`.
MAX_FAILURES_BESIDE_CONNECTION = 2


class Redialling:
    """The outcome of the last handshakes of one account.

    `at`: no handshake before. `outage`: the cause, if the last handshake failed otherwise than by a 429.
    """

    def __init__(self, timings: Timings, random: random.Random) -> None:
        self.at = 0.0
        self.outage: InworldError | None = None
        self._timings = timings
        self._random = random
        self._failures = 0
        self._counted_at = 0.0
        self._stale_at = NEVER
        self._backoff = Backoff(
            timings.retry_first, timings.retry_cap, jitter=REDIAL_JITTER, random=self._random
        )

    @property
    def is_full(self) -> bool:
        """Whether the last handshake was refused because the account is full."""
        return self._backoff.failures > 0

    @property
    def has_failed(self) -> bool:
        """Whether the last handshake failed."""
        return self.is_full or self.outage is not None

    def began(self, at: float) -> None:
        """Note a handshake that begins. In an outage the next may follow a moment later, should it hang."""
        if self.outage is not None:
            self.at = at + self._timings.outage

    def forget_stale(self, at: float) -> None:
        """Forget an outage whose last failure is so old that any handshake of that time has ended since."""
        if self.outage is not None and at > self._stale_at:
            self.reset()

    def failed(self, error: DialError, *, began: float, at: float) -> None:
        """Note a failure. Handshakes that were under way together fail together, and count once."""
        counts = began >= self._counted_at
        if counts:
            self._counted_at = at
        if error.failure == "refused":
            self.outage, self._failures = None, 0
            if counts:
                self.at = at + self._backoff.fail()
            return
        self._backoff.succeed()
        kind = KeyRefused if error.failure == "key" else Unreachable
        self.outage = kind(f"no connection to Inworld: {error}")
        if counts:
            self._failures += 1
            self.at = at + self._timings.outage * (1 - REDIAL_JITTER * self._random.random())
        # The delay after a 429 is longer, and an outage that follows one is remembered no longer than others.
        self.at = min(self.at, at + self._timings.outage)
        self._stale_at = at + self._timings.outage + self._timings.dial

    def succeeded(self) -> None:
        """Note a connection that stands. After an outage the others may follow at once."""
        if self.outage is not None:
            self.reset()
        self._backoff.succeed()

    def reset(self) -> None:
        """Forget everything: with another key the server may answer otherwise."""
        self.at, self.outage, self._failures, self._counted_at = 0.0, None, 0, 0.0
        self._backoff.succeed()

    def refusal(self, *, is_finding_out: bool, stands: bool) -> InworldError | None:
        """Return the error for every caller that waits, or None if waiting may help.

        `is_finding_out`: a handshake is under way and not slow. `stands`: an open connection may have a place
        soon.
        """
        if is_finding_out or (stands and self._failures < MAX_FAILURES_BESIDE_CONNECTION):
            return None
        return self.outage
