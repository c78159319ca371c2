"""The rooms of the local LiveKit server, with the rules of a real one, and the room that a local job has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from livekit import api, rtc
from livekit.protocol import agent, models

from lastcall.worker.local import livekit_server, room_server
from lastcall.worker.local.livekit_server import Delays, DispatchServer
from lastcall.worker.local.participants import MAX_RPC
from lastcall.worker.local.room import FULL_RECONNECT, Room
from lastcall.worker.local.rooms import DEPARTURE_TIMEOUT, Effect, Kind, Reason, Rooms, Tell
from lastcall.worker.local.ticks import AudioSource, AudioStream, LocalAudioTrack
from lastcall.worker.local.twirp import MAX_METADATA
from tests.support.fake_worker import FakeWorker, workers

pytestmark = pytest.mark.core
QUICK = Delays(affinity=0.0, check_enabled=0.0, removal=0.1, ghost=0.2, unpublished=0.0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def seen_by(room: Room) -> list[tuple[str, Any]]:
    """Return the list into which the events of a room go, with the first argument of each."""
    events: list[tuple[str, Any]] = []
    for name in (
        "participant_connected",
        "participant_disconnected",
        "participant_attributes_changed",
        "reconnecting",
        "reconnected",
        "disconnected",
        "data_received",
    ):
        room.on(
            name, lambda *arguments, name=name: events.append((name, arguments[0] if arguments else None))
        )
    return events


@asynccontextmanager
async def joined(server: DispatchServer, token: str) -> AsyncIterator[Room]:
    room = Room()
    await room.connect(server.url, token)
    try:
        yield room
    finally:
        await room.disconnect()


def pass_for(server: DispatchServer, identity: str, room: str = "r", kind: Any = "standard") -> str:
    grants = api.VideoGrants(room_join=True, room=room)
    token = api.AccessToken(server.api_key, server.api_secret).with_identity(identity).with_kind(kind)
    text: str = token.with_grants(grants).with_attributes({"from": identity}).to_jwt()
    return text


@asynccontextmanager
async def livekit_api(server: DispatchServer) -> AsyncIterator[api.LiveKitAPI]:
    url = server.url.replace("ws", "http")
    async with api.LiveKitAPI(url, server.api_key, server.api_secret) as client:
        yield client


async def one_job(server: DispatchServer, worker: FakeWorker, room: str = "r") -> tuple[str, str]:
    """Dispatch, and return the id of the job and its token."""
    number = len(worker.tokens)
    job = await server.dispatch(room)
    await until(lambda: len(worker.tokens) > number)
    return job.job_id, worker.tokens[-1]


async def test_an_agent_that_leaves_is_terminated() -> None:
    """The ordinary end of a job is JS_FAILED at the server, and the word of the worker comes too late."""
    async with DispatchServer(delays=QUICK) as server, workers(server, 1) as (worker,):
        job, token = await one_job(server, worker)
        caller = server.rooms.visit("r", "caller")
        async with joined(server, token) as room:
            me = room.local_participant
            assert (me.identity, me.kind, me.attributes) == ("me", Kind.AGENT, {"lk.agent_name": ""})
            assert set(room.remote_participants) == {"caller"}
            assert await room.sid == server.rooms.state.get("r").info.sid  # type: ignore[union-attr]
            assert worker.terminated == []
        await until(lambda: worker.terminated == [job])
        record = server.jobs[job]
        assert (record.status, record.error) == ("JS_FAILED", "agent worker left the room")
        await worker.send(update_job=agent.UpdateJobStatus(job_id=job, status=agent.JobStatus.JS_SUCCESS))
        await until(lambda: server.counts["job"])
        assert record.status == "JS_FAILED" and not server.events[-1].detail["known"]
        assert [each["on"] for each in caller.heard][-2:] == [
            "participant_connected",
            "participant_disconnected",
        ]


async def test_a_full_reconnect_terminates_the_job_of_an_agent_that_is_back() -> None:
    """The new session is another participant to the server, which knows of no job of it any more."""
    async with DispatchServer(delays=QUICK) as server, workers(server, 1) as (worker,):
        job, token = await one_job(server, worker)
        caller = server.rooms.visit("r", "caller")
        async with joined(server, token) as room:
            events, sid = seen_by(room), room.local_participant.sid
            await room.simulate_scenario(FULL_RECONNECT)
            await until(lambda: worker.terminated == [job])
            assert room.isconnected() and room.local_participant.sid != sid
            names = [name for name, _ in events]
            assert names == [
                "reconnecting",
                "participant_disconnected",
                "participant_connected",
                "reconnected",
            ]
            assert events[1][1].disconnect_reason is None
        await until(lambda: [each["on"] for each in caller.heard].count("participant_disconnected") == 2)
        assert worker.terminated == [job]
        # Asked for by the server, as with a broken connection.
        async with joined(server, token) as room:
            events = seen_by(room)
            server.rooms.reconnect("r", "me")
            await until(lambda: "reconnected" in [name for name, _ in events])
            assert room.isconnected()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("remove", Reason.PARTICIPANT_REMOVED),
        ("delete", Reason.ROOM_DELETED),
        ("dispatch", Reason.PARTICIPANT_REMOVED),
    ],
)
async def test_the_owner_of_a_room_ends_a_job(how: str, reason: int) -> None:
    """RemoveParticipant, DeleteRoom, and DeleteDispatch, which first asks the worker alone."""
    delays = Delays(affinity=0.0, check_enabled=0.0, removal=0.5, unpublished=0.0)
    async with (
        DispatchServer(delays=delays) as server,
        livekit_api(server) as client,
        workers(server, 1) as (worker,),
    ):
        job, token = await one_job(server, worker)
        async with joined(server, token) as room:
            events = seen_by(room)
            if how == "remove":
                found = await client.room.list_participants(api.ListParticipantsRequest(room="r"))
                assert [each.identity for each in found.participants] == ["me"]
                await client.room.remove_participant(api.RoomParticipantIdentity(room="r", identity="me"))
            elif how == "delete":
                await client.room.delete_room(api.DeleteRoomRequest(room="r"))
                with pytest.raises(api.TwirpError, match="does not exist"):
                    await client.room.delete_room(api.DeleteRoomRequest(room="r"))
            else:
                (dispatch,) = await client.agent_dispatch.list_dispatch("r")
                assert [each.id for each in dispatch.state.jobs] == [job]
                await client.agent_dispatch.delete_dispatch(dispatch.id, "r")
                await until(lambda: worker.terminated == [job])
                assert room.isconnected() and server.jobs[job].status == "JS_SUCCESS"
            await until(lambda: ("disconnected", reason) in events)
            await until(lambda: worker.terminated == [job])


async def test_who_may_ask_for_what() -> None:
    """A dispatch needs the right to administer that one room. Every other token gets a 401."""
    async with DispatchServer(delays=QUICK) as server, aiohttp.ClientSession() as session:
        url = server.url.replace("ws", "http") + "/twirp/livekit."

        async def post(method: str, body: dict[str, Any], **grants: Any) -> tuple[int, dict[str, Any]]:
            token = api.AccessToken(server.api_key, server.api_secret).with_grants(api.VideoGrants(**grants))
            headers = {"Authorization": f"Bearer {token.to_jwt()}"}
            async with session.post(url + method, json=body, headers=headers) as answer:
                return answer.status, await answer.json()

        create = "AgentDispatchService/CreateDispatch"
        for grants in (
            {"room_create": True},
            {"agent": True},
            {"room_admin": True},
            {"room_admin": True, "room": "s"},
        ):
            status, body = await post(create, {"room": "r"}, **grants)
            assert (status, body["code"]) == (401, "unauthenticated"), grants
        admin: dict[str, Any] = {"room_admin": True, "room": "r"}
        assert (await post("RoomService/DeleteRoom", {"room": "r"}, **admin))[0] == 401
        assert (await post("AgentDispatchService/ListDispatch", {"room": "r"}, **admin))[1][
            "code"
        ] == "unavailable"
        long = {"room": "r", "metadata": "x" * (MAX_METADATA + 1)}
        assert (await post(create, long, **admin))[1]["code"] == "invalid_argument"
        status, first = await post(create, {"room": "r", "metadata": "x" * MAX_METADATA}, **admin)
        assert (status, first["room"]) == (200, "r")
        found = (await post("AgentDispatchService/ListDispatch", {"room": "r"}, **admin))[1]
        assert len(found["agent_dispatches"]) == 2  # the room is made, and has its automatic dispatch
        wrong = {"room": "r", "dispatch_id": "AD_0"}
        assert (await post("AgentDispatchService/DeleteDispatch", wrong, **admin))[1]["code"] == "not_found"
        assert (await post("RoomService/Nothing", {}, **admin))[0] == 404
        async with session.get(server.url.replace("ws", "http") + "/lastcall-local/room") as answer:
            assert answer.status == 401


async def test_a_dispatch_is_offered_once() -> None:
    """The offer goes out 200 ms later, to the workers of that moment. Two equal dispatches are two jobs."""
    async with DispatchServer() as server, livekit_api(server) as client:
        wanted = api.CreateAgentDispatchRequest(agent_name="a", room="r", metadata="m", attributes={"k": "v"})
        await client.agent_dispatch.create_dispatch(wanted)
        await until(lambda: server.counts["dispatch_no_worker"])
        async with workers(server, 1, name="a") as (worker,):
            began = time.monotonic()
            for _ in range(2):
                await client.agent_dispatch.create_dispatch(wanted)
            await until(lambda: len(worker.assigned) == 2)
            offered = next(each for each in server.events if each.kind == "offer")
            assert offered.at - began >= server.delays.affinity
            # A worker has registered, so the server links its jobs only later: none is listed, or terminated.
            assert not any(d.state.jobs for d in await client.agent_dispatch.list_dispatch("r"))
            job = server.jobs[worker.assigned[0]].job
            assert (job.metadata, dict(job.attributes)) == ("m", {"k": "v"})
            worker.terminates, worker.answer = True, False
            async with workers(server, 1, name="a") as (other,):
                await client.agent_dispatch.create_dispatch(wanted)
                await until(lambda: worker.offers[2:] or other.offers)
                if worker.offers[2:]:  # the other is not asked
                    await until(lambda: server.counts["dispatch_terminated"])
                    assert other.offers == []


async def test_a_reused_identity_ends_the_new_job() -> None:
    """The old agent is thrown out, and the server then terminates the job that it knows by the identity."""
    async with DispatchServer(delays=QUICK) as server, workers(server, 1) as (worker,):
        _, first = await one_job(server, worker)
        async with joined(server, first) as old:
            events = seen_by(old)
            new_job, second = await one_job(server, worker)
            async with joined(server, second) as new:
                await until(lambda: ("disconnected", Reason.DUPLICATE_IDENTITY) in events)
                await until(lambda: worker.terminated == [new_job])
                assert new.isconnected()


async def test_a_ghost_stays_for_a_time() -> None:
    """A participant that loses its connection is in the list until its time is over; then its job ends."""
    async with (
        DispatchServer(delays=QUICK) as server,
        livekit_api(server) as client,
        workers(server, 1) as (worker,),
    ):
        job, token = await one_job(server, worker)
        caller = server.rooms.visit("r", "caller")
        async with aiohttp.ClientSession() as session:
            headers = {"Authorization": f"Bearer {token}"}
            ws = await session.ws_connect(f"{server.url}/lastcall-local/room", headers=headers)
            await ws.receive_json()
        await until(lambda: server.counts["ghost"])
        found = await client.room.list_participants(api.ListParticipantsRequest(room="r"))
        assert {each.identity for each in found.participants} == {"caller", "me"}
        await until(lambda: worker.terminated == [job])
        assert caller.heard[-1]["reason"] == Reason.CONNECTION_TIMEOUT


async def test_clients_talk() -> None:
    """Attributes, data, RPC and streams between two clients of one room."""
    async with (
        DispatchServer(delays=QUICK) as server,
        joined(server, pass_for(server, "a", kind="agent")) as a,
        joined(server, pass_for(server, "b")) as b,
    ):
        events = seen_by(b)
        await until(lambda: "b" in a.remote_participants)
        assert a.remote_participants["b"].attributes == {"from": "b"}
        assert (b.remote_participants["a"].kind, a.remote_participants["b"].kind) == (
            rtc.ParticipantKind.PARTICIPANT_KIND_AGENT,
            rtc.ParticipantKind.PARTICIPANT_KIND_STANDARD,
        )
        await a.local_participant.set_attributes({"epoch": "1"})
        await until(lambda: any(name == "participant_attributes_changed" for name, _ in events))
        assert b.remote_participants["a"].attributes == {"from": "a", "epoch": "1"}
        await a.local_participant.publish_data(b"\x00\x01", topic="t")
        await until(lambda: any(name == "data_received" for name, _ in events))
        packet = events[-1][1]
        assert (packet.data, packet.topic, packet.participant.identity) == (b"\x00\x01", "t", "a")

        async def handle(data: rtc.RpcInvocationData) -> str:
            if data.payload == "wrong":
                raise ValueError
            return f"{data.caller_identity} {data.payload}"

        b.local_participant.register_rpc_method("echo", handle)
        call = a.local_participant.perform_rpc
        answer = await call(destination_identity="b", method="echo", payload="x" * (MAX_RPC - 2))
        assert answer == "a " + "x" * (MAX_RPC - 2)
        for method, payload, code in (
            ("none", "", 1400),
            ("echo", "wrong", 1500),
            ("echo", "x" * MAX_RPC, 1504),
            ("echo", "x" * (MAX_RPC + 1), 1402),
        ):
            with pytest.raises(rtc.RpcError) as raised:
                await call(destination_identity="b", method=method, payload=payload)
            assert raised.value.code == code

        got: asyncio.Queue[tuple[bytes, str, dict[str, str]]] = asyncio.Queue()

        async def read(reader: Any, sender: str) -> None:
            content = b"".join([part async for part in reader])
            got.put_nowait((content, sender, reader.info.attributes))

        tasks = []
        b.register_byte_stream_handler("capsule", lambda *a: tasks.append(asyncio.create_task(read(*a))))
        content = "ü".encode() * 128 * 1024
        writer = await a.local_participant.stream_bytes(
            "state", topic="capsule", destination_identities=["b"], attributes={"k": "v"}
        )
        await writer.write(content)
        await writer.aclose()
        async with asyncio.timeout(10):
            assert await got.get() == (content, "a", {"k": "v"})


async def test_audio_is_numbered() -> None:
    """Frames are heard one by one; of a muted track, and of one whose owner may not speak, none is."""
    async with DispatchServer(delays=QUICK) as server, livekit_api(server) as client:
        caller = server.rooms.visit("r", "caller")
        async with joined(server, pass_for(server, "a", kind="agent")) as a:
            source = AudioSource(48000, 1)
            track = LocalAudioTrack.create_audio_track("voice", source)
            publication = await a.local_participant.publish_track(track)
            frame = rtc.AudioFrame(bytes(960), 48000, 1, 480)

            async def say(frames: int) -> None:
                for _ in range(frames):
                    await source.capture_frame(frame)
                await source.wait_for_playout()

            began = time.monotonic()
            await say(20)
            assert time.monotonic() - began >= 0.19
            await until(lambda: caller.ticks("a") == list(range(1, 21)))
            mute = api.MuteRoomTrackRequest(room="r", identity="a", track_sid=publication.sid, muted=True)
            await client.room.mute_published_track(mute)
            await until(lambda: publication.muted)
            await say(5)
            mute.muted = False
            await client.room.mute_published_track(mute)
            await until(lambda: not publication.muted)
            await say(5)
            await until(lambda: caller.ticks("a")[20:] == list(range(26, 31)))
            silent = api.ParticipantPermission(can_publish=False)
            await client.room.update_participant(
                api.UpdateParticipantRequest(room="r", identity="a", permission=silent)
            )
            await say(5)
            assert caller.ticks("a")[-1] == 30 and a.isconnected()

            caller.say(do="publish", name="microphone")
            await until(lambda: a.remote_participants["caller"].track_publications)
            (heard,) = a.remote_participants["caller"].track_publications.values()
            stream = AudioStream.from_track(track=heard.track, sample_rate=16000)
            caller.say(do="tick", sid=heard.sid, n=7, seconds=0.01)
            event = await anext(stream)
            assert (event.frame.tick, event.frame.samples_per_channel) == (7, 160)
            await stream.aclose()
            await source.aclose()


async def test_types_of_jobs() -> None:
    """A publisher's job comes with the first track of a session, and with a new dispatch."""
    publisher = agent.JobType.JT_PUBLISHER
    async with (
        DispatchServer(delays=QUICK) as server,
        livekit_api(server) as client,
        workers(server, 1, type=publisher) as (worker,),
    ):
        caller = server.rooms.visit("r", "caller")
        assert worker.offers == []
        for _ in range(2):
            caller.say(do="publish", name="microphone")
        await until(lambda: worker.assigned)
        job = server.jobs[worker.assigned[0]].job
        assert (job.type, job.participant.identity) == (publisher, "caller")
        await client.agent_dispatch.create_dispatch(api.CreateAgentDispatchRequest(room="r"))
        await until(lambda: len(worker.assigned) == 2)
        back = server.rooms.visit("r", "caller")
        back.say(do="publish", name="microphone")
        await until(lambda: len(worker.assigned) == 4)  # one for each dispatch of the room


async def test_the_caller_of_a_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for an agent, stays when the agent reconnects, and hangs up when the agent has gone."""
    monkeypatch.setattr(livekit_server, "CALLER_WAITS", 0.5)
    async with DispatchServer(delays=QUICK) as server, workers(server, 1) as (worker,):
        await server.dispatch("r", caller="caller")
        await until(lambda: worker.tokens)
        room = server.rooms.state.get("r")
        assert room is not None
        async with joined(server, worker.tokens[0]) as agent_room:
            assert set(agent_room.remote_participants) == {"caller"}
            await agent_room.simulate_scenario(FULL_RECONNECT)
            await asyncio.sleep(1.0)
            assert set(agent_room.remote_participants) == {"caller"}
        await until(lambda: not room.participants)


async def test_a_room_closes_when_people_have_gone() -> None:
    """Agents keep no room open."""
    async with DispatchServer(delays=QUICK) as server:
        caller = server.rooms.visit("r", "caller")
        async with joined(server, pass_for(server, "a", kind="agent")) as a:
            events = seen_by(a)
            room = server.rooms.state.get("r")
            assert room is not None
            room.info.departure_timeout = 0
            caller.leave()
            await until(lambda: ("disconnected", Reason.ROOM_CLOSED) in events)
            assert server.rooms.state.get("r") is None


def test_when_a_room_without_people_closes() -> None:
    """Its time runs from the last removal of a participant, an agent's included."""
    rooms = Rooms()
    for name, kind in (("caller", Kind.STANDARD), ("a", Kind.AGENT), ("b", Kind.AGENT)):
        rooms.join("r", models.ParticipantInfo(identity=name, kind=kind), 0.0)
    room = rooms.get("r")
    assert room is not None
    for at, name in ((1.0, "caller"), (15.0, "a")):
        rooms.leave(room.participants[name].sid, Reason.CLIENT_INITIATED, at)
    rooms.join("r", models.ParticipantInfo(identity="b", kind=Kind.AGENT), 20.0)  # a full reconnect
    rooms.expire(20.0 + DEPARTURE_TIMEOUT - 1)
    assert rooms.get("r") is room
    rooms.expire(20.0 + DEPARTURE_TIMEOUT)
    assert rooms.get("r") is None


def test_who_never_publishes_is_shown_late() -> None:
    """The join answer has everybody. The others are told at the next tick, or with the first track."""
    rooms = Rooms()
    for name in ("a", "b"):
        rooms.join("r", models.ParticipantInfo(identity=name, permission={"can_publish": True}), 10.0)
    room = rooms.get("r")
    assert room is not None
    a, b = (room.participants[name].sid for name in ("a", "b"))

    def told(effects: list[Effect], sid: str) -> list[str]:
        return [each.message["on"] for each in effects if isinstance(each, Tell) and each.sid == sid]

    assert told(rooms.update(b, attributes={"k": "v"}), b) == ["participant_updated"]
    assert rooms.expire(12.9) == []
    assert told(rooms.expire(13.0), a) == ["participant_connected", "participant_updated"]
    assert told(rooms.update(b, name="B"), a) == []
    assert told(rooms.publish(b, "voice")[1], a) == ["participant_updated", "track_published"]
    assert told(rooms.update(b, name="b"), a) == ["participant_updated"]
    assert told(rooms.leave(b, Reason.CLIENT_INITIATED, 13.1), a) == ["participant_disconnected"]
    rooms.join("r", models.ParticipantInfo(identity="b"), 14.0)
    rooms.leave(room.participants["b"].sid, Reason.CLIENT_INITIATED, 14.1)
    assert rooms.expire(17.0) == [], "of one that has left by then nobody is told"


async def test_a_slow_client_hears_why_its_session_ends() -> None:
    """It misses older messages, and not the last one: it would take a removal for a lost connection."""
    sent: list[str] = []

    class Socket:
        async def send_str(self, text: str) -> None:
            sent.append(text)

        async def close(self) -> None:
            sent.append("closed")

    connection = room_server._Connection(Socket())  # type: ignore[arg-type]  # a stand-in
    for number in range(room_server.MAX_WAITING + 5):
        connection.tell({"n": number})
    connection.tell({"on": "disconnected"})
    connection.hang_up()
    async with asyncio.timeout(10):
        await connection.write()
    assert sent[-2:] == ['{"on": "disconnected"}', "closed"]
