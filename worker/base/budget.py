"""One budget for a whole stop, as absolute deadlines computed once.

    t0           fence_at      drain_at        close_at     terminate_at    kill_at      end_at
    |-- fence -->|-- drain --->|--- close ---->|- terminate -->|-- kill ---->|- companion -->|

The drain has what the reserved shares leave. Shares shrink in proportion when together they would take more
than half of grace.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

# Seconds. Ours: an hour is longer than nearly every call, and an operator can still wait for it.
DEFAULT_GRACE = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Reserved parts of grace, in seconds."""

    fence: float = 2.0
    close: float = 25.0
    terminate: float = 5.0
    kill: float = 5.0
    companion: float = 0.0

    @property
    def reserved(self) -> float:
        return self.close + self.terminate + self.kill + self.companion

    def within(self, grace: float) -> Shares:
        """Return the shares, shrunk in proportion if they would leave the drain less than half of grace."""
        factor = min(1.0, grace / 2 / self.reserved) if self.reserved > 0 else 1.0
        return Shares(
            fence=min(self.fence * factor, grace / 2),
            close=self.close * factor,
            terminate=self.terminate * factor,
            kill=self.kill * factor,
            companion=self.companion * factor,
        )


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
        """Kill now: everything before the kill is over, the kill and the companion keep their shares."""
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


def plan(started_at: float, grace: float, shares: Shares) -> Deadlines:
    """Lay a stop that began at `started_at` out over `grace` seconds."""
    shares = shares.within(grace)
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
