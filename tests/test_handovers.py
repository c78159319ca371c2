"""The decisions of a worker that hands over calls, without a server and without a job."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from lastcall.worker import handovers as module
from lastcall.worker.base.calls_over import CallsOver
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.settings import HandoverSettings
from lastcall.worker.base.succession import Succession, taken_from
from lastcall.worker.base.wire import (
    BeginHandover,
    CallHears,
    CallKeeps,
    CallStep,
    CancelHandover,
    HandoverOff,
    JobCut,
    JobEnded,
    JobHandover,
    LeaveRoom,
    Removed,
    TakeBack,
)
from lastcall.worker.engine import Engine
from lastcall.worker.handovers import Handovers
from lastcall.worker.jobs import Job, Jobs
from lastcall.worker.presence import EVICTED
from lastcall.worker.room_service import Dispatch, Participant, RoomServiceError

KEEPS = CallKeeps(size=5, kept_at=1.0)


class Worker:
    """A worker with one job. `answers` are the steps of its call, by the message that they follow."""

    def __init__(self, **settings: Any) -> None:
        self.changed = Condition()
        self.told: list[Any] = []
        self.jobs = Jobs(self.changed, self.told.append)
        self.job = self.launch("AJ_1")
        self.said: list[CallHears] = []
        self.answers: dict[type, list[CallStep]] = {}
        self.people: list[Participant] = []
        self.removed: list[str] = []
        self.created: list[dict[str, str]] = []
        self.deleted: list[str] = []
        self.agents: list[str] | None = []
        self.others = [
            Dispatch(id="AD_0", agent_name="a", agents=("bot",)),
            Dispatch(id="AD_2", agent_name="b"),
        ]
        self.error: RoomServiceError | None = None
        self.url = "wss://sfu.example"
        self.is_closing = False
        self.begun: list[asyncio.Future[None]] = []
        self.handovers = Handovers(
            self.jobs,
            self.changed,
            lambda: self,  # type: ignore[arg-type, return-value]  # it stands for the service too
            settings=HandoverSettings(**({"wait": 0.01, "patience": 0.05} | settings)),
            url=lambda: self.url,
            say=self.say,
            report=self.told.append,
            begin=lambda work: work.close(),
            is_closing=lambda: self.is_closing,
        )
        self.handovers.hear("AJ_1", KEEPS)

    def launch(self, id: str) -> Job:
        """Have a job in its room, that keeps nothing yet."""
        room = SimpleNamespace(name="r", sid="RM_1")
        asked = SimpleNamespace(
            id=id, room=room, agent_name="a", dispatch_id="", metadata="m", attributes={"k": "v"}, type=0
        )
        executor = SimpleNamespace(pid=None, running_job=SimpleNamespace(job=asked))
        self.jobs.launch(id, executor, asked)
        job = self.jobs.get(id)
        assert job is not None
        job.pid, job.gone = os.getppid(), False
        self.jobs.in_room(id, "joined", 0, "PA_1 bot")
        return job

    def say(self, job: str, message: CallHears) -> bool:
        assert job == "AJ_1"
        self.said.append(message)
        for step in self.answers.get(type(message), []):
            asyncio.get_running_loop().call_soon(self.handovers.hear, job, step)
        return True

    async def create_dispatch(
        self,
        room: str,
        agent_name: str,
        metadata: str,
        deployment: str,
        attributes: dict[str, str],
        *,
        restarts: bool,
    ) -> str:
        assert (room, agent_name, metadata, deployment, restarts) == ("r", "a", "m", "", False)
        self.created.append(attributes)
        self.changed.notify()
        if self.error is not None:
            raise self.error
        for step in self.answers.get(str, []):
            asyncio.get_running_loop().call_soon(self.handovers.hear, "AJ_1", step)
        return "AD_1"

    async def dispatches(self, room: str) -> list[Dispatch]:
        assert room == "r"
        if self.agents is None:
            return self.others
        return [Dispatch(id="AD_1", agent_name="a", agents=tuple(self.agents)), *self.others]

    async def delete_dispatch(self, room: str, dispatch_id: str) -> None:
        self.deleted.append(dispatch_id)

    async def participants(self, room: str) -> list[Participant]:
        return self.people

    async def remove(self, room: str, identity: str, sid: str) -> bool:
        self.removed.append(identity)
        self.people = [each for each in self.people if each.identity != identity]
        return True

    def kinds(self) -> list[type]:
        return [type(message) for message in self.said]


def step(name: Any, epoch: int = 1, **more: str) -> CallStep:
    return CallStep(epoch=epoch, step=name, **more)


def successor(speaks: str = "", epoch: int = 1) -> Participant:
    shown = {"lastcall.call": "AJ_1", "lastcall.epoch": str(epoch), "lastcall.speaks": speaks}
    return Participant(
        identity=f"bot~{epoch}",
        keeps_open=False,
        is_agent=True,
        agent_name="a",
        sid="PA_2",
        attributes=shown,
    )


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREPARED_WITHIN", "READY_WITHIN", "SPEAKS_WITHIN", "ANSWERS_WITHIN", "SHOWN_WITHIN"):
        monkeypatch.setattr(module, name, 0.05)
    monkeypatch.setattr(module, "LOOK_AGAIN_AFTER", 0.01)
    monkeypatch.setattr(module, "TRY_AGAIN_AFTER", 0.01)


async def test_why_a_call_is_not_handed_over() -> None:
    """Each reason has its words, and nothing is tried."""
    worker = Worker(limit=2)
    assert worker.handovers.lacks(worker.job) == ""

    def lacks(**changes: Any) -> str:
        made = Worker(**changes.pop("settings", {}))
        for name, value in changes.items():
            setattr(made.job, name, value)
        return made.handovers.lacks(made.job)

    found = Succession(call="AJ_0", epoch=7, count=3, predecessor="p", identity="i", secret="s")
    assert "enabled is false" in lacks(settings={"enabled": False})
    assert "JT_ROOM" in lacks(type=1) or "not one of a room" in lacks(type=1)
    assert "thread" in lacks(pid=os.getpid())
    assert "3 times already" in lacks(succession=found)
    assert "ending" in lacks(successor="AJ_2") and "ending" in lacks(cut_short=True)
    worker.handovers.hear("AJ_1", CallKeeps(size=5, kept_at=1.0, lacks="no function of on_takeover"))
    assert worker.handovers.lacks(worker.job) == "no function of on_takeover"
    worker.handovers.forget("AJ_1")
    assert worker.handovers.lacks(worker.job) == "no call.keep"
    away = Worker()
    away.jobs.in_room("AJ_1", "left", 1, "")
    assert "not in its room" in away.handovers.lacks(away.job)
    cloud, allowed = Worker(), Worker(on_cloud=True)
    cloud.url = allowed.url = "wss://x.livekit.cloud"
    assert "Cloud" in cloud.handovers.lacks(cloud.job) and not allowed.handovers.lacks(allowed.job)
    outcome = await cloud.handovers.hand_over(cloud.job, "test")
    assert (outcome.result, cloud.said) == ("refused", []) and isinstance(cloud.told[-1], JobHandover)


async def test_a_call_is_handed_over() -> None:
    """The dispatch has the metadata and attributes of the first, and the job its successor at once."""
    worker = Worker()
    worker.answers = {
        BeginHandover: [step("prepared")],
        str: [step("seen", job="AJ_2"), step("silent"), step("speaks")],
    }
    outcome = await worker.handovers.hand_over(worker.job, "test")
    assert (outcome.result, outcome.successor, worker.job.successor) == ("done", "AJ_2", "AJ_2")
    (attributes,) = worker.created
    found = taken_from(attributes)
    assert attributes == {"k": "v"} and found is not None
    assert (found.call, found.epoch, found.count, found.reason) == ("AJ_1", 1, 1, "test")
    assert (found.predecessor, found.identity, len(found.secret)) == ("bot", "bot~1", 32)
    assert worker.kinds() == [BeginHandover] and not worker.removed and not worker.deleted
    assert not worker.handovers.is_taken(found) and worker.handovers.is_taken(found)


@pytest.mark.parametrize(
    ("after", "people", "expected", "messages"),
    [
        ([], [], "nobody took it", [CancelHandover]),
        ([step("seen"), step("lost", detail="gone")], [], "gone", [CancelHandover]),
        ([step("seen"), step("refused", detail="busy")], [successor()], "busy", [CancelHandover]),
        ([step("seen")], [successor()], "the successor was not ready within", [CancelHandover]),
        ([step("seen"), step("silent")], [], "the successor did not speak", [CancelHandover, TakeBack]),
        (
            [step("seen"), step("silent")],
            [successor()],
            "the successor did not speak",
            [CancelHandover, TakeBack],
        ),
        ([step("seen", job="AJ_2"), step("silent")], [successor("1")], "", [CancelHandover, LeaveRoom]),
        ([step("seen", job="AJ_2"), step("silent")], [successor("2", 2)], "", [CancelHandover, LeaveRoom]),
        (
            [step("seen"), step("silent"), step("lost")],
            [],
            "the successor did not speak",
            [CancelHandover, TakeBack],
        ),
    ],
)
async def test_tries_that_fail(
    after: list[CallStep], people: list[Participant], expected: str, messages: list[type]
) -> None:
    """The old agent is told first; a silent one speaks again only when its successor is out of the room."""
    worker = Worker()
    worker.people = people
    worker.answers = {
        BeginHandover: [step("prepared")],
        str: after,
        CancelHandover: [step("cancelled")],
        TakeBack: [step("back")],
    }
    outcome = await worker.handovers.hand_over(worker.job, "test")
    assert expected in outcome.reason and worker.kinds()[1:] == messages
    assert (outcome.result == "done") is (not expected)
    assert worker.deleted == (["AD_1"] if expected else [])
    assert worker.removed == (["bot~1"] if expected and people else [])
    assert worker.handovers.lacks(worker.job) == ("" if expected else "the call is ending")


async def test_a_cancel_that_comes_too_late() -> None:
    """The agent was silent already: the successor is removed, and then the agent speaks again."""
    worker = Worker()
    worker.people = [successor()]
    worker.answers = {
        BeginHandover: [step("prepared")],
        str: [step("seen")],
        CancelHandover: [step("silent"), step("cancelled")],
        TakeBack: [step("back")],
    }
    outcome = await worker.handovers.hand_over(worker.job, "test")
    assert worker.kinds() == [BeginHandover, CancelHandover, TakeBack]
    assert worker.removed == ["bot~1"] and outcome.reason == "the successor did not speak"


async def test_a_successor_that_is_back_and_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had left for a full reconnect. It has its time to speak, and is not taken for lost then."""
    monkeypatch.setattr(module, "SPEAKS_WITHIN", 20)
    worker = Worker()
    worker.answers = {
        BeginHandover: [step("prepared")],
        str: [step("seen", job="AJ_2"), step("lost"), step("silent")],
    }
    handing = asyncio.ensure_future(worker.handovers.hand_over(worker.job, "test"))
    await worker.changed.until(lambda: worker.created)
    await asyncio.sleep(0.1)
    worker.handovers.hear("AJ_1", step("speaks"))
    async with asyncio.timeout(5):
        outcome = await handing
    assert outcome.result == "done" and worker.kinds() == [BeginHandover]


async def test_a_successor_that_speaks_while_it_is_cancelled() -> None:
    """The old agent has seen it first: it is not removed, and has the call."""
    worker = Worker()
    worker.people = [successor()]
    worker.answers = {
        BeginHandover: [step("prepared")],
        str: [step("seen", job="AJ_2"), step("silent")],
        CancelHandover: [step("speaks")],
    }
    outcome = await worker.handovers.hand_over(worker.job, "test")
    assert (outcome.result, worker.job.successor, worker.removed) == ("done", "AJ_2", [])
    assert worker.kinds() == [BeginHandover, CancelHandover]


async def test_an_old_agent_that_hangs_in_its_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is removed before it answers, because it could not speak; in the end it has failed."""
    monkeypatch.setattr(module, "REMOVED_WITHIN", 0.3)
    worker = Worker()
    worker.people = [successor()]
    worker.answers = {BeginHandover: [step("prepared")], str: [step("seen"), step("silent")]}
    handing = asyncio.ensure_future(worker.handovers.hand_over(worker.job, "test"))
    await asyncio.sleep(0.2)
    worker.people = []
    outcome = await handing
    assert (outcome.result, outcome.reason) == ("failed", "the agent does not answer")
    assert not worker.removed and TakeBack not in worker.kinds()


@pytest.mark.parametrize("speaks", [True, False])
async def test_an_agent_that_hung_and_wakes_silent(speaks: bool) -> None:
    """Its try is over: it speaks again only if the server shows no successor that has the call."""
    worker = Worker()
    worker.people = [successor("4", 4)] if speaks else []
    worker.answers = {CancelHandover: [step("silent", 4), step("cancelled", 4)], TakeBack: [step("back", 4)]}
    worker.handovers._begin = lambda work: worker.begun.append(asyncio.ensure_future(work))
    worker.handovers.hear("AJ_1", step("silent", 4))
    await asyncio.gather(*worker.begun)
    last = LeaveRoom(epoch=4) if speaks else TakeBack(epoch=4)
    assert worker.said == [CancelHandover(epoch=4), last]
    assert worker.job.successor == ("bot~4" if speaks else "")
    assert bool([each for each in worker.told if isinstance(each, JobHandover)]) is speaks
    if speaks:
        worker.handovers.hear("AJ_1", step("silent", 4))
        await asyncio.gather(*worker.begun)
        assert worker.said[2:] == [LeaveRoom(epoch=4)]


async def test_an_agent_that_comes_back_after_its_removal() -> None:
    """It is removed again, whether or not a handover is under way."""
    worker = Worker()
    worker.handovers._begin = lambda work: worker.begun.append(asyncio.ensure_future(work))
    worker.handovers.hear("AJ_1", step("returned", detail="PA_9 bot~1"))
    await asyncio.gather(*worker.begun)
    assert worker.removed == ["bot~1"]


@pytest.mark.parametrize(
    ("reason", "is_over"),
    [(1, True), (5, True), (10, True), (None, True), (0, False), (4, False), (14, False)],
)
async def test_an_agent_that_leaves_its_room(reason: int | None, is_over: bool) -> None:
    """The call is over if the agent or the server has ended it; after every other end a successor goes on.

    A job may say that its call is over, and nothing of its room.
    """
    worker = Worker()
    worker.people = [successor("" if is_over else "1")]
    worker.answers = {BeginHandover: [step("prepared")], str: [step("seen", job="AJ_2")]}
    handing = asyncio.ensure_future(worker.handovers.hand_over(worker.job, "test"))
    await worker.changed.until(lambda: worker.created)
    await asyncio.sleep(0)
    if reason is None:
        worker.jobs.over("AJ_1", lambda _executor: None)
    else:
        worker.jobs.in_room("AJ_1", "left", reason, "")
    outcome = await handing
    assert worker.removed == (["bot~1"] if is_over else [])
    assert (outcome.reason, outcome.successor) == (("the call has ended", "") if is_over else ("", "AJ_2"))


@pytest.mark.parametrize("is_dead", [True, False])
async def test_a_takeover_that_comes_late(monkeypatch: pytest.MonkeyPatch, is_dead: bool) -> None:
    """The old agent has died or hangs, and that is told. A successor that speaks later is told too."""
    monkeypatch.setattr(module, "LATE_WITHIN", 10.0)
    worker = Worker()
    worker.handovers._begin = lambda work: worker.begun.append(asyncio.ensure_future(work))
    worker.people = [successor()]
    worker.answers = {BeginHandover: [step("prepared")], str: [step("seen", job="AJ_2")]}
    handing = asyncio.ensure_future(worker.handovers.hand_over(worker.job, "test"))
    await worker.changed.until(lambda: worker.created)
    worker.job.gone = is_dead
    assert (await handing).reason == (
        "the agent died" if is_dead else "the successor was not ready within 0.05 s"
    )
    worker.people = [successor("1")]
    await asyncio.gather(*worker.begun)
    told = [each for each in worker.told if isinstance(each, JobHandover)]
    assert [(each.result, each.successor) for each in told] == [("failed", ""), ("done", "AJ_2")]
    assert not worker.removed


@pytest.mark.parametrize("when", ["dispatch", "silent", "for good"])
async def test_a_fault_in_a_handover(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """It is over for all that wait for it, and an agent that is silent has its voice back."""
    worker = Worker()
    worker.answers = {
        BeginHandover: [step("prepared")],
        str: [step("seen"), step("silent")],
        CancelHandover: [step("cancelled")],
        TakeBack: [step("back")],
    }
    faults = {"dispatch": 0, "silent": 1, "for good": 99}[when]

    async def fail(*_arguments: Any, **_options: Any) -> Any:
        nonlocal faults
        faults -= bool(worker.created)
        if when == "dispatch" or (worker.created and faults >= 0):
            raise KeyError("a fault")
        return []

    monkeypatch.setattr(worker, "create_dispatch" if when == "dispatch" else "participants", fail)
    outcome = await worker.handovers.hand_over(worker.job, "test")
    expected = "the successor did not speak" if when == "silent" else "fault in lastcall"
    assert (outcome.result, outcome.reason) == ("failed", expected)
    assert isinstance(worker.told[-1], JobHandover) and worker.handovers.lacks(worker.job) == ""
    assert (TakeBack in worker.kinds()) is (when == "silent")


async def test_a_key_without_the_right() -> None:
    """Handover is off after it, and told once; another error is no reason for that."""
    worker = Worker()
    worker.answers = {BeginHandover: [step("prepared")]}
    worker.error = RoomServiceError("CreateDispatch: TimeoutError")
    assert (await worker.handovers.hand_over(worker.job, "test")).result == "failed"
    assert not worker.handovers.off
    worker.answers = {BeginHandover: [step("prepared", 2)]}
    worker.error = RoomServiceError("CreateDispatch: 401 unauthenticated", 401)
    await worker.handovers.hand_over(worker.job, "test")
    assert "401" in worker.handovers.off["a"]
    assert (await worker.handovers.hand_over(worker.job, "test")).result == "refused"
    assert len([each for each in worker.told if isinstance(each, HandoverOff)]) == 1


def agent(identity: str, name: str = "a", **shown: str) -> Participant:
    """Return an agent of the room that is not the successor."""
    return Participant(
        identity=identity,
        keeps_open=False,
        is_agent=True,
        agent_name=name,
        sid=f"PA_{identity}",
        attributes={"lk.agent_name": name, **shown},
    )


@pytest.mark.parametrize("how", ["successor", "named", "seen", "late"])
async def test_an_agent_beside_the_successor(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The one that has taken the dispatch is removed. Every other agent of the room stays.

    The server names it, also before it joins. Sooner it is the one that has come, if no other dispatch waits.
    """
    monkeypatch.setattr(module, "LOOK_AGAIN_AFTER", 0.01)
    worker = Worker(patience=10)
    worker.handovers._begin = lambda work: worker.begun.append(asyncio.ensure_future(work))
    worker.people = [agent("agent-AJ_8")]
    worker.answers = {BeginHandover: [step("prepared")], CancelHandover: [step("cancelled")]}
    if how == "late":
        worker.others.append(Dispatch(id="AD_3", agent_name="a"))
    handing = asyncio.ensure_future(worker.handovers.hand_over(worker.job, "test"))
    await worker.changed.until(lambda: worker.created)
    await asyncio.sleep(0.1)
    shown = {"lastcall.call": "AJ_7"}
    worker.people += [agent("bot"), agent("agent-AJ_7", **shown), agent("agent-AJ_6", "b")]
    if how != "named":
        worker.people.append(agent("agent-AJ_9"))
    if how in ("named", "successor"):
        worker.agents = ["bot~1"] if how == "successor" else ["agent-AJ_9"]
    await asyncio.sleep(0.1)
    assert handing.done() is (how in ("named", "seen"))
    if how == "late":
        worker.others.pop()
    if how == "successor":
        for each in (step("seen", job="AJ_2"), step("silent"), step("speaks")):
            worker.handovers.hear("AJ_1", each)
    outcome = await handing
    off = [each for each in worker.told if isinstance(each, HandoverOff)]
    if how == "successor":
        assert (outcome.result, off, worker.removed, worker.deleted) == ("done", [], [], []), outcome
        return
    assert outcome.result == "refused" and "without lastcall" in outcome.reason
    if how == "named":  # before it has joined
        assert worker.removed == []
        worker.people.append(agent("agent-AJ_9"))
        await asyncio.gather(*worker.begun)
    assert (worker.removed, worker.deleted) == (["agent-AJ_9"], ["AD_1"])
    assert [each.agent_name for each in off] == ["a"]
    assert "without lastcall" in worker.handovers.lacks(worker.job)
    worker.job.agent_name = "b"
    assert not worker.handovers.lacks(worker.job), "another agent name is handed over"


async def test_calls_whose_time_is_over() -> None:
    """Each is told of once: not tried, or still under way when its job is about to be killed."""
    worker = Worker(patience=10)
    worker.launch("AJ_2")
    worker.launch("AJ_3")  # keeps nothing
    worker.handovers.hear("AJ_2", KEEPS)
    worker.answers = {BeginHandover: [step("prepared")]}
    handing = asyncio.ensure_future(worker.handovers.hand_over(worker.job, "test"))
    await worker.changed.until(lambda: worker.created)

    def late() -> list[tuple[str, str]]:
        return [(each.id, each.reason) for each in worker.told if isinstance(each, JobHandover)]

    for _ in range(2):
        for job in worker.jobs:
            worker.handovers.note_late(job, is_last=False)
        assert late() == [("AJ_2", module.NO_TIME)]
    for _ in range(2):
        for job in worker.jobs:
            worker.handovers.note_late(job, is_last=True)
        assert late() == [("AJ_2", module.NO_TIME), ("AJ_1", module.NO_TIME)]
    handing.cancel()
    await asyncio.gather(handing, return_exceptions=True)


async def test_a_successor_that_leaves_before_it_was_seen() -> None:
    """As one does whose worker is being stopped. The call is tried again, and nobody else is waited for."""
    worker = Worker(patience=60)
    worker.answers = {
        BeginHandover: [step("prepared")],
        str: [step("lost", detail="it left")],
        CancelHandover: [step("cancelled")],
    }
    async with asyncio.timeout(30):
        outcome = await worker.handovers.hand_over(worker.job, "test")
    assert (outcome.result, outcome.reason) == ("failed", "it left")
    assert worker.deleted == ["AD_1"] and not worker.handovers.lacks(worker.job)


@pytest.mark.parametrize("is_told_first", [False, True])
async def test_a_successor_that_is_ended_after_it_has_left(is_told_first: bool) -> None:
    """Its call stays where it is, so that nothing is cut. One that was told to end before is cut."""
    worker = Worker()
    if is_told_first:
        worker.jobs.cut_short(worker.job)
    worker.handovers.hear("AJ_1", step("withdrawn"))
    worker.jobs.cut_short(worker.job)
    worker.handovers.hear("AJ_1", step("withdrawn"))
    worker.jobs.abandon()
    ended = [(each.id, each.fate) for each in worker.told if isinstance(each, JobEnded)]
    assert ended == [("AJ_1", "cut" if is_told_first else "finished")]
    assert [each.id for each in worker.told if isinstance(each, JobCut)] == ["AJ_1"] * is_told_first


async def test_an_old_agent_that_leaves_because_its_successor_speaks() -> None:
    """It may have hung, and have been removed. Its end is not the end of the call."""
    worker = Worker()
    worker.answers = {BeginHandover: [step("prepared")], str: [step("seen", job="AJ_2")]}
    handing = asyncio.ensure_future(worker.handovers.hand_over(worker.job, "test"))
    await worker.changed.until(lambda: worker.created)
    worker.people = [successor("1")]
    worker.jobs.in_room("AJ_1", "left", 1, "")
    worker.changed.notify()
    outcome = await handing
    assert (outcome.result, outcome.successor) == ("done", "AJ_2")
    assert (worker.removed, worker.deleted) == ([], [])


@pytest.mark.parametrize("what", ["has the call", "is out of the room", "has lost the call"])
async def test_a_successor_that_has_its_predecessor_removed(what: str) -> None:
    """One that has hung may have been removed itself, and not know: the predecessor stays then."""
    worker = Worker()
    found = Succession(call="AJ_0", epoch=1, count=1, predecessor="bot", identity="bot~1", secret="s" * 16)
    worker.job.succession = found
    shown = {"lastcall.call": "AJ_0", "lastcall.withdrawn": "1"} if what == "has lost the call" else {}
    old = Participant(
        identity="bot", keeps_open=False, is_agent=True, agent_name="a", sid="PA_1", attributes=shown
    )
    new = Participant(
        identity="bot~1", keeps_open=False, is_agent=True, agent_name="a", sid="PA_2", attributes=found.shown
    )
    worker.people = [old] if what == "is out of the room" else [old, new]
    await worker.handovers._remove_predecessor("AJ_1", 7, "PA_1")
    assert worker.removed == (["bot"] if what == "has the call" else [])
    assert worker.said == [Removed(id=7, is_gone=what == "has the call")]


@pytest.mark.parametrize("how", ["named", "evicted"])
async def test_a_stranger_with_the_identity_of_the_agent(how: str) -> None:
    """It throws the old agent out of the room. It is not removed, because nobody else has the call."""
    worker = Worker(patience=10)
    worker.answers = {BeginHandover: [step("prepared")]}
    worker.people = [agent("bot")]
    if how == "named":
        worker.agents = ["bot"]
    handing = asyncio.ensure_future(worker.handovers.hand_over(worker.job, "test"))
    await worker.changed.until(lambda: worker.created)
    if how == "evicted":
        worker.jobs.in_room("AJ_1", "left", EVICTED, "")
        worker.changed.notify()
    outcome = await handing
    assert outcome.result == "refused" and "without lastcall" in outcome.reason
    assert (worker.removed, worker.deleted) == ([], [])
    assert "without lastcall" in worker.handovers.off["a"]


async def test_a_dispatch_that_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a stop a worker deletes that of a successor without a process; the call is tried again at once."""
    worker = Worker(patience=10)
    dispatch = Dispatch(id="AD_1", agent_name="a")
    looks: Iterator[list[Dispatch]] = iter([[], [dispatch], [], [dispatch], []])
    monkeypatch.setattr(worker, "dispatches", lambda *_: asyncio.sleep(0, next(looks)))
    for epoch in (1, 2):
        worker.answers = {
            BeginHandover: [step("prepared", epoch)],
            # It may leave again before it is shown to its predecessor, which has answered it.
            str: [step("seen", epoch, job="AJ_9")] * (epoch == 2),
            CancelHandover: [step("cancelled", epoch)],
        }
        async with asyncio.timeout(5):
            outcome = await worker.handovers.hand_over(worker.job, "test")
        assert (outcome.result, outcome.reason) == ("failed", module.GIVEN_BACK)

    begun: list[asyncio.Future[None]] = []
    monkeypatch.setattr(worker.handovers, "_begin", lambda work: begun.append(asyncio.ensure_future(work)))
    worker.deleted.clear()
    found = Succession(call="AJ_0", epoch=1, count=1, predecessor="p", identity="i", secret="s")
    for id, has_process in (("AJ_7", False), ("AJ_8", True)):
        asked = SimpleNamespace(id=id, room=SimpleNamespace(name="r"), dispatch_id=f"AD_{id}", type=0)
        worker.jobs.accept(asked, found)
        if has_process:
            worker.jobs.launch(id, SimpleNamespace(pid=None), asked)
    worker.handovers.hear("AJ_8", step("withdrawn"))
    worker.handovers.give_back()
    await asyncio.gather(*begun)
    assert worker.deleted == ["AD_AJ_7"]
    worker.handovers.hear("AJ_8", step("withdrawn"))
    await asyncio.gather(*begun)
    assert worker.deleted == ["AD_AJ_7", "AD_AJ_8"], "it leaves because of the stop"

    tries: list[float] = []

    async def hand_over(job: Job, _reason: str, _wait: float) -> module.Outcome:
        tries.append(now())
        if len(tries) == 1:
            return module.failed(module.GIVEN_BACK)
        job.successor = "AJ_x"
        return module.Outcome(result="done", successor="AJ_x")

    monkeypatch.setattr(module, "TRY_AGAIN_AFTER", 60)
    monkeypatch.setattr(worker.handovers, "hand_over", hand_over)
    async with asyncio.timeout(5):
        await worker.handovers.hand_over_all("test", lambda: None)
    assert len(tries) == 2


@pytest.mark.parametrize("how", ["slow", "failed", "nobody"])
async def test_one_call_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A try that takes long has one place of ten, and one that fails is tried again behind the others.

    Fewer calls are tried at a time only where nobody takes them.
    """
    worker = Worker()
    for n in range(2, 41):
        worker.launch(f"AJ_{n}")
        worker.handovers.hear(f"AJ_{n}", KEEPS)
    tried: list[str] = []
    at_a_time: list[int] = []
    running, can_end = 0, asyncio.Event()

    async def hand_over(job: Job, _reason: str, _wait: float) -> module.Outcome:
        nonlocal running
        tried.append(job.id)
        running += 1
        at_a_time.append(running)
        try:
            if job.id == "AJ_1" and how == "slow":
                await can_end.wait()
            await asyncio.sleep(0.001)
        finally:
            running -= 1
        if how == "nobody" or (job.id == "AJ_1" and len(set(tried)) < 40):
            return module.failed(module.NOBODY if how == "nobody" else "the successor did not speak")
        job.successor = "AJ_x"
        return module.Outcome(result="done", successor="AJ_x")

    monkeypatch.setattr(worker.handovers, "hand_over", hand_over)

    def until() -> float:
        return now() if how == "nobody" and len(tried) > 60 else now() + 60

    handing = asyncio.ensure_future(worker.handovers.hand_over_all("test", until))
    async with asyncio.timeout(20):
        await worker.changed.until(lambda: handing.done() or len(set(tried)) == 40)
        if how == "slow":
            assert tried.count("AJ_1") == 1 and not handing.done()
        can_end.set()
        await handing
    assert max(at_a_time) == module.PARALLEL and set(tried[:40]) == {job.id for job in worker.jobs}
    assert all(job.successor for job in worker.jobs) is (how != "nobody")
    if how == "nobody":
        assert set(at_a_time[30:]) == {1}


@pytest.mark.parametrize("took", [0.0, 61.0])
async def test_when_a_call_is_tried_again(monkeypatch: pytest.MonkeyPatch, took: float) -> None:
    """At once after a try that has waited for a successor, and after a pause where a try fails at once."""
    worker = Worker()
    passed = 0.0
    tries: list[float] = []
    monkeypatch.setattr(module, "TRY_AGAIN_AFTER", 60.0)
    monkeypatch.setattr(module, "now", lambda: now() + passed)

    async def hand_over(job: Job, _reason: str, _wait: float) -> module.Outcome:
        nonlocal passed
        tries.append(passed)
        if len(tries) == 1:
            await asyncio.sleep(0)
            passed += took
            return module.failed(module.NOBODY)
        job.successor = "AJ_x"
        return module.Outcome(result="done", successor="AJ_x")

    monkeypatch.setattr(worker.handovers, "hand_over", hand_over)
    until = now() + (300 if took else 0.5)
    async with asyncio.timeout(15):
        await worker.handovers.hand_over_all("test", lambda: until)
    assert tries == ([0.0, took] if took else [0.0])


@pytest.mark.parametrize(
    ("seconds", "expected"), [(None, 5.0), (100.0, 5.0), (12.0, 12 / 4 - 1.5), (1.0, 0.5)]
)
async def test_how_long_a_good_moment_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, seconds: float | None, expected: float
) -> None:
    """In a short time each of 40 calls has a part of it, and half a second at least."""
    worker = Worker(wait=5.0)
    for n in range(2, 41):
        worker.launch(f"AJ_{n}")
        worker.handovers.hear(f"AJ_{n}", KEEPS)
    waits: list[float] = []

    async def hand_over(job: Job, _reason: str, wait: float) -> module.Outcome:
        waits.append(wait)
        job.successor = "AJ_x"
        return module.Outcome(result="done", successor="AJ_x")

    monkeypatch.setattr(worker.handovers, "hand_over", hand_over)
    until = None if seconds is None else now() + seconds
    await worker.handovers.hand_over_all("test", lambda: until)
    assert len(waits) == 40 and waits[0] == pytest.approx(expected, abs=0.2)


async def test_calls_are_tried_again_until_their_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few at a time, fewer where nobody takes them, and none twice that can't be handed over."""
    worker = Worker()
    tried: list[str] = []
    until = now() + 0.2

    async def fail(job: Job, _reason: str, _wait: float) -> module.Outcome:
        tried.append(job.id)
        return module.failed("nobody took it")

    monkeypatch.setattr(worker.handovers, "hand_over", fail)
    async with asyncio.timeout(10):
        await worker.handovers.before(lambda: until, lambda: until + 60)
    assert len(tried) > 2

    async def refuse(job: Job, _reason: str, _wait: float) -> module.Outcome:
        tried.append(job.id)
        return module.refused("busy")

    monkeypatch.setattr(worker.handovers, "hand_over", refuse)
    tried.clear()
    await worker.handovers.hand_over_all("test", lambda: None)
    assert tried == ["AJ_1"]
    worker.is_closing = True
    await worker.handovers.before(lambda: now() + 60, lambda: now() + 60)
    assert tried == ["AJ_1"]


@pytest.mark.parametrize("are_taken", [True, False])
async def test_calls_that_wait_at_the_end_of_the_drain(
    monkeypatch: pytest.MonkeyPatch, are_taken: bool
) -> None:
    """They are not asked to end, and go on elsewhere in the close, as long as others are taken.

    A call that can't be handed over does not wait for another try.
    """
    monkeypatch.setattr(module, "PARALLEL", 1)
    monkeypatch.setattr(module, "TAKEN_WITHIN", 60)
    worker = Worker()
    for n in range(2, 5):
        worker.launch(f"AJ_{n}")
        worker.handovers.hear(f"AJ_{n}", KEEPS)
    drain_at = now() + 0.2
    tried: list[str] = []
    waits: list[bool] = []

    async def hand_over(job: Job, reason: str, _wait: float) -> module.Outcome:
        tried.append(job.id)
        if job.id == "AJ_3":
            while now() < drain_at:
                await asyncio.sleep(0.01)
            waits.extend(worker.handovers.due_at(id) > now() for id in ("AJ_1", "AJ_4"))
        outcome = module.failed(module.NOBODY)
        if job.id == "AJ_1":
            outcome = module.refused("busy")
        elif are_taken:
            job.successor = "AJ_x"
            outcome = module.Outcome(result="done", successor="AJ_x")
        worker.handovers._note(job, outcome, reason)
        return outcome

    monkeypatch.setattr(worker.handovers, "hand_over", hand_over)
    async with asyncio.timeout(15):
        handing = asyncio.ensure_future(worker.handovers.before(lambda: drain_at, lambda: drain_at + 60))
        if are_taken:
            await worker.changed.until(lambda: len(tried) == 4)
            handing.cancel()
        await asyncio.gather(handing, return_exceptions=True)
    assert waits == [False, are_taken]
    assert tried == [f"AJ_{n}" for n in range(1, 5 if are_taken else 4)]
    assert worker.handovers.due_at("AJ_1") == 0.0, "nobody waits any more"


async def test_a_handover_that_was_asked_for_begins_with_the_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is replaced hands over once it takes no more, also where nothing else happens there."""
    engine = Engine(
        SimpleNamespace(_request_fnc=None, _queue_msg=None),
        changed=Condition(),
        must_refuse=lambda: False,
        report=lambda _message: None,
        calls_over=CallsOver(),
    )
    begun: list[str] = []

    async def hand_over_all(reason: str, _until: Any) -> None:
        begun.append(reason)

    monkeypatch.setattr(engine.handovers, "hand_over_all", hand_over_all)
    engine.ended = True  # so that the fence tells no server
    engine.hand_over("", "reload")
    await asyncio.sleep(0.05)
    await engine.fence()
    assert not begun
    engine.hand_over_before(lambda: None, lambda: None)
    async with asyncio.timeout(5):
        while not begun:
            await asyncio.sleep(0.01)
    assert begun == ["reload"]
