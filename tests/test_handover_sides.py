"""The two sides of a handover in one process, each in a room of the local server. The test is the worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from livekit import api, rtc

from lastcall.worker.base.succession import epoch_of, successor_identity, taken_from
from lastcall.worker.job import arriving as arriving_module
from lastcall.worker.job import call as call_module
from lastcall.worker.job import deletions, room_watch
from lastcall.worker.job import leaving as leaving_module
from lastcall.worker.job.arriving import Withdrawn
from lastcall.worker.job.capsule import MAX_BYTES
from lastcall.worker.local.room import Room
from lastcall.worker.local.rooms import Kind
from tests.support.handover_stage import CALL, FOUND, ORDER, PATIENCE, SECRET, stage, token


def test_the_attributes_of_a_dispatch() -> None:
    """They come back as they were, and nothing of them is left; other attributes are no handover."""
    attributes = {"k": "v", **FOUND.attributes()}
    assert taken_from(attributes) == FOUND and attributes == {"k": "v"}
    assert SECRET not in repr(FOUND)
    for wrong in ({}, {"lastcall.call": "AJ_1"}, FOUND.attributes() | {"lastcall.epoch": "x"}):
        before = dict(wrong)
        assert taken_from(wrong) is None and wrong == before
    assert epoch_of(FOUND.shown, CALL) == 1
    assert epoch_of(FOUND.shown, "AJ_9") == epoch_of({}, CALL) == -1


@pytest.mark.parametrize(
    ("identity", "epoch", "expected"),
    [
        ("bot", 1, "bot~1"),
        ("bot~1", 2, "bot~2"),
        ("a~b", 1, "a~b~1"),
        ("~", 3, "~~3"),
        ("bot~9~1", 2, "bot~9~2"),
    ],
)
def test_the_identity_of_a_successor(identity: str, epoch: int, expected: str) -> None:
    """That of the first agent, and the epoch; never that of another epoch."""
    assert successor_identity(identity, epoch) == expected


@pytest.mark.core
@pytest.mark.parametrize(
    ("state", "turns"),
    [(1, None), ("ü" * (MAX_BYTES // 2 - 2), "x" * 100_000), ({"turns": ["hello"]}, {"turn": "bye"})],
    ids=["1 byte", "256 kB", "an object"],
)
async def test_a_call_changes_hands(state: object, turns: object) -> None:
    """Capsule and last turns arrive as they were; the old agent is silent before the new one may speak."""
    async with stage() as s:
        s.turns = turns
        await s.begin(state)
        with pytest.raises(RuntimeError, match="there once"):
            _ = s.resumed.state
        await s.arrive()
        assert s.resumed.state == state and not s.heard
        assert await s.arriving.take_over() == turns
        assert s.heard == ["silent"]
        assert await s.arriving.take_over() == turns, "asked again"
        async with asyncio.timeout(PATIENCE):
            await s.left.wait()
        assert [each.step for each in s.steps] == ["prepared", "seen", "silent", "speaks"]
        assert [each.job for each in s.steps if each.step == "seen"] == ["AJ_1"]
        assert s.leaving.phase == "left" and not s.withdrawn.is_set()


@pytest.mark.core
@pytest.mark.parametrize("newer", ["next", "ü" * (MAX_BYTES // 2 - 2), None], ids=["small", "256 kB", "null"])
@pytest.mark.parametrize("turns", [["bye"], "x" * 9_995], ids=["few turns", "many turns"])
async def test_a_state_that_is_kept_after_the_capsule_was_sent(newer: object, turns: object) -> None:
    """The successor has it when it may speak, whatever its size, and no turn between is lost."""
    async with stage() as s:
        s.turns = turns
        await s.begin({"turns": [1]})
        await s.arrive()
        assert s.resumed.state == {"turns": [1]}
        s.capsule.keep(newer)
        assert await s.arriving.take_over() == turns
        assert s.resumed.state == newer and s.arriving.may_speak


async def test_a_newer_state_that_can_not_be_read() -> None:
    """The takeover is refused, and the old agent speaks again with all that it knows."""
    async with stage() as s:
        await s.begin()
        await s.arrive()

        def fail() -> None:
            raise ValueError("my card is 4111")

        s.capsule.keep(fail)
        with pytest.raises(Withdrawn):
            await s.arriving.take_over()
        await s.until(lambda: s.told("refused"))
        assert s.heard == ["silent", "speaks again"] and not s.arriving.may_speak


@pytest.mark.parametrize("lives", [True, False])
async def test_last_turns_that_do_not_come(monkeypatch: pytest.MonkeyPatch, lives: bool) -> None:
    """The successor has no right to speak while its predecessor lives, and else goes on with what it has."""
    monkeypatch.setattr(arriving_module, "LEASE", 0.3)
    monkeypatch.setattr(arriving_module, "ALONE_AFTER", 0.05)
    async with stage() as s:
        await s.begin()
        await s.arrive()
        s.turns = "x" * 20_000

        async def fail(topic: str, line: bytes) -> None:
            if not lives:
                await s.old.disconnect()

        monkeypatch.setattr(s.leaving, "_send", fail)
        if lives:
            with pytest.raises(Withdrawn, match="did not come"):
                await s.arriving.take_over()
            assert not s.arriving.may_speak
        else:
            assert await s.arriving.take_over() is None
            assert s.arriving.may_speak and s.resumed.state == "state"


@pytest.mark.parametrize("lacks", ["keep", "takeover", "take back", "busy", "provider"])
async def test_a_call_that_can_not_leave(lacks: str) -> None:
    """The reason is told, and it shows nothing of what the agent has kept."""
    async with stage() as s, contextlib.AsyncExitStack() as stack:
        expected = {"busy": "busy for 0.3 s", "provider": "call.keep raised ValueError"}.get(lacks, "no ")
        if lacks == "takeover":
            s.leaving.on_takeover = None
        elif lacks == "take back":
            s.leaving.on_take_back = None
        elif lacks == "busy":
            await stack.enter_async_context(s.busy.during())

        def provide() -> object:
            raise ValueError("my card is 4111")

        if lacks == "keep":
            await s.old.connect(s.server.url, token(s.server, "bot", "agent"))
            s.leaving.begin(ORDER)
        else:
            await s.begin(provide if lacks == "provider" else "state")
        (step,) = s.steps
        assert step.step == "impossible" and expected in step.detail and "4111" not in step.detail
        assert s.leaving.phase == "none"


@pytest.mark.core
async def test_who_is_not_answered() -> None:
    """Another identity, a participant that is no agent, a wrong secret, another epoch, a cancelled one."""
    async with stage() as s:
        await s.begin()

        async def ask(identity: str, kind: str, method: str, payload: str) -> str:
            room = Room()
            await room.connect(s.server.url, token(s.server, identity, kind, **FOUND.shown))
            try:
                answer: str = await room.local_participant.perform_rpc(
                    destination_identity="bot", method=method, payload=payload
                )
            finally:
                await room.disconnect()
            return answer

        right = f'{{"secret": "{SECRET}", "epoch": 1}}'
        for identity, kind, payload in (
            ("bot~2", "agent", right),
            ("bot~1", "", right),
            ("bot~1", "agent", right.replace("0123", "9123")),
            ("bot~1", "agent", right.replace("1}", "2}")),
            ("bot~1", "agent", "[]"),
            ("bot~1", "agent", "{"),
        ):
            for method in (leaving_module.HELLO, leaving_module.TAKEOVER):
                with pytest.raises(rtc.RpcError, match="nobody is waited for"):
                    await ask(identity, kind, method, payload)
        assert s.steps[0].step == "prepared" and not s.heard
        assert {each.step for each in s.steps[1:]} <= {"lost"}
        await s.arrive()
        s.leaving.cancel(1)
        assert s.told("cancelled")
        with pytest.raises(Withdrawn):
            await s.arriving.take_over()
        assert not s.heard and s.withdrawn.is_set()
        assert not deletions.may_delete("r"), "it would end the call"


async def test_a_good_moment_is_waited_for() -> None:
    """While a tool runs there is no answer; after its time the old agent keeps the call."""
    async with stage() as s:
        await s.begin()
        await s.arrive()
        async with s.busy.during():
            taking = asyncio.ensure_future(s.arriving.take_over())
            await asyncio.sleep(0.1)
            assert not taking.done() and not s.heard
        assert await taking == ["bye"]
    async with stage() as s:
        await s.begin()
        await s.arrive()
        async with s.busy.during():
            with pytest.raises(Withdrawn, match="busy"):
                await s.arriving.take_over()
        assert s.told("refused") and not s.heard


async def test_a_successor_that_the_server_has_not_shown_yet() -> None:
    """It gets the capsule for its secret. The old agent is silent once it sees the kind of participant."""
    async with stage() as s:
        await s.begin()
        shown: dict[str, Any] = {}
        s.old.on("participant_connected", lambda each: shown.update({each.identity: each}))
        s.old.on("participant_connected", lambda each: s.old.remote_participants.pop(each.identity))
        await s.arrive()
        assert s.resumed.state == "state"
        taking = asyncio.ensure_future(s.arriving.take_over())
        await asyncio.sleep(0.3)
        assert not taking.done() and not s.heard
        s.old.remote_participants.update(shown)
        assert await taking == ["bye"]


async def test_an_agent_that_can_not_be_silent(caplog: pytest.LogCaptureFixture) -> None:
    """Its successor is refused, and it speaks on; the log shows nothing of the error's text."""
    async with stage() as s:

        def fail() -> None:
            raise ValueError("my card is 4111")

        s.leaving.on_takeover = fail
        await s.begin()
        await s.arrive()
        with pytest.raises(Withdrawn):
            await s.arriving.take_over()
        await s.until(lambda: s.told("refused"))
        assert s.heard == ["speaks again"]
        assert "4111" not in caplog.text + repr([vars(record) for record in caplog.records])


async def test_a_silent_agent_takes_its_voice_back() -> None:
    """A cancel does not end the silence; the worker's word that the successor is gone does."""
    async with stage() as s:
        await s.begin()
        await s.arrive()
        await s.arriving._ask(leaving_module.TAKEOVER, PATIENCE)
        s.leaving.cancel(1)
        assert s.told("cancelled") and s.heard == ["silent"]
        s.server.rooms.remove("r", "bot~1")
        await s.until(lambda: s.told("lost"))
        s.leaving.take_back(1)
        await s.until(lambda: s.told("back"))
        assert s.heard == ["silent", "speaks again"] and not s.left.is_set()


@pytest.mark.parametrize("first", ["speaks", "cancel"])
async def test_one_step_decides_who_speaks(first: str) -> None:
    """A successor that was seen to speak is not cancelled, and one that is cancelled is not seen any more."""
    async with stage() as s:
        await s.begin()
        await s.arrive()
        await s.arriving._ask(leaving_module.TAKEOVER, PATIENCE)
        if first == "cancel":
            s.leaving.cancel(1)
        await s.new.local_participant.set_attributes({"lastcall.speaks": "1"})
        await s.until(lambda: s.old.remote_participants["bot~1"].attributes.get("lastcall.speaks"))
        s.leaving.cancel(1)
        assert s.left.is_set() is s.told("speaks") is (first == "speaks")
        assert s.told("cancelled") is (first == "cancel")
        if first == "cancel":  # its worker has looked, and the successor speaks after all
            s.leaving.leave(1)
            assert s.left.is_set() and s.heard == ["silent"]


@pytest.mark.core
async def test_a_successor_that_was_not_told_of_its_removal() -> None:
    """The old agent has its voice back, and the successor comes back to the room: it has to leave.

    It does so by itself, and the old agent tells its worker.
    """
    async with stage() as s:
        await s.begin()
        await s.arrive()
        await s.arriving._ask(leaving_module.TAKEOVER, PATIENCE)
        s.arriving.may_speak = True  # as far as it knows
        s.leaving.cancel(1)
        s.leaving.take_back(1)
        old = s.server.rooms.state.get("r").participants["bot"]  # type: ignore[union-attr]
        await s.until(lambda: old.attributes.get("lastcall.withdrawn") == "1")
        s.server.rooms.reconnect("r", "bot~1")
        await s.until(lambda: s.withdrawn.is_set() and not s.new.isconnected())
        assert not s.arriving.may_speak and not deletions.may_delete("r")
        (returned,) = [each for each in s.steps if each.step == "returned"]
        assert returned.detail.endswith(" bot~1") and s.heard == ["silent", "speaks again"]
        s.server.rooms.reconnect("r", "bot")
        people = s.server.rooms.state.get("r").participants  # type: ignore[union-attr]
        await s.until(
            lambda: people["bot"].sid != old.sid and "lastcall.withdrawn" in people["bot"].attributes
        )
        assert not s.left.is_set()


async def test_a_silent_agent_reconnects() -> None:
    """Its worker decides, although the successor says that it speaks: that one may be about to be removed."""
    async with stage() as s:
        await s.begin()
        await s.arrive()
        await s.arriving._ask(leaving_module.TAKEOVER, PATIENCE)
        s.leaving.cancel(1)
        await s.new.local_participant.set_attributes({"lastcall.speaks": "1"})
        reconnected = asyncio.Event()
        s.old.on("reconnected", reconnected.set)
        s.server.rooms.reconnect("r", "bot")
        async with asyncio.timeout(PATIENCE):
            await reconnected.wait()
        assert "lastcall.speaks" in s.old.remote_participants["bot~1"].attributes
        s.server.rooms.remove("r", "bot~1")
        s.leaving.take_back(1)
        await s.until(lambda: s.told("back"))
        assert s.heard == ["silent", "speaks again"] and not s.left.is_set()


async def test_a_speaking_successor_reconnects() -> None:
    """It says again that it speaks, because a full reconnect has taken that from its attributes."""
    async with stage() as s:
        await s.begin()
        await s.arrive()
        await s.arriving.take_over()
        await s.until(s.left.is_set)
        await s.old.disconnect()
        s.server.rooms.reconnect("r", "bot~1")
        people = s.server.rooms.state.get("r").participants  # type: ignore[union-attr]
        sid = people["bot~1"].sid
        await s.until(lambda: people["bot~1"].sid != sid and "lastcall.speaks" in people["bot~1"].attributes)
        assert not s.withdrawn.is_set() and s.arriving.may_speak


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_silence_that_the_worker_forgets(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    """The agent speaks again by itself when no successor is in the room."""
    monkeypatch.setattr(leaving_module, "SILENT_AT_MOST", 0.1)
    async with stage() as s:
        await s.begin()
        await s.arrive()
        await s.arriving._ask(leaving_module.TAKEOVER, PATIENCE)
        if is_there:
            await asyncio.sleep(0.3)
            assert s.heard == ["silent"]
        s.server.rooms.remove("r", "bot~1")
        await s.until(lambda: s.told("back"))
        assert s.heard == ["silent", "speaks again"]


async def test_an_answer_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives no right to speak: the predecessor may be speaking again."""
    monkeypatch.setattr(arriving_module, "LEASE", -10.0)
    async with stage() as s:
        await s.begin()
        await s.arrive()
        with pytest.raises(Withdrawn, match="too late"):
            await s.arriving.take_over()
        assert not s.arriving.may_speak and s.withdrawn.is_set()


@pytest.mark.parametrize("when", ["before", "meanwhile", "late", "removed", "hello", "capsule"])
async def test_a_capsule_that_does_not_come(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The successor goes on without a state if its predecessor is gone, and leaves again if it lives.

    One that does not answer is asked again until it wakes, or is gone.
    """
    monkeypatch.setattr(arriving_module, "ANSWERS_WITHIN", 0.3)
    monkeypatch.setattr(arriving_module, "SHOWN_FOR", 1.0 if when == "hello" else 60.0)
    monkeypatch.setattr(arriving_module, "SAY_HELLO_AGAIN_AFTER", 0.01)
    monkeypatch.setattr(arriving_module, "CAPSULE_WITHIN", 0.3)
    async with stage() as s:
        asked, ask = 0, s.arriving._ask

        async def count(*arguments: Any) -> Any:
            nonlocal asked
            asked += 1
            return await ask(*arguments)

        monkeypatch.setattr(s.arriving, "_ask", count)
        if when == "before":
            await s.arrive()
            assert s.resumed.state is None and await s.arriving.take_over() is None
            assert s.arriving.may_speak
            return
        await s.begin()
        take_relayed = s.old.local_participant.take_relayed
        if when != "capsule":
            s.old.local_participant.take_relayed = lambda *_: None  # type: ignore[method-assign]  # it hangs
        if when in ("meanwhile", "late", "removed"):
            arriving = asyncio.ensure_future(s.arrive())
            await s.until(lambda: asked > 1)
            if when == "late":
                s.old.local_participant.take_relayed = take_relayed  # type: ignore[method-assign]
            else:
                s.server.rooms.remove("r", "bot" if when == "meanwhile" else "bot~1")
            if when == "removed":
                with pytest.raises(Withdrawn, match=r"the room is gone|nobody is in the room"):
                    await arriving
                return
            await arriving
            assert await s.arriving.take_over() == (["bye"] if when == "late" else None)
            assert s.resumed.state == ("state" if when == "late" else None) and s.arriving.may_speak
            return
        if when == "capsule":
            monkeypatch.setattr(s.leaving, "_send", lambda *_: asyncio.sleep(0))
        with pytest.raises(Withdrawn, match="did not come"):
            await s.arrive()
        with pytest.raises(Withdrawn):
            await s.arriving.take_over()
        await s.until(lambda: s.withdrawn.is_set() and not s.new.isconnected())
        assert not s.arriving.may_speak and s.old.isconnected() and not s.heard


@pytest.mark.parametrize("when", ["capsule", "takeover", "frozen"])
async def test_a_predecessor_that_dies(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The successor goes on, with the capsule if it has come; one that only hangs is removed first."""
    monkeypatch.setattr(arriving_module, "TAKEOVER_WITHIN", 0.3)
    monkeypatch.setattr(arriving_module, "ALONE_AFTER", 0.05)
    async with stage() as s:
        await s.begin()
        await s.arrive()
        if when == "takeover":
            s.server.rooms.remove("r", "bot")
            await s.until(lambda: not s.old.isconnected())
        elif when in ("capsule", "frozen"):
            s.old.local_participant.take_relayed = lambda *_: None  # type: ignore[method-assign]
        assert await s.arriving.take_over() is None
        assert s.arriving.may_speak and s.heard == []
        assert s.resumed.state == "state"
        await s.until(lambda: "bot" not in s.new.remote_participants)
        if when == "frozen":  # it comes back, with its token that is still good
            again = Room()
            await again.connect(s.server.url, token(s.server, "bot", "agent"))
            await s.until(lambda: not again.isconnected())


async def test_an_agent_that_knows_nothing_of_handovers(caplog: pytest.LogCaptureFixture) -> None:
    """It is withdrawn before it joins the room, because it would speak at once."""
    async with stage() as s:
        s.arriving._is_asked_for = lambda: False
        await s.begin()
        for _ in range(2):  # one that catches the error, and tries again
            with pytest.raises(Withdrawn, match="not called"):
                await (s.new.connect("", "") if s.withdrawn.is_set() else s.arrive())
        room = s.server.rooms.state.get("r")
        assert room is not None and list(room.participants) == ["caller", "bot"]
        assert s.withdrawn.is_set() and not s.told("seen") and not deletions.may_delete("r")
        assert "has to call lastcall.call(ctx) before" in caplog.text


@pytest.mark.parametrize("catches", [False, True])
async def test_the_code_of_a_successor_that_leaves_again(
    monkeypatch: pytest.MonkeyPatch, catches: bool
) -> None:
    """It is cancelled once, for all that it shuts down its job again and again, and may end in order then."""
    monkeypatch.setattr(room_watch, "LEAVES_WITHIN", 0.3)
    ends: list[str] = []

    async def entrypoint(ctx: Any) -> None:
        with pytest.raises(Withdrawn):
            await ctx.room.connect("", "")
        try:
            while True:
                ctx.shutdown(reason="out of its room")
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            ends.append("cancelled")
            if not catches:
                raise
            await asyncio.sleep(0.02)
            ends.append("in order")

    class Process:
        """Stands for livekit-agents' JobProcess."""

    process, shut_down = Process(), 0

    def shutdown(reason: str) -> None:
        nonlocal shut_down
        shut_down += 1

    job = SimpleNamespace(
        id="AJ_1", attributes=FOUND.attributes(), metadata="m", room=SimpleNamespace(name="r")
    )
    ctx = SimpleNamespace(proc=process, job=job, room=Room(), shutdown=shutdown)
    call_module.begin(process, "")
    room_watch.begin(process, lambda *_: None)
    try:
        async with asyncio.timeout(PATIENCE):
            await room_watch.WatchedEntrypoint(entrypoint)(ctx)
    finally:
        await call_module.end(process)
        deletions.permit("r")
    assert ends == ["cancelled"] + ["in order"] * catches and shut_down > 3


@pytest.mark.parametrize("when", ["before", "connected", "alone", "taken"])
async def test_a_successor_whose_worker_stops(when: str) -> None:
    """It leaves again before it has the call, unless its predecessor is gone; afterwards it stays."""
    async with stage() as s:
        is_stopping = when == "before"
        s.arriving._is_stopping = lambda: is_stopping
        await s.begin()
        if when == "before":
            with pytest.raises(Withdrawn, match="stopped"):
                await s.arrive()
        else:
            await s.arrive()
        if when == "alone":
            await s.old.disconnect()
            await s.until(lambda: "bot" not in s.new.remote_participants)
        elif when == "taken":
            await s.arriving.take_over()
        s.arriving.stop()
        if when in ("alone", "taken"):
            is_stopping = True  # or its worker has died
            await s.arriving.take_over()
            assert s.arriving.may_speak and not s.withdrawn.is_set()
            return
        await s.until(lambda: s.withdrawn.is_set() and not s.new.isconnected())
        with pytest.raises(Withdrawn, match="stopped"):
            await s.arriving.take_over()
        assert not s.heard and s.old.isconnected()


@pytest.mark.parametrize("when", ["before", "at once", "alone", "later"])
async def test_a_successor_whose_code_ends(when: str) -> None:
    """It leaves at once as long as it has not said that it speaks, and its predecessor lives."""
    async with stage() as s:
        await s.begin()
        await s.arrive()
        if when == "alone":
            await s.old.disconnect()
            await s.until(lambda: "bot" not in s.new.remote_participants)
        if when != "before":
            assert await s.arriving.take_over() == (None if when == "alone" else ["bye"])
        if when == "later":
            await s.until(lambda: s.told("speaks"))
        assert s.arriving.serves_a_caller is (when != "before")
        s.arriving.end("the entrypoint raised KeyError")
        if when in ("alone", "later"):
            assert s.arriving.may_speak and not s.withdrawn.is_set() and s.new.isconnected()
            s.caller.leave()
            await s.until(lambda: not s.arriving.serves_a_caller)
            return
        await s.until(lambda: s.withdrawn.is_set() and not s.new.isconnected())
        await s.until(lambda: s.told("lost"))
        assert not s.arriving.may_speak and not s.told("speaks") and not deletions.may_delete("r")
        if when == "before":
            assert not s.heard
            return
        s.leaving.cancel(1)
        s.leaving.take_back(1)
        await s.until(lambda: s.told("back"))
        assert s.heard == ["silent", "speaks again"] and not s.left.is_set()


@pytest.mark.parametrize("lost", ["question", "answer"])
async def test_a_takeover_that_is_lost(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """A predecessor that lives is not removed: it is asked again, or refuses and takes its voice back."""
    monkeypatch.setattr(arriving_module, "TAKEOVER_WITHIN", 0.3)
    monkeypatch.setattr(arriving_module, "LIVES_WITHIN", PATIENCE)
    async with stage() as s:
        await s.begin()
        await s.arrive()
        ask, asked = s.arriving._ask, 0

        async def lose(method: str, within: float) -> Any:
            nonlocal asked
            asked += method == leaving_module.TAKEOVER
            if method == leaving_module.TAKEOVER and asked == 1:
                if lost == "answer":
                    await ask(method, PATIENCE)
                return None
            return await ask(method, within)

        monkeypatch.setattr(s.arriving, "_ask", lose)
        if lost == "question":
            assert await s.arriving.take_over() == ["bye"]
            assert asked == 2 and s.heard == ["silent"]
            return
        with pytest.raises(Withdrawn, match="not now: silent"):
            await s.arriving.take_over()
        await s.until(lambda: s.told("lost"))
        s.leaving.cancel(1)
        s.leaving.take_back(1)
        await s.until(lambda: s.told("back"))
        assert s.heard == ["silent", "speaks again"] and s.old.isconnected()


@pytest.mark.parametrize("when", ["at the join", "at the takeover"])
async def test_a_predecessor_that_is_back(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """One that was out of the room for a full reconnect gives its state away, or keeps the call."""
    monkeypatch.setattr(arriving_module, "ALONE_AFTER", 2.0)
    async with stage() as s:
        await s.begin()
        if when == "at the join":
            looks = iter([None])  # the first one finds nobody

            def look(arriving: arriving_module.Arriving) -> Any:
                return next(looks, arriving._room.remote_participants.get("bot"))

            monkeypatch.setattr(arriving_module.Arriving, "_predecessor", property(look))
            await s.arrive()
            assert s.resumed.state == "state"
            return
        await s.arrive()
        s.server.rooms.remove("r", "bot")
        await s.until(lambda: "bot" not in s.new.remote_participants)
        taking = asyncio.ensure_future(s.arriving.take_over())
        await asyncio.sleep(0)
        s.server.rooms.visit("r", "bot", kind=Kind.AGENT)
        with pytest.raises(Withdrawn, match="is back"):
            await taking
        await s.until(lambda: not s.new.isconnected())
        assert not s.arriving.may_speak


async def test_a_successor_that_ends_while_the_old_agent_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not speak, although it is in the room yet, and can't delete the room of the old agent."""
    leaves = asyncio.Event()

    async def leave(room: Room) -> None:
        await leaves.wait()
        await room.disconnect()

    monkeypatch.setattr(arriving_module, "leave_now", leave)
    async with stage() as s:
        await s.begin()
        await s.arrive()

        async def be_silent() -> object:
            s.arriving.end("the agent shuts its job down")
            return await s.be_silent()

        s.leaving.on_takeover = be_silent
        with pytest.raises(Withdrawn, match="shuts its job down"):
            await s.arriving.take_over()
        assert s.new.isconnected() and not s.arriving.may_speak and not deletions.may_delete("r")
        leaves.set()
        await s.until(lambda: s.told("lost"))


@pytest.mark.parametrize("successor", ["has come", "comes", "none"])
async def test_an_old_agent_whose_worker_dies(successor: str) -> None:
    """It leaves the room if a successor is there, or comes, which has not to wait for it then."""
    async with stage() as s:
        await s.begin()
        if successor == "has come":
            await s.arrive()
        if successor == "none":
            s.leaving.cancel(1)
        s.leaving.lose_worker()
        if successor == "none":
            await asyncio.sleep(0.1)
            assert s.old.isconnected()
            return
        await s.until(lambda: not s.old.isconnected())
        if successor == "comes":
            await s.arrive()
        assert await s.arriving.take_over() is None
        assert s.resumed.state == ("state" if successor == "has come" else None)
        assert s.arriving.may_speak and not s.heard


@pytest.mark.parametrize("how", ["left", "removed", "reconnected", "reconnects"])
async def test_when_a_successor_is_lost(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """One that has left is not waited for. Where the old agent reconnects, everybody leaves and is back."""
    within = {"reconnected": 0.3, "reconnects": 0.02}
    monkeypatch.setattr(leaving_module, "BACK_WITHIN", within.get(how, 600.0))
    async with stage() as s:
        await s.begin()
        await s.arrive()
        if how == "reconnects":  # as rust-sdks tells it: everybody leaves first
            s.old._set_state(rtc.ConnectionState.CONN_RECONNECTING)
            s.old._gone("bot~1", None)
            await asyncio.sleep(0.3)
            assert not s.told("lost")
            s.old._set_state(rtc.ConnectionState.CONN_CONNECTED)
            await s.until(lambda: s.told("lost"))
            return
        if how == "reconnected":
            s.server.rooms.reconnect("r", "bot")
            reconnected = asyncio.Event()
            s.old.on("reconnected", reconnected.set)
            async with asyncio.timeout(PATIENCE):
                await reconnected.wait()
            await asyncio.sleep(0.6)
            assert not s.told("lost")
            return
        if how == "removed":
            s.server.rooms.remove("r", "bot~1")
        else:
            await s.new.disconnect()
        await s.until(lambda: s.told("lost"))


async def test_a_successor_whose_worker_dies_at_the_answer() -> None:
    """It leaves the call to the old agent, because it would end with its worker. The old one speaks again."""
    async with stage() as s:
        lives = True

        async def ask_worker(_within: float) -> bool:
            return lives

        s.arriving._ask_worker = ask_worker
        await s.begin()
        await s.arrive()

        async def be_silent() -> object:
            nonlocal lives
            lives = False
            return await s.be_silent()

        s.leaving.on_takeover = be_silent
        with pytest.raises(Withdrawn, match="worker of the successor does not answer"):
            await s.arriving.take_over()
        assert not s.arriving.may_speak
        await s.until(lambda: s.withdrawn.is_set() and s.told("lost"))
        s.leaving.cancel(1)
        s.leaving.take_back(1)
        await s.until(lambda: s.told("back"))
        assert s.heard == ["silent", "speaks again"] and s.old.isconnected() and not s.left.is_set()


async def test_a_successor_without_the_call_is_not_handed_over() -> None:
    """The leaving side refuses before the takeover, and not after it."""
    async with stage() as s:
        has_call = False
        s.leaving._has_call = lambda: has_call
        await s.begin()
        assert [(each.step, each.detail) for each in s.steps] == [
            ("impossible", "the agent has not the call yet")
        ]
        has_call = True
        s.leaving.begin(ORDER)
        await s.until(lambda: s.told("prepared"))


async def test_a_room_without_a_caller_and_one_with_another_successor() -> None:
    """The successor leaves; egress and agents are no callers."""
    async with stage() as s:
        s.caller.leave()
        with pytest.raises(Withdrawn, match="nobody"):
            await s.arrive()
        assert s.withdrawn.is_set()
    async with stage() as s:
        other = Room()
        await other.connect(s.server.url, token(s.server, "bot~2", "agent", **FOUND.shown))
        with pytest.raises(Withdrawn, match="another successor"):
            await s.arrive()
        await other.disconnect()


async def test_an_agent_that_was_not_told_of_its_removal() -> None:
    """It looks around when it is back, and leaves in silence if a successor speaks."""
    async with stage() as s:
        await s.begin()
        await s.arrive(**{"lastcall.speaks": "1"})
        s.leaving.phase, s.leaving._order = "none", None
        s.server.rooms.reconnect("r", "bot")
        async with asyncio.timeout(PATIENCE):
            await s.left.wait()
        assert s.heard == ["silent"]


async def test_a_room_that_goes_on_is_not_deleted(caplog: pytest.LogCaptureFixture) -> None:
    """By no client of livekit's API in the process; another room is, and this one too after a take-back."""
    async with stage() as s:
        deletions.forbid("r")
        async with api.LiveKitAPI(s.server.url, s.server.api_key, s.server.api_secret) as client:
            with caplog.at_level(logging.INFO):
                await client.room.delete_room(api.DeleteRoomRequest(room="r"))
            assert s.caller.is_connected and "not deleted" in caplog.text
            deletions.forbid("r")
            deletions.permit("r")
            await client.room.delete_room(api.DeleteRoomRequest(room="r"))
            assert not s.caller.is_connected
