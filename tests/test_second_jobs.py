"""Offers for rooms that are served already, and requests of a worker to the LiveKit server."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from livekit.protocol import agent as protocol

from lastcall.supervisor.receipt.ledger import JobEntry, Ledger
from lastcall.worker import second_jobs
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.wire import NUL
from lastcall.worker.jobs import Job, Jobs
from lastcall.worker.local.livekit_server import Delays, DispatchServer
from lastcall.worker.local.rooms import Kind
from lastcall.worker.room_service import Dispatch, Participant, Requests, RoomService, RoomServiceError
from lastcall.worker.second_jobs import OURS, OUTAGE_WITHIN, SecondJobs

pytestmark = pytest.mark.core


def offer(sid: str, **changes: Any) -> Any:
    values = {
        "id": "AJ_2",
        "type": 0,
        "room": SimpleNamespace(name="r", sid=sid),
        "agent_name": "a",
        "dispatch_id": "",
        "metadata": "m",
        "attributes": {},
    }
    return SimpleNamespace(**(values | changes))


def agent(identity: str = "agent", name: str = "a") -> Participant:
    return Participant(identity=identity, keeps_open=False, is_agent=True, agent_name=name)


CALLER = Participant(identity="caller", keeps_open=True, is_agent=False, agent_name="")


class Service:
    """Notes what it is asked for. `errors` are raised by the next requests, None by none."""

    def __init__(self, *people: Participant, errors: Iterable[Exception | None] = ()) -> None:
        self.people = list(people)
        self.created: list[tuple[Any, ...]] = []
        self.errors = list(errors)

    def _fail(self) -> None:
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error

    async def participants(self, room: str) -> list[Participant]:
        assert room == "r"
        self._fail()
        return self.people

    async def create_dispatch(self, *what: Any) -> None:
        self._fail()
        self.created.append(what)


class Decision:
    """The decision of a worker with one job, whose agent is in room `r`, session `old`."""

    def __init__(self, service: Service | None = None) -> None:
        self.service = service
        self.changed = Condition()
        self.jobs = Jobs(self.changed, lambda _message: None)
        self.jobs.accept(offer("old", id="AJ_1"))
        (self.job,) = self.jobs
        self.job.launched = True
        self.tell("joined", "PA_1 agent")
        self.asked: list[Job] = []
        self.is_closing = False
        self.second = SecondJobs(
            self.jobs,
            self.changed,
            lambda: service,  # type: ignore[arg-type, return-value]  # a stand-in
            ask=self.ask,
            is_closing=lambda: self.is_closing,
        )

    def tell(self, what: str, detail: str = "") -> None:
        self.jobs.in_room("AJ_1", what, 0, detail)

    def ask(self, job: Job) -> None:
        self.asked.append(job)

    def close(self) -> None:
        self.is_closing = True
        self.changed.notify()

    async def see_back(self, **changes: Any) -> None:
        """See back, and close the worker when the room is dispatched anew."""
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            task = group.create_task(self.second.see_back(offer("new", **changes)))
            while not (task.done() or (self.service and self.service.created)):
                await asyncio.sleep(0.001)
            self.close()


ANEW = ("r", "a", "m", "", {OURS: "AJ_2"})


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[int]:
    """Answer every HTTP request with the same bytes; yields the port."""

    async def answer_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer_one, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def test_which_offer_is_a_second() -> None:
    """Another session of the room, the same agent name, and an agent that is in the room."""
    here = Decision(Service())
    second, job = here.second, here.job
    assert second.is_second(offer("new"))
    without = offer("new")
    del without.attributes  # an older livekit-protocol
    assert not second.is_second(without)
    for other in (
        offer("old"),
        offer("new", room=SimpleNamespace(name="s", sid="new")),
        offer("new", agent_name="b"),
        offer("new", type=1),
        offer("new", attributes={OURS: "AJ_1"}),
    ):
        assert not second.is_second(other)
    job.over_at = 1.0
    assert not second.is_second(offer("new"))
    job.over_at = None
    here.tell("left")
    assert not second.is_second(offer("new"))


def test_who_can_not_see_back_refuses_nothing() -> None:
    """A worker without a key, and one that closes: the room would have no other chance."""
    assert not Decision(None).second.is_second(offer("new"))
    here = Decision(Service())
    here.close()
    assert not here.second.is_second(offer("new"))


def test_rooms_of_other_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor names them at a registration after the first; they count for a time."""
    ledger = Ledger()
    for slot, room in enumerate(("r", "left", "s")):
        ledger.start(
            JobEntry(
                id=room,
                room=room,
                dispatch_id="",
                slot=slot,
                generation=1,
                accepted_at=0.0,
                pid=1,
                room_sid="old",
                agent_name="a",
            )
        )
    ledger.left(1, 1, "left")
    assert ledger.served_beside(2, 1) == [("r", "old", "a")]
    here = Decision(Service())
    second = here.second
    here.tell("left")
    assert not second.is_second(offer("new"))
    second.beside([NUL.join(room) for room in ledger.served_beside(2, 1)])
    assert second.is_second(offer("new")) and not second.is_second(offer("old"))
    monkeypatch.setattr(second_jobs, "now", lambda: now() + OUTAGE_WITHIN)
    assert not second.is_second(offer("new"))


@pytest.mark.parametrize(
    ("people", "beside", "is_dispatched"),
    [
        ([CALLER, agent()], False, False),
        ([CALLER], False, True),
        ([CALLER, agent("other")], False, True),
        ([CALLER, agent("other")], True, False),
        ([CALLER, agent("other", "b")], True, True),
        ([], False, False),
        ([agent("other")], False, False),
    ],
    ids=["back", "not back", "another agent", "beside", "not beside", "nobody", "no caller"],
)
async def test_an_agent_that_is_not_back_gets_its_dispatch_anew(
    monkeypatch: pytest.MonkeyPatch, people: list[Participant], beside: bool, is_dispatched: bool
) -> None:
    """Ten seconds after the refusal, here at once; the next offer for the room is then taken.

    The agent of an own job is known by its identity, that of another worker by its name. An agent that is
    back is in the new session, and a dispatch to that is meant.
    """
    monkeypatch.setattr(second_jobs, "BACK_WITHIN", 0.0)
    service = Service(*people)
    here = Decision(service)
    if beside:
        here.second.beside([NUL.join(("r", "other", "a"))])
    await here.see_back()
    here.is_closing = False
    assert service.created == ([ANEW] if is_dispatched else [])
    is_back = any(each.is_agent for each in people) and not is_dispatched and CALLER in people
    assert here.second.is_second(offer("new")) is (not is_dispatched and not is_back)
    assert here.second.is_second(offer("newer")) is not is_dispatched


async def test_a_dispatch_is_made_again_as_it_was() -> None:
    """With deployment and attributes, and one that says to every worker that it is no second job."""
    service = Service(CALLER)
    here = Decision(service)
    here.close()
    await here.see_back(deployment="blue", attributes={"k": "v"})
    assert service.created == [("r", "a", "m", "blue", {"k": "v", OURS: "AJ_2"})]


@pytest.mark.parametrize("end", ["left", "ended", "close"])
async def test_what_is_not_waited_for(end: str) -> None:
    """An agent that has left, a job that has ended, and the rest of the time in a worker that closes."""
    service = Service(CALLER)
    here = Decision(service)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(here.second.see_back(offer("new")))
        await asyncio.sleep(0.05)
        await here.second.see_back(offer("newer"))  # one look for both
        assert service.created == []
        if end == "left":
            here.tell("left")
        elif end == "ended":
            here.jobs.abandon()
        else:
            here.close()
    assert service.created == [ANEW]


async def test_a_look_that_fails_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For a minute, each a line of the log. A dispatch without an answer may have brought an agent."""
    monkeypatch.setattr(second_jobs, "BACK_WITHIN", 0.0)
    monkeypatch.setattr(second_jobs, "PAUSE", 0.001)
    refused = RoomServiceError("ListParticipants: 401 unauthenticated")
    service = Service(CALLER, errors=[refused, refused, None, refused])
    await Decision(service).see_back()
    assert service.created == [ANEW]
    assert [record.__dict__.get("error", "")[-15:] for record in caplog.records].count("unauthenticated") == 3
    service = Service(CALLER, agent("new"), errors=[None, refused])
    await Decision(service).see_back()
    assert service.created == []
    monkeypatch.setattr(second_jobs, "TRIES_FOR", 0.0)
    service = Service(CALLER, errors=[refused, None])
    await Decision(service).see_back()
    assert service.created == []


@pytest.mark.parametrize("is_replaced", [True, False])
async def test_an_agent_that_is_back_too_late(monkeypatch: pytest.MonkeyPatch, is_replaced: bool) -> None:
    """It is asked to end, so that two do not talk on; but not before another one is there."""
    monkeypatch.setattr(second_jobs, "BACK_WITHIN", 0.0)
    monkeypatch.setattr(second_jobs, "PAUSE", 0.001)
    monkeypatch.setattr(second_jobs, "REPLACED_WITHIN", 5.0 if is_replaced else 0.05)
    service = Service(CALLER)
    here = Decision(service)
    here.tell("reconnecting")
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(here.second.see_back(offer("new")))
        await asyncio.sleep(0.05)
        assert service.created == [ANEW] and here.asked == []
        service.people = [CALLER, agent()]
        here.tell("reconnected", "PA_2 agent")
        await asyncio.sleep(0.02)
        assert here.asked == []
        if is_replaced:
            service.people.append(agent("new"))
    assert here.asked == ([here.job] if is_replaced else [])


async def test_requests_about_rooms() -> None:
    """A participant is removed only in the session that is meant; a refusal and a dead server are errors."""
    async with DispatchServer(delays=Delays(affinity=0.0)) as server:
        service = RoomService(
            server.url, server.api_key, server.api_secret, {"HTTPS_PROXY": "http://nobody:1"}
        )
        assert await service.participants("r") == [] and server.rooms.state.get("r") is None
        caller = server.rooms.visit("r", "caller")
        agents = [server.rooms.visit("r", name, kind=Kind.AGENT) for name in ("agent", "avatar")]
        server.rooms.visit("r", "recorder", kind=Kind.EGRESS)
        for visitor, attributes in zip(
            agents, ({"lk.agent_name": "a"}, {"lk.publish_on_behalf": "agent"}), strict=True
        ):
            visitor.say(do="update", attributes=attributes)
        recorder = Participant(identity="recorder", keeps_open=False, is_agent=False, agent_name="")
        assert await service.participants("r") == [CALLER, agent(), recorder]
        assert not await service.remove("r", "caller", "PA_other")
        assert await service.remove("r", "caller", caller.sid) and not caller.is_connected
        assert not await service.remove("r", "caller", caller.sid)
        await service.create_dispatch("r", "a", "m", "blue", {"k": "v"})
        room = server.rooms.state.get("r")
        assert room is not None
        _, made = room.dispatches.values()
        assert (made.metadata, dict(made.attributes)) == ("m", {"k": "v"})
        first, dispatch = room.dispatches
        made_before = Dispatch(id=first, agent_name="")
        assert await service.dispatches("r") == [made_before, Dispatch(id=dispatch, agent_name="a")]
        taken = protocol.Job(id="AJ_1", dispatch_id=dispatch)
        taken.state.participant_identity = "bot"
        server.rooms.state.link("r", room.info.sid, taken)
        taken_by = Dispatch(id=dispatch, agent_name="a", agents=("bot",))
        assert await service.dispatches("r") == [made_before, taken_by]
        with pytest.raises(RoomServiceError, match="401 unauthenticated"):
            await RoomService(server.url, server.api_key, "x" * 32, {}).create_dispatch("r", "", "", "", {})
        for url in (f"{server.url}/", server.url.replace("ws", "http")):
            assert await RoomService(url, server.api_key, server.api_secret, {}).participants("r")
    with pytest.raises(RoomServiceError, match="ClientConnectorError"):
        await service.remove("r", "caller", "PA_1")


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, b"", "200 without a JSON object"),
        (200, b"null", "200 without a JSON object"),
        (200, b"[]", "200 without a JSON object"),
        (200, b"<html>", "200 without a JSON object"),
        (502, b"[]", "502"),
    ],
)
async def test_an_odd_answer_is_an_error(status: int, body: bytes, expected: str) -> None:
    """As of a proxy or a load balancer in front of a server that has just come back."""
    head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    async with answering(head % (status, len(body)) + body) as port:
        service = RoomService(f"ws://127.0.0.1:{port}", "key", "x" * 32, {})
        with pytest.raises(RoomServiceError, match=expected):
            await service.participants("r")
        with pytest.raises(RoomServiceError, match=expected):
            await service.remove("r", "caller", "PA_1")
    head = b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n"
    async with answering(head + b'{"participants":null}') as port:
        service = RoomService(f"ws://127.0.0.1:{port}", "key", "x" * 32, {})
        assert await service.participants("r") == []


async def test_the_password_of_a_proxy_is_in_no_error() -> None:
    """Errors of aiohttp show the request to the proxy, and its URL."""
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    async with answering(refusal) as port:
        proxy = f"http://user:secret@127.0.0.1:{port}"
        service = RoomService("wss://sfu.invalid", "key", "x" * 32, {"HTTPS_PROXY": proxy})
        with pytest.raises(RoomServiceError) as refused:
            await service.participants("r")
    with pytest.raises(RoomServiceError) as unreachable:
        await service.participants("r")
    assert str(refused.value) == "RoomService/ListParticipants: ClientHttpProxyError 407"
    for raised in (refused, unreachable):
        text = "".join(traceback.format_exception(raised.value))
        assert "secret" not in text and "dXNlcjpzZWNyZXQ" not in text


async def test_a_request_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It is one record of the log."""
    requests = Requests()

    async def fail() -> None:
        raise AttributeError("'NoneType' object has no attribute 'get'")

    async def wait() -> None:
        await asyncio.sleep(60)

    requests.begin(fail())
    requests.begin(wait())
    await asyncio.sleep(0)
    requests.is_closing = True
    requests.begin(wait())
    async with asyncio.timeout(10):
        await requests.end(0.01)
    (record,) = caplog.records
    assert record.exc_info and record.getMessage() == "a request to the LiveKit server has failed"
