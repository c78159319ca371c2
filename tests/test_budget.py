"""The budget and the back-off, as properties."""

from __future__ import annotations

import random
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import livekit.agents.ipc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastcall.supervisor.config import calls
from lastcall.supervisor.fleet.restarts import JITTER, RestartPolicy, Restarts
from lastcall.worker.base.budget import (
    CALLBACKS,
    CALLS_AT_LEAST,
    COMPANION_AT_LEAST,
    KILL_AT_LEAST,
    TERMINATE_AT_LEAST,
    Deadlines,
    Shares,
    close_by,
    entrypoint_wait,
    hand_over_until,
    kept_for_reports,
    plan,
    plan_of_stalled,
)

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
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
    """In order, from the start to exactly grace, and calls have 5 s of it or half of a shorter one."""
    planned = plan(started, grace, shares)
    slack = 1e-6 * (1 + started)
    for earlier, later in pairwise([started, *in_order(planned)]):
        assert later >= earlier - slack
    assert abs(planned.end_at - (started + grace)) <= slack
    assert planned.drain_at - started >= min(grace / 2, CALLS_AT_LEAST) - slack
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


@given(shares, seconds)
def test_calls_that_wait_for_a_handover_leave_a_part_of_the_close(shares: Shares, grace: float) -> None:
    """The callbacks of those that had no turn have their time, or half of a close that has less."""
    planned = plan(0.0, grace, shares)
    until = hand_over_until(planned.drain_at, planned.close_at)
    jobs_close = planned.shares.close - kept_for_reports(planned.shares.close)
    left = planned.drain_at + jobs_close - until
    slack = 1e-6 * (1 + grace)
    assert planned.drain_at - slack <= until <= planned.close_at + slack
    assert left == pytest.approx(min(CALLBACKS, jobs_close / 2), abs=slack)


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
    """An hour: 3570 s to drain when nothing else is reserved but close, terminate and kill."""
    planned = plan(0, 3600, Shares())
    assert in_order(planned) == [3570, 3590, 3595, 3600, 3600]
    assert planned.fence_at == 2


# The seconds of calls, of the close, and of the shares behind it: without the pool, and with it.
TABLE = {
    30: ((7, 20, 3), (5, 20, 5)),
    60: ((37, 20, 3), (35, 20, 5)),
    120: ((97, 20, 3), (95, 20, 5)),
    540: ((514.6, 20, 5.4), (514.6, 20, 5.4)),
    3600: ((3570, 20, 10), (3565, 20, 15)),
}


@pytest.mark.parametrize("grace", TABLE)
def test_what_calls_get_of_a_grace(grace: int) -> None:
    """The close keeps what livekit-agents needs, and calls have what is left; as on the page."""
    cells = [f"{grace} s"]
    for shares, expected in zip((Shares(), Shares(companion=5.0)), TABLE[grace], strict=True):
        planned = plan(0.0, grace, shares)
        drain_at, close_at = planned.drain_at, planned.close_at
        assert (drain_at, close_at - drain_at, grace - close_at) == pytest.approx(expected)
        assert planned.shares.jobs_close >= entrypoint_wait("1.8.9") + CALLBACKS
        cells += [f"{each:g}" for each in expected]
    assert f"| {' | '.join(cells)} |" in PAGE.read_text()


@given(grace=st.floats(0.1, 5000), more=st.floats(0, 100), shares=shares)
def test_more_grace_is_more_for_calls(grace: float, more: float, shares: Shares) -> None:
    """Calls never have less of a longer grace, and close and rest never more than they were given."""
    assert shares.calls(grace + more) >= shares.calls(grace) - 1e-6 * (grace + more)
    within = shares.within(grace)
    for name in ("fence", "close", "terminate", "kill", "companion"):
        assert 0 <= getattr(within, name) <= getattr(shares, name) + 1e-9


def test_the_order_in_which_shares_give_way() -> None:
    """First the shares behind the close, then the close down to its need, and at last the need."""
    long = Shares(close=60.0, companion=5.0)
    assert long.within(3600).close == 60
    at_120 = long.within(120)
    minima = (TERMINATE_AT_LEAST, KILL_AT_LEAST, COMPANION_AT_LEAST)
    assert (at_120.terminate, at_120.kill, at_120.companion) == minima
    assert (long.calls(120), at_120.close) == pytest.approx((60, 55))
    assert long.within(40).close == pytest.approx(20), "what livekit-agents needs"
    assert long.within(20).close < 20 and long.calls(20) == pytest.approx(CALLS_AT_LEAST)
    assert long.calls(6) == pytest.approx(3)
    small = Shares(kill=0.5, terminate=0.5, close=4.0)
    assert (small.within(60).kill, small.within(60).close) == (0.5, 4.0), "no share grows"


@pytest.mark.parametrize(
    ("version", "wait"),
    [("1.3.12", 0), ("1.5.1", 0), ("1.5.3", 15), ("1.5.7", 15), ("1.8.9", 15), ("1.9.0rc1", 15), ("", 15)],
)
def test_what_a_version_needs(version: str, wait: float) -> None:
    """Newer ones wait for the entrypoint before the callbacks; a version that is not known may."""
    assert entrypoint_wait(version) == wait


def test_installed_version_waits_as_written_down() -> None:
    """The wait is in the file that `budget` names, as often as the version says."""
    source = Path(livekit.agents.ipc.__path__[0]) / "job_proc_lazy_main.py"
    waits = source.read_text().count("asyncio.shield(job_entry_task), timeout=15)")
    assert waits == (1 if entrypoint_wait(metadata.version("livekit-agents")) else 0)


def test_jobs_of_a_stalled_worker_have_their_grace() -> None:
    """All of `[stall] grace`: a worker that is stuck can't be asked to close anything."""
    planned = plan_of_stalled(100.0, 30.0, 5.0)
    assert in_order(planned) == [130, 130, 130, 135, 135]


@pytest.mark.parametrize(
    ("grace", "shares", "says"),
    [
        (28, Shares(), ""),
        (27, Shares(), "where the entrypoint goes on: livekit-agents waits 15 s"),
        (5, Shares(), "has 1.2 s to shut down: its on_session_end and shutdown callbacks may not run"),
        (30, Shares(companion=5.0), ""),
        (29, Shares(companion=5.0), "where the entrypoint goes on"),
        (13, Shares(entrypoint_wait=0.0), ""),
        (9, Shares(entrypoint_wait=0.0), "callbacks may not run"),
        (3600, Shares(close=10.0), "where the entrypoint goes on"),
    ],
)
def test_which_callbacks_may_not_run(grace: float, shares: Shares, says: str) -> None:
    """Said exactly where the close is too short for them, with what would help."""
    warning = calls.warning(grace, shares)
    assert (says in warning) if says else (warning == "")
    if grace < 3600:
        assert calls.warning(shares.grace_needed, shares) == ""
        assert f"--grace to {shares.grace_needed:g} s" in calls.advice(shares)
    else:
        assert calls.advice(shares) == "stop.close of 20 s or more"


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
