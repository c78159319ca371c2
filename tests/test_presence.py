"""The steps that follow a termination, as a table. No clock and no process is needed."""

from __future__ import annotations

from typing import Any

import pytest

from lastcall.worker.presence import RECONNECTED, STAYS, Presence

T, FINISH = 1000.0, 60.0


def presence(**known: Any) -> Presence:
    return Presence(**known)


@pytest.mark.parametrize(
    ("known", "step"),
    [
        # Nothing is due before the server or the job says something.
        ({}, ("wait", None)),
        ({"joined_at": T - 60}, ("wait", None)),
        # A job that has not joined was ended by the owner of the room.
        ({"terminated_at": T}, ("ask", T)),
        # Of one in its room the end comes by itself, or a server leaves it there.
        ({"joined_at": T - 60, "terminated_at": T}, ("ask", T + STAYS)),
        # A full reconnect explains a termination, from RECONNECTED before the look on.
        ({"joined_at": T - 60, "terminated_at": T, "reconnected_at": T + 0.15}, ("wait", None)),
        (
            {"joined_at": T - 60, "terminated_at": T, "reconnected_at": T - RECONNECTED + STAYS},
            ("wait", None),
        ),
        (
            {"joined_at": T - 60, "terminated_at": T, "reconnected_at": T - RECONNECTED},
            ("ask", T + STAYS),
        ),
        # Work after the call has its time, whether or not the server has terminated the job.
        ({"joined_at": T - 60, "left_at": T + 1, "terminated_at": T}, ("kill", T + 1 + FINISH)),
        ({"joined_at": T - 60, "left_at": T}, ("kill", T + FINISH)),
        # So has a job that was asked.
        ({"joined_at": T - 60, "terminated_at": T, "asked_at": T + STAYS}, ("kill", T + STAYS + FINISH)),
    ],
)
def test_the_next_step(known: dict[str, Any], step: tuple[str, float | None]) -> None:
    """Each row is what is known of a job, and the step with its time."""
    assert presence(**known).next_step(T, FINISH) == step


def test_a_room_that_is_joined_again() -> None:
    """A job that leaves its room and comes back has not left it."""
    known = presence()
    for what, at in (("joined", T), ("left", T + 1), ("joined", T + 2)):
        known.take(what, 1, "", at)
    assert known.next_step(T + 3, FINISH) == ("wait", None)


@pytest.mark.parametrize(
    ("known", "is_so"),
    [
        ({"joined_at": T, "left_at": T + 1, "reason": 5}, True),  # the room is deleted
        ({"joined_at": T, "left_at": T + 1, "reason": 4}, True),  # the agent is removed
        ({"joined_at": T, "left_at": T + 1, "reason": 1}, False),  # it has left by itself
        ({"joined_at": T, "left_at": T + 1, "reason": 2}, False),  # another took its identity
        ({"terminated_at": T, "asked_at": T}, True),
        ({"joined_at": T, "terminated_at": T, "asked_at": T + STAYS}, False),
        ({}, False),
    ],
)
def test_who_ended_it(known: dict[str, Any], is_so: bool) -> None:
    """Only the owner of a room has the fate `ended_by_server`."""
    assert presence(**known).is_ended_by_server is is_so
