"""When a failed program is started again: back-off with jitter, and Erlang's intensity limit.

The first failure after a stable time is retried at once. Each further retry waits twice as long as the one
before, from the first step up to the cap. Up to a fifth is taken off at random, so that slots which failed
together do not start together. More than `intensity` failures within `period` seconds: no retry.

Programs that fail before they are loaded fail in a row, however long a load takes: the time since the failure
before does not count towards `period`. An import of 12 s would otherwise never fail often enough. A first job
process that fails counts as a load that failed.
"""

from __future__ import annotations

import random
from collections import deque

from lastcall.worker.base.backoff import Backoff
from lastcall.worker.base.records import dataclass

# Of each delay. Ours: enough to spread a few slots, and no delay is much shorter than the one configured.
JITTER = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Failures allowed in `period` seconds; first step and cap of the back-off, in seconds."""

    intensity: int = 5
    period: float = 60.0
    first: float = 0.5
    cap: float = 30.0


class Restarts:
    """The failures of one slot, and the delay before its next start."""

    def __init__(self, policy: RestartPolicy, rng: random.Random) -> None:
        self._policy = policy
        self._backoff = Backoff(policy.first, policy.cap, jitter=JITTER, random=rng)
        self._failures: deque[float] = deque(maxlen=policy.intensity + 1)
        self._failed_at = 0.0
        # Seconds that do not count towards the period.
        self._left_out = 0.0
        self._was_stable = True

    def forget(self) -> None:
        """Start afresh, as for a new program."""
        self._was_stable = True
        self._backoff.succeed()
        self._failures.clear()

    def delay(self, now: float, *, uptime: float, was_loaded: bool = True) -> float | None:
        """Count a failure, and return the seconds until the next start; None where there is to be no other.

        The program was ready for `uptime` seconds. It was stable if it stayed ready for a whole period.
        """
        if uptime >= self._policy.period:
            self.forget()
        if self._failures and not was_loaded:
            self._left_out += now - self._failed_at
        self._failed_at = now
        counted = now - self._left_out
        self._failures.append(counted)
        recent = sum(1 for at in self._failures if counted - at <= self._policy.period)
        if recent > self._policy.intensity:
            return None
        if self._was_stable:
            self._was_stable = False
            return 0.0
        return self._backoff.fail()
