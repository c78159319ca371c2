"""Offers for rooms that are served already, and requests of a worker to the LiveKit server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lastcall.supervisor.receipt.ledger import JobEntry, Ledger
from lastcall.worker import second_jobs
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.wire import NUL
from lastcall.worker.jobs import Job, Jobs
from lastcall.worker.local.livekit_server import Delays, DispatchServer
from lastcall.worker.local.rooms import Kind
from lastcall.worker.room_service import RoomService, RoomServiceError
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


class Service:
    """Notes what it is asked for."""

    def __init__(self, *, agent: bool = False, error: Exception | None = None) -> None:
        self.created: list[tuple[str, ...]] = []
        self.agent = agent
        self.error = error

    async def has_agent(self, room: str, agent_name: str) -> bool:
        assert (room, agent_name) == ("r", "a")
        if self.error is not None:
            raise self.error
        return self.agent

    async def create_dispatch(self, *what: str) -> None:
        self.created.append(what)


def served(service: Service | None = None) -> tuple[SecondJobs, Job]:
    """Return the decision of a worker with one job, whose agent is in room `r`, session `old`."""
    jobs = Jobs(Condition(), lambda _message: None)
    jobs.accept(offer("old", id="AJ_1"))
    (job,) = jobs
    job.launched = True
    job.presence.take("joined", 0, "PA_1 agent", now())
    return SecondJobs(jobs, lambda: service), job  # type: ignore[arg-type, return-value]  # a stand-in


def test_which_offer_is_a_second() -> None:
    """Another session of the room, the same agent name, and an agent that is in the room."""
    second, job = served()
    assert second.is_second(offer("new"))
    for other in (
        offer("old"),
        offer("new", room=SimpleNamespace(name="s", sid="new")),
        offer("new", agent_name="b"),
        offer("new", type=1),
        offer("new", attributes={OURS: "AJ_1"}),
    ):
        assert not second.is_second(other)
    job.presence.take("left", 1, "", now())
    assert not second.is_second(offer("new"))


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
    second = SecondJobs(Jobs(Condition(), lambda _message: None), lambda: None)
    assert not second.is_second(offer("new"))
    second.beside([NUL.join(room) for room in ledger.served_beside(2, 1)])
    assert second.is_second(offer("new")) and not second.is_second(offer("old"))
    monkeypatch.setattr(second_jobs, "now", lambda: now() + OUTAGE_WITHIN)
    assert not second.is_second(offer("new"))


@pytest.mark.parametrize("is_back", [True, False])
async def test_an_agent_that_is_not_back_gets_its_dispatch_anew(
    monkeypatch: pytest.MonkeyPatch, is_back: bool
) -> None:
    """Ten seconds after the refusal, here at once; the next offer for the room is then taken."""
    monkeypatch.setattr(second_jobs, "BACK_WITHIN", 0.0)
    service = Service(agent=is_back)
    second, _ = served(service)
    second.beside([NUL.join(("r", "other", "a"))])
    await second.see_back(offer("new"))
    assert service.created == ([] if is_back else [("r", "a", "m")])
    assert second.is_second(offer("new")) is is_back


async def test_a_server_that_can_not_be_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a line of the log."""
    monkeypatch.setattr(second_jobs, "BACK_WITHIN", 0.0)
    second, _ = served(Service(error=RoomServiceError("ListParticipants: 401 unauthenticated")))
    await second.see_back(offer("new"))
    assert "401" in caplog.records[-1].__dict__["error"]
    second, _ = served(None)
    await second.see_back(offer("new"))


async def test_requests_about_rooms() -> None:
    """A participant is removed only in the session that is meant; a refusal and a dead server are errors."""
    async with DispatchServer(delays=Delays(affinity=0.0)) as server:
        service = RoomService(
            server.url, server.api_key, server.api_secret, {"HTTPS_PROXY": "http://nobody:1"}
        )
        caller = server.rooms.visit("r", "caller")
        assert not await service.has_agent("r", "")
        server.rooms.visit("r", "agent", kind=Kind.AGENT)
        assert await service.has_agent("r", "") and not await service.has_agent("r", "a")
        assert not await service.remove("r", "caller", "PA_other")
        assert await service.remove("r", "caller", caller.sid) and not caller.is_connected
        assert not await service.remove("r", "caller", caller.sid)
        await service.create_dispatch("r", "a", "m")
        room = server.rooms.state.get("r")
        assert room is not None and [each.metadata for each in room.dispatches.values()] == ["", "m"]
        with pytest.raises(RoomServiceError, match="401 unauthenticated"):
            await RoomService(server.url, server.api_key, "x" * 32, {}).create_dispatch("r", "", "")
        for url in (f"{server.url}/", server.url.replace("ws", "http")):
            assert await RoomService(url, server.api_key, server.api_secret, {}).has_agent("r", "")
    with pytest.raises(RoomServiceError, match="ClientConnectorError"):
        await service.remove("r", "caller", "PA_1")
