"""The budget and the back-off, as properties."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lastcall.supervisor.fleet.restarts import JITTER, RestartPolicy, Restarts
from lastcall.worker.base.budget import Deadlines, Shares, close_by, plan

seconds = st.floats(min_value=0.001, max_value=10_000, allow_nan=False)
shares = st.builds(Shares, fence=seconds, close=seconds, terminate=seconds, kill=seconds, companion=seconds)


def in_order(deadlines: Deadlines) -> list[float]:
    return [
        deadlines.drain_at,
        deadlines.close_at,
        deadlines.terminate_at,
        deadlines.kill_at,
        deadlines.end_at,
    ]


@given(started=st.floats(0, 1e6), grace=seconds, shares=shares)
def test_a_plan_fits_into_grace(started: float, grace: float, shares: Shares) -> None:
    """In order, from the start to exactly grace, and the drain has at least half of it."""
    planned = plan(started, grace, shares)
    slack = 1e-6 * (1 + started)
    for earlier, later in pairwise([started, *in_order(planned)]):
        assert later >= earlier - slack
    assert abs(planned.end_at - (started + grace)) <= slack
    assert planned.drain_at - started >= grace / 2 - slack
    assert started - slack <= planned.fence_at <= planned.drain_at + slack


@given(grace=seconds, shares=shares, at=st.floats(-1, 2))
def test_a_close_has_its_share_and_no_more(grace: float, shares: Shares, at: float) -> None:
    """A close that begins early ends after its share, one that begins late ends where it was planned to."""
    planned = plan(0.0, grace, shares)
    now = at * grace
    end = close_by(now, drain_at=planned.drain_at, close_at=planned.close_at)
    assert end <= planned.close_at
    assert end - now <= planned.shares.close + 1e-6 * grace
    if now <= planned.drain_at:
        assert end >= now


@given(started=st.floats(0, 1e6), grace=seconds, shares=shares, at=st.floats(0, 1))
def test_hurry_and_kill_only_shorten(started: float, grace: float, shares: Shares, at: float) -> None:
    """Whenever they come, no deadline moves away, the order holds, and twice is once."""
    planned = plan(started, grace, shares)
    now = started + at * grace
    slack = 1e-6 * (1 + started + grace)
    for changed in (planned.hurried(now), planned.killed(now), planned.hurried(now).killed(now)):
        for before, after in zip(in_order(planned), in_order(changed), strict=True):
            assert after <= before + slack
        for earlier, later in pairwise(in_order(changed)):
            assert later >= earlier - slack
    assert planned.hurried(now).hurried(now) == planned.hurried(now)
    assert planned.killed(now).terminate_at <= now


def test_the_defaults() -> None:
    """An hour: 3565 s to drain when nothing else is reserved but close, terminate and kill."""
    planned = plan(0, 3600, Shares())
    assert in_order(planned) == [3565, 3590, 3595, 3600, 3600]
    assert planned.fence_at == 2


@given(st.lists(st.floats(0, 5), min_size=1, max_size=30), st.integers(0, 10), st.floats(1, 100))
def test_intensity_is_erlangs_rule(gaps: list[float], intensity: int, period: float) -> None:
    """The restart is refused exactly when more than `intensity` failures lie within `period`."""
    restarts = Restarts(RestartPolicy(intensity=intensity, period=period), random.Random(0))
    now, failures = 0.0, []
    for gap in gaps:
        now += gap
        failures.append(now)
        delay = restarts.delay(now, uptime=0.0)
        recent = sum(1 for at in failures if now - at <= period)
        assert (delay is None) == (recent > intensity)
        if delay is None:
            return


def test_slow_loads_reach_the_intensity_limit() -> None:
    """Failures before the target is loaded count as failures in a row, whatever lies between them."""
    restarts = Restarts(RestartPolicy(intensity=2, period=60), random.Random(0))
    assert restarts.delay(0.0, uptime=0.0, was_loaded=False) == 0
    assert restarts.delay(100.0, uptime=0.0, was_loaded=False) is not None
    assert restarts.delay(200.0, uptime=0.0, was_loaded=True) is not None, "it was loaded in between"
    assert restarts.delay(300.0, uptime=0.0, was_loaded=False) is not None
    assert restarts.delay(400.0, uptime=0.0, was_loaded=False) is None


@given(first=st.floats(0.01, 5), cap=st.floats(5, 60), seed=st.integers())
def test_backoff_doubles_to_its_cap(first: float, cap: float, seed: int) -> None:
    """At once, then the first step, doubled each time, at most a fifth less, never above the cap."""
    policy = RestartPolicy(intensity=1000, period=1e6, first=first, cap=cap)
    restarts = Restarts(policy, random.Random(seed))
    delays = [restarts.delay(float(n), uptime=0.0) for n in range(12)]
    assert delays[0] == 0
    for n, delay in enumerate(delays[1:]):
        assert delay is not None
        step = min(cap, first * 2**n)
        assert step * (1 - JITTER) <= delay <= step


def test_backoff_is_reset_after_a_stable_time() -> None:
    """A worker that stayed up for a whole period is started again at once."""
    restarts = Restarts(RestartPolicy(period=60), random.Random(0))
    assert restarts.delay(0.0, uptime=0.0) == 0
    assert restarts.delay(1.0, uptime=0.0) != 0
    assert restarts.delay(100.0, uptime=61.0) == 0
