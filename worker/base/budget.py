"""One budget for a whole stop, as absolute deadlines computed once.

    t0           fence_at      drain_at        close_at     terminate_at    kill_at      end_at
    |-- fence -->|-- drain --->|--- close ---->|- terminate -->|-- kill ---->|- companion -->|

Calls have what the reserved shares leave, and the shares give way to calls in this order:

    1. the shares behind the close, which a stop that goes well does not use, have 1 % of grace together, and
       at least the minima below
    2. close gives way while calls have less than half of grace, down to what the running livekit-agents needs
    3. what a close needs gives way where calls would have less than 5 s, or less than half of grace
    4. below a grace of 25 s the minima take no more than a fifth of grace
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from lastcall.worker.base.records import dataclass

# Seconds. Ours: an hour is longer than nearly every call, and an operator can still wait for it.
DEFAULT_GRACE = 3600.0

# Seconds for which livekit-agents waits for the entrypoint of a job that is asked to shut down. Then
# livekit-agents cancels the entrypoint, and the callbacks run: ipc/job_proc_lazy_main.py, line 432 of 1.8.9
# and 364 of 1.5.7. 1.5.1 and older do not wait: 1.3.12 runs the callbacks at once (line 329 of this file).
ENTRYPOINT_WAIT = 15.0
ENTRYPOINT_WAIT_SINCE = (1, 5, 2)
# Seconds for on_session_end and the shutdown callbacks. Ours: a document is stored well within.
CALLBACKS = 3.0
# Seconds of the close, for jobs that have to be killed: the server is told of each, and the connection is
# closed. Ours: both are a round trip, and a process of 1 GB took 0.1 s to die of SIGKILL, more under load.
REPORTS = 2.0

# Seconds to which shares shrink.
# A worker that is told to leave, while it still looks for its server, has gone after 0.2 s.
TERMINATE_AT_LEAST = 1.0
# A process of 1 GB died of SIGKILL after 0.1 s on an idle machine, and after 1.3 to 3.8 s on a busy one.
KILL_AT_LEAST = 2.0
# A pool of 20 connections and 100 contexts in speech closes in 0.02 s, with the server on the same machine.
# Ours: time for round trips, of which a connection needs two.
COMPANION_AT_LEAST = 2.0
# The share of grace that these three have together. Ours: less than the spread in the lengths of calls.
REST_OF_GRACE = 0.01
# The share of grace that the minima of the three never exceed. Ours: most of a short grace is for calls.
REST_AT_MOST = 0.2
# Seconds that calls have at least, or half of a shorter grace. Ours: a sentence, and a good-bye.
CALLS_AT_LEAST = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Reserved parts of grace, in seconds.

    `entrypoint_wait` is no share. livekit-agents takes it of `close` before the callbacks.
    """

    fence: float = 2.0
    close: float = 20.0
    terminate: float = 5.0
    kill: float = 5.0
    companion: float = 0.0
    entrypoint_wait: float = ENTRYPOINT_WAIT

    @property
    def reserved(self) -> float:
        return self.close + self.terminate + self.kill + self.companion

    @property
    def jobs_close(self) -> float:
        """Seconds of the close that jobs have, which are asked to shut down at its beginning."""
        return self.close - kept_for_reports(self.close)

    @property
    def close_needed(self) -> float:
        """Seconds of the close in which the entrypoint and the callbacks of a job can end."""
        return self.entrypoint_wait + CALLBACKS + REPORTS

    @property
    def minima(self) -> Shares:
        """Each share as small as it may get."""
        return replace(
            self,
            close=min(self.close, self.close_needed),
            terminate=min(self.terminate, TERMINATE_AT_LEAST),
            kill=min(self.kill, KILL_AT_LEAST),
            companion=min(self.companion, COMPANION_AT_LEAST),
        )

    @property
    def grace_needed(self) -> float:
        """The shortest grace in which the callbacks of a job that is cut can run."""
        return self.minima.reserved - self.minima.close + self.close_needed + CALLS_AT_LEAST

    def within(self, grace: float) -> Shares:
        """Return the shares as they are in a stop of this grace."""
        return _within(self, grace)

    def calls(self, grace: float) -> float:
        """Return the seconds that calls have to end by themselves in a stop of this grace."""
        return grace - self.within(grace).reserved


@functools.lru_cache(maxsize=16)  # a stop asks for the shares at its very beginning, when nothing may wait
def _within(shares: Shares, grace: float) -> Shares:
    least = shares.minima
    wanted, needed = shares.reserved - shares.close, least.reserved - least.close
    rest = min(wanted, max(needed, REST_OF_GRACE * grace))
    part = (rest - needed) / (wanted - needed) if wanted > needed else 0.0
    less = min(1.0, REST_AT_MOST * grace / needed) if needed > 0 else 1.0
    terminate, kill, companion = (
        (low + part * (high - low)) * less
        for low, high in (
            (least.terminate, shares.terminate),
            (least.kill, shares.kill),
            (least.companion, shares.companion),
        )
    )
    left = grace - terminate - kill - companion
    close = min(shares.close, max(least.close, left - grace / 2))
    close = max(0.0, min(close, left - min(grace / 2, CALLS_AT_LEAST)))
    return replace(
        shares,
        fence=min(shares.fence, left - close),
        close=close,
        terminate=terminate,
        kill=kill,
        companion=companion,
    )


def kept_for_reports(close: float) -> float:
    """Return the seconds at the end of a close that are not the jobs'."""
    return min(REPORTS, close / 5)


def hand_over_until(drain_at: float, close_at: float) -> float:
    """Return until when a call that waits for its handover may go on, after the end of the drain.

    Calls that had no turn then have the rest for their callbacks: as long as callbacks take, and half of a
    close that is too short for both.
    """
    seconds = close_at - drain_at
    jobs_close = seconds - kept_for_reports(seconds)
    return drain_at + jobs_close - min(CALLBACKS, jobs_close / 2)


def entrypoint_wait(livekit_agents: str) -> float:
    """Return for how long a version waits for entrypoints; the longest time, if it is not known."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", livekit_agents)
    is_older = numbers is not None and tuple(map(int, numbers.groups())) < ENTRYPOINT_WAIT_SINCE
    return 0.0 if is_older else ENTRYPOINT_WAIT


@functools.cache  # the version is read from a file, which takes milliseconds
def installed_entrypoint_wait() -> float:
    """Return the same of the version that is installed."""
    try:
        return entrypoint_wait(version("livekit-agents"))
    except PackageNotFoundError:
        return ENTRYPOINT_WAIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """When each phase of a stop is over at the latest; readings of the monotonic clock."""

    fence_at: float
    drain_at: float
    close_at: float
    terminate_at: float
    kill_at: float
    end_at: float
    shares: Shares

    def hurried(self, now: float) -> Deadlines:
        """End the drain now; what follows keeps its shares, and nothing ends later than it would have."""
        later = max(0.0, self.drain_at - now)
        return replace(
            self,
            fence_at=min(self.fence_at, now),
            drain_at=min(self.drain_at, now),
            close_at=self.close_at - later,
            terminate_at=self.terminate_at - later,
            kill_at=self.kill_at - later,
            end_at=self.end_at - later,
        )

    def killed(self, now: float) -> Deadlines:
        """Return the deadlines of a kill now. The kill and the broker keep their shares; all else is over."""
        at = min(now, self.terminate_at)
        return replace(
            self,
            fence_at=min(self.fence_at, at),
            drain_at=min(self.drain_at, at),
            close_at=min(self.close_at, at),
            terminate_at=at,
            kill_at=min(self.kill_at, at + self.shares.kill),
            end_at=min(self.end_at, at + self.shares.kill + self.shares.companion),
        )


def earliest(plans: Iterable[Deadlines]) -> Deadlines:
    """Return the deadlines that keep every one of the plans; the shares are those of the tightest end."""
    every = list(plans)
    tightest = min(every, key=lambda each: each.end_at)
    return Deadlines(
        fence_at=min(each.fence_at for each in every),
        drain_at=min(each.drain_at for each in every),
        close_at=min(each.close_at for each in every),
        terminate_at=min(each.terminate_at for each in every),
        kill_at=min(each.kill_at for each in every),
        end_at=tightest.end_at,
        shares=tightest.shares,
    )


def close_by(now: float, *, drain_at: float, close_at: float) -> float:
    """Return by when a close that begins now is over: after the close's share, and not later than planned.

    A worker that has drained early gets the share from now on. With the rest of grace for its close, a
    worker that hangs there would hold up the whole stop.
    """
    return min(close_at, now + max(0.0, close_at - drain_at))


def extended(
    due_at: float, seconds: float, *, drain_at: float, close_at: float, close_needed: float
) -> float:
    """Return until when a call may go on that has to end by `due_at` and asks for so many seconds more.

    The end of grace does not move, and a call that does not keep its word has to have time for its callbacks
    all the same. So a call can have what the close does not need, and nothing else.
    """
    latest = close_at - min(max(0.0, close_at - drain_at), close_needed)
    return max(due_at, min(due_at + seconds, latest))


def plan(started_at: float, grace: float, shares: Shares) -> Deadlines:
    """Lay a stop that began at `started_at` out over `grace` seconds."""
    shares = shares.within(grace)
    return _laid_out(started_at, grace, shares)


def plan_of_stalled(started_at: float, grace: float, kill: float) -> Deadlines:
    """Lay out the stop of a worker that is stuck: its jobs have all of `grace`, and then it is killed.

    It can't be told to close anything, so there is no share for that.
    """
    shares = Shares(fence=0.0, close=0.0, terminate=0.0, kill=kill)
    return _laid_out(started_at, grace + kill, shares)


def _laid_out(started_at: float, grace: float, shares: Shares) -> Deadlines:
    end_at = started_at + grace
    kill_at = end_at - shares.companion
    terminate_at = kill_at - shares.kill
    close_at = terminate_at - shares.terminate
    drain_at = close_at - shares.close
    return Deadlines(
        fence_at=min(started_at + shares.fence, drain_at),
        drain_at=drain_at,
        close_at=close_at,
        terminate_at=terminate_at,
        kill_at=kill_at,
        end_at=end_at,
        shares=shares,
    )
