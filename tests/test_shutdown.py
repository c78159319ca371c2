"""The object that holds a stop: made by the first reason, and there for whatever comes after it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lastcall.supervisor.config import Config
from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.supervisor.fleet.states import Phase
from lastcall.supervisor.receipt import Ledger, StopRecord
from lastcall.supervisor.shutdown import PhaseClock, Shutdown
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from tests.support.generations import Silent


@pytest.fixture
def shutdown() -> Shutdown:
    log, record = Silent(), StopRecord()
    launcher: Any = None  # no process is started here
    fleet = Fleet(
        Config(workers=3, grace=100.0),
        changed=Condition(),
        launcher=launcher,
        ledger=Ledger(),
        record=record,
        log=log,
        rng=random.Random(1),
        sweep_unmarked=False,
        known_pids=set(),
    )
    return Shutdown(fleet, None, clock=PhaseClock(record, log), record=record, log=log)


def test_first_reason_holds(shutdown: Shutdown) -> None:
    """The time is that of the first signal, and so are reason and deadlines; repeats change nothing."""
    assert shutdown.stop is None and shutdown.phase is Phase.STARTING
    at = now() - 3
    stop = shutdown.begin("SIGTERM", at)
    assert shutdown.begin("SIGINT") is stop is shutdown.stop
    assert (stop.reason, stop.started_at, stop.deadlines.end_at) == ("SIGTERM", at, at + 100)
    assert 96 < stop.grace_left <= 97
    assert shutdown.phase is Phase.FENCING


def test_fence_is_begun_once_and_for_every_worker(shutdown: Shutdown) -> None:
    """Each generation has the one stop as its ending, from the same turn on."""
    stop = shutdown.begin("SIGTERM")
    shutdown.begin("SIGTERM")
    fleet = shutdown._fleet
    assert fleet.is_stopping
    assert [generation.stopping.endings for generation in fleet.generations] == [[stop]] * 3


def test_kill_in_the_turn_of_the_stop(shutdown: Shutdown) -> None:
    """A kill that is read together with the stop finds deadlines to move; nothing has to be remembered."""
    stop = shutdown.begin("SIGTERM")
    shutdown.kill(stop)
    assert stop.deadlines.terminate_at <= now()
    for generation in shutdown._fleet.generations:
        assert generation.stopping.deadlines.terminate_at <= now()


def test_hurry_ends_the_drain_and_keeps_the_close(shutdown: Shutdown) -> None:
    """The drain is over now, the close has its share, and the end comes as much earlier."""
    stop = shutdown.begin("SIGINT")
    before = stop.deadlines
    shutdown.hurry(stop)
    after = stop.deadlines
    assert after.drain_at <= now() < after.close_at
    assert after.close_at - after.drain_at == pytest.approx(before.close_at - before.drain_at)
    assert after.end_at < before.end_at
