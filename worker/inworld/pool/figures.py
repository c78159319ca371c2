"""The figures of a pool that runs: counters since the pool opened, and what there is now."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Counts of one pool since it opened.

    `granted`: contexts that were given a place. `waited`: requests for a place that had to wait.
    `wait_seconds`: the sum of their waits. `refusals`: handshakes answered with 429.
    `failed_dials`: handshakes that failed, refusals included. `retries`: creates that were sent again on
    another connection. `second_tries`: those of them whose first try was only slow. `lost`: connections that
    ended under open contexts.
    """

    granted: int = 0
    waited: int = 0
    wait_seconds: float = 0.0
    refusals: int = 0
    failed_dials: int = 0
    retries: int = 0
    second_tries: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The numbers of a pool now, and the counters since its start.

    `connections`: all that count against the account's limit. `dialling`: those of them without a finished
    handshake. `contexts`: places that are taken. `waiters`: contexts that wait for a place. `faults`:
    exceptions that nobody foresaw, in a handshake, a connection, a context or a listener.
    """

    connections: int
    dialling: int
    contexts: int
    waiters: int
    granted: int
    waited: int
    wait_seconds: float
    refusals: int
    failed_dials: int
    retries: int
    second_tries: int
    lost: int
    faults: int
