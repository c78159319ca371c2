"""The state table: every state with every event, and a random walk."""

from __future__ import annotations

import ast
import enum
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lastcall.supervisor.errors import TransitionError
from lastcall.supervisor.fleet.states import (
    ALIVE,
    PHASE_OF,
    SLOT_LOG_EVENT,
    SLOT_TABLE,
    STOP_LOG_EVENT,
    Phase,
    SlotEvent,
    SlotState,
)
from lastcall.worker.inworld.pool import lifecycles
from tests.support.generations import generation_in
from tests.support.meanings import meanings
from tests.support.sources import nodes_of


@pytest.mark.parametrize("state", SlotState)
@pytest.mark.parametrize("event", SlotEvent)
def test_every_state_with_every_event(state: SlotState, event: SlotEvent) -> None:
    """An event that the table lists is done and logged once; every other raises and changes nothing."""
    generation, log = generation_in(state)
    after = SLOT_TABLE.get((state, event))
    if after is None:
        with pytest.raises(TransitionError, match=rf"{event.name} in state {state.name}"):
            generation.change(event)
        assert generation.state is state and log.lines == []
    else:
        generation.change(event)
        assert generation.state is after
        assert len(log.lines) == 1 and log.lines[0][0] == f"slot {after.value}"


def test_random_walk() -> None:
    """From any state the slot can still be brought to STOPPED, and every state can be reached."""
    rng = random.Random(1)
    seen = {SlotState.STOPPED}
    for _ in range(200):
        generation, _log = generation_in(SlotState.STOPPED)
        for _step in range(60):
            events = [event for (state, event) in SLOT_TABLE if state is generation.state]
            assert events, f"{generation.state} is a dead end"
            generation.change(rng.choice(events))
            seen.add(generation.state)
    assert seen == set(SlotState)


def test_every_living_state_can_end() -> None:
    """A process may die in any state that has one, and may be killed in any but KILLING itself."""
    for state in ALIVE:
        assert (state, SlotEvent.FAIL) in SLOT_TABLE
        assert state is SlotState.KILLING or (
            (state, SlotEvent.KILL) in SLOT_TABLE or (state, SlotEvent.TERMINATE) in SLOT_TABLE
        )
    assert set(PHASE_OF) == set(ALIVE)
    assert list(Phase) == sorted(Phase)


@pytest.mark.parametrize("states", [SlotState, Phase, lifecycles.ContextState, lifecycles.ConnectionState])
def test_every_state_has_a_meaning(states: type[enum.Enum]) -> None:
    """Each member has one line of text, made of sentences and free of what would break a table."""
    texts = meanings(states)
    assert set(texts) == {member.name for member in states}
    for name, text in texts.items():
        assert text.endswith(".") and "|" not in text, name


def test_a_state_without_a_meaning_is_found() -> None:
    """A member without a text is missing from the meanings, so the test above fails for that member."""

    class Lamp(enum.Enum):
        ON = "on"
        """The lamp burns."""

        OFF = "off"

    assert meanings(Lamp) == {"ON": "The lamp burns."}


def test_the_page_shows_the_table() -> None:
    """The architecture page is rendered from the code."""
    script = Path(__file__).parent.parent / "scripts" / "states"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def literals(path: Path) -> Iterator[str]:
    for node in nodes_of(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_event_that_is_named_has_an_origin() -> None:
    """A log event that a test waits for, or a page names, is a whole string in the code: `grep` finds it."""
    root = Path(__file__).parent.parent
    rooms = [root / "lastcall" / name for name in ("supervisor", "worker")]  # an sdist has no other
    sources = [path for room in rooms for path in room.rglob("*.py")]
    known = {text for path in sources for text in literals(path)}
    named: dict[str, Path] = {}
    for path in (root / "tests").rglob("*.py"):
        named |= dict.fromkeys(re.findall(r'\.log\(\s*"([^"]+)"', path.read_text()), path)
    for path in [*(root / "docs").glob("*.md"), root / "README.md"]:
        named |= dict.fromkeys(re.findall(r"\bevents? `([^`]+)`", path.read_text()), path)
    assert len(named) > 20
    missing = {name: path.name for name, path in named.items() if name not in known}
    assert not missing, missing


def test_every_state_and_phase_has_its_event() -> None:
    """The tables of log events leave none out, and each ends with the name that status and receipt use."""
    assert set(SLOT_LOG_EVENT) == set(SlotState)
    assert all(event == f"slot {state.value}" for state, event in SLOT_LOG_EVENT.items())
    assert set(STOP_LOG_EVENT) == {phase for phase in Phase if phase >= Phase.FENCING}
    assert all(event == f"stop {phase.text}" for phase, event in STOP_LOG_EVENT.items())
