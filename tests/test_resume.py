"""`lastcall.resume_session` in one process: two sessions, and in place of the two jobs the call of each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from livekit import rtc
from livekit.agents import Agent, AgentTask, function_tool, llm

import lastcall
from lastcall.worker.job import session as session_module
from lastcall.worker.job.capsule import MAX_BYTES, TooLarge, encode
from lastcall.worker.job.session import NEEDED, VERSION
from lastcall.worker.job.session_state import NotKept, NotResumed, kept, restored, since
from tests.support.handover_stage import ORDER, Stage, stage, token
from tests.support.talk import Loudspeaker, Parrot, Voice, read_by, talking, type_to_agents

pytestmark = pytest.mark.core

PATIENCE = 30.0
since_1_5 = pytest.mark.skipif(VERSION < NEEDED, reason="resume_session is for livekit-agents 1.5 and newer")


class Line:
    """The call of one job, between an agent and its successor: what they exchange goes through JSON."""

    def __init__(self, predecessor: Line | None = None, state: Any = None) -> None:
        self.predecessor = predecessor
        self.resumed = None if predecessor is None else SimpleNamespace(state=state)
        self.is_inert = False
        self.holds = 0

    def keep(self, provider: Callable[[], Any]) -> None:
        self.provider = provider

    def on_takeover(self, fn: Callable[[], Any]) -> None:
        self.fall_silent = fn

    def on_take_back(self, fn: Callable[[], Any]) -> None:
        self.speak_again = fn

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        self.holds += 1
        try:
            yield
        finally:
            self.holds -= 1

    async def take_over(self) -> Any:
        assert self.predecessor is not None
        return json.loads(json.dumps(await self.predecessor.fall_silent()))

    def successor(self) -> Line:
        """Return the call of an agent that arrives."""
        return Line(self, json.loads(json.dumps(self.provider())))


class Clerk(Agent):  # type: ignore[misc]  # livekit-agents is not type-checked
    """Greets, books, and can pass on to another agent."""

    def __init__(self) -> None:
        super().__init__(instructions="Be a clerk.")
        self.may_book = asyncio.Event()
        self.may_book.set()

    async def on_enter(self) -> None:
        """Greet a caller who was not greeted."""
        if not lastcall.is_resumed(self):
            await self.session.say("hello")

    @function_tool  # type: ignore[untyped-decorator]  # livekit-agents is not type-checked
    async def book(self, what: str) -> str:
        """Book it."""
        await self.may_book.wait()
        return f"booked {what}"

    @function_tool  # type: ignore[untyped-decorator]  # livekit-agents is not type-checked
    async def pass_on(self) -> tuple[Agent, str]:
        """Pass the caller on."""
        return Boss(chat_ctx=self.chat_ctx), "passed on"


class Boss(Agent):  # type: ignore[misc]  # livekit-agents is not type-checked
    """The agent that follows the clerk."""

    def __init__(self, chat_ctx: Any = None) -> None:
        super().__init__(instructions="Be the boss.", chat_ctx=chat_ctx)
        self.entered: list[bool] = []

    async def on_enter(self) -> None:
        """Note whether the call is resumed."""
        self.entered.append(lastcall.is_resumed(self))


class Stranger(Agent):  # type: ignore[misc]  # livekit-agents is not type-checked
    """An agent that nobody has named."""

    def __init__(self) -> None:
        super().__init__(instructions="Be strange.")


@asynccontextmanager
async def job(line: Line, **options: Any) -> AsyncIterator[SimpleNamespace]:
    """Run a session as the entrypoint of an agent does, up to the takeover."""
    resume = {name: options.pop(name) for name in ("dump_userdata", "load_userdata") if name in options}
    agents = options.pop("agents", [Clerk, Boss])
    brain, voice = Parrot(), options.pop("tts", None) or Voice()
    session = talking(llm=brain, tts=voice, **options)
    session.output.audio = loudspeaker = Loudspeaker()
    resumption = lastcall.resume_session(line, session, agents=agents, **resume)  # type: ignore[arg-type]
    await session.start(resumption.agent)
    try:
        yield SimpleNamespace(
            session=session, resumption=resumption, brain=brain, voice=voice, loudspeaker=loudspeaker
        )
    finally:
        async with asyncio.timeout(PATIENCE):
            await session.aclose()


def said(session: Any, role: str = "assistant") -> list[str]:
    """Return the texts of the history."""
    return [item.text_content for item in session.history.items if getattr(item, "role", "") == role]


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


async def turn(one: SimpleNamespace, text: str) -> None:
    """Let the caller say something, and the agent answer."""
    async with asyncio.timeout(PATIENCE):
        await one.session.run(user_input=text)


def dumped(items: Any) -> list[dict[str, Any]]:
    return [item.model_dump(mode="json", exclude_none=True) for item in items]


@since_1_5
async def test_a_conversation_goes_on() -> None:
    """The successor has the history with its tools, the context and the userdata, and does not greet again.

    It is silent before the takeover, and the predecessor is afterwards.
    """
    line = Line()
    functions = {"dump_userdata": list, "load_userdata": set}
    async with job(line, userdata={"x"}, **functions) as old:
        assert await old.resumption.take_over() is False and not old.resumption.is_resumed
        await until(lambda: said(old.session) == ["hello"])
        await turn(old, "one")
        await turn(old, "book a table")
        before = dumped(old.session.history.items)
        async with job(line.successor(), **functions) as new:
            assert isinstance(new.resumption.agent, Clerk) and new.resumption.is_resumed
            assert new.session.userdata == {"x"}
            with pytest.raises(RuntimeError, match="another agent speaks"):
                new.session.say("too early")
            await turn(old, "three")  # the state has been handed on already
            old.session.userdata.add("y")
            assert await new.resumption.take_over() is True
            assert dumped(new.session.history.items)[: len(before)] == before
            assert dumped(new.session.history.items) == dumped(old.session.history.items)
            contexts = [one.session.current_agent.chat_ctx.items for one in (old, new)]
            assert dumped(contexts[0]) == dumped(contexts[1])
            assert new.session.userdata == {"x", "y"}

            spoken = old.loudspeaker.frames
            with pytest.raises(RuntimeError, match="another agent speaks"):
                old.session.generate_reply(user_input="four")
            await turn(new, "four")
            assert said(new.session)[-1] == "answer 4 to four"
            assert "booked" not in new.brain.asked and "answer 3 to three" in new.brain.asked
            assert "hello" not in new.voice.texts and said(new.session).count("hello") == 1
            assert old.loudspeaker.frames == spoken and new.loudspeaker.frames
    assert old.brain.requests == 4 and new.brain.requests == 1


@since_1_5
async def test_a_successor_of_a_successor() -> None:
    """A call that was handed over can be handed over again, and not before it was taken over."""
    first, agents = Line(), [Clerk(), Boss()]
    async with job(first, agents=agents) as old:
        assert old.resumption.agent is agents[0]
        await turn(old, "one")
        await turn(old, "pass on")
        await until(lambda: isinstance(old.session.current_agent, Boss))
        second = first.successor()
        async with job(second) as middle:
            with pytest.raises(NotKept, match="not been taken over"):
                second.provider()
            await middle.resumption.take_over()
            await until(lambda: middle.session.current_agent.entered == [True])
            await turn(middle, "three")
            async with job(second.successor()) as new:
                await new.resumption.take_over()
                await turn(new, "four")
                assert said(new.session)[-2:] == ["answer 3 to three", "answer 4 to four"]
                assert said(new.session).count("hello") == 1


@since_1_5
async def test_the_agent_changes_while_the_successor_gets_ready() -> None:
    """The successor follows: it enters the agent that is current at the takeover."""
    line = Line()
    async with job(line) as old, job(line.successor()) as new:
        await turn(old, "pass on")
        await until(lambda: isinstance(old.session.current_agent, Boss))
        await new.resumption.take_over()
        await until(lambda: getattr(new.session.current_agent, "entered", []) == [True])
        await turn(new, "two")
        assert said(new.session)[-1] == "answer 2 to two"
        assert "hello" not in new.voice.texts


@since_1_5
async def test_a_sentence_that_is_cut_goes_on() -> None:
    """The predecessor falls silent at once, and the successor answers in its place."""
    line = Line()
    async with job(line, tts=Voice(60.0)) as old:
        await until(lambda: old.loudspeaker.frames)
        async with job(line.successor()) as new:
            loop = asyncio.get_running_loop()
            began = loop.time()
            await new.resumption.take_over()
            assert loop.time() - began < PATIENCE, "60 s of speech are not waited for"
            await until(lambda: said(new.session)[-1:] == ["answer 0 to nothing"])
            messages = [item for item in old.session.history.items if item.type == "message"]
            assert [item.interrupted for item in messages] == [True] * len(messages)


@since_1_5
async def test_a_turn_that_was_heard_is_answered() -> None:
    """The words that the predecessor's STT had understood are a turn of the successor's."""
    line = Line()
    async with job(line) as old:
        await until(lambda: said(old.session) == ["hello"])
        for text, is_final in (("i want", True), ("to le", False), ("to leave", False)):
            event = SimpleNamespace(transcript=text, is_final=is_final)
            old.session.emit("user_input_transcribed", event)
        async with job(line.successor()) as new:
            await new.resumption.take_over()
            await until(lambda: said(new.session)[-1:] == ["answer 1 to i want to leave"])
            assert said(new.session, "user") == ["i want to leave"]


@since_1_5
async def test_the_voice_is_taken_back() -> None:
    """An agent whose successor fails goes on, and can be taken over once more."""
    line = Line()
    async with job(line) as old:
        await turn(old, "one")
        line.successor()
        await line.fall_silent()
        assert old.resumption.has_left
        assert not old.session.input.audio_enabled and not old.session.output.audio_enabled
        assert not old.session.output.transcription_enabled
        await line.speak_again()
        assert not old.resumption.has_left
        assert old.session.input.audio_enabled and old.session.output.audio_enabled
        assert old.session.output.transcription_enabled
        await turn(old, "two")
        assert said(old.session)[-1] == "answer 2 to two"
        await line.speak_again()
        async with job(line.successor()) as new:
            await new.resumption.take_over()
            await turn(new, "three")
            assert said(new.session)[-1] == "answer 3 to three"


@since_1_5
async def test_no_takeover_while_a_tool_runs() -> None:
    """The call is busy, and a takeover that comes all the same is refused."""
    line = Line()
    async with job(line) as old:
        await until(lambda: said(old.session) == ["hello"])
        clerk = old.session.current_agent
        clerk.may_book.clear()
        booking = asyncio.create_task(turn(old, "book a table"))
        await until(lambda: line.holds == 1)
        line.provider()
        with pytest.raises(NotKept, match="a tool is running"):
            await line.fall_silent()
        clerk.may_book.set()
        await booking
        await until(lambda: line.holds == 0)
        await line.fall_silent()


@since_1_5
async def test_a_session_that_closes_before_the_takeover() -> None:
    """A takeover that fails leaves a session that is silent, enters no agent, and closes at once."""
    line = Line()
    async with job(line) as old:
        await until(lambda: said(old.session) == ["hello"])
        line.fall_silent = _refuse
        async with job(line.successor()) as new:
            with pytest.raises(ConnectionRefusedError):
                await new.resumption.take_over()
            assert not new.loudspeaker.frames


async def _refuse() -> None:
    raise ConnectionRefusedError


@since_1_5
async def test_last_turns_that_can_not_be_used() -> None:
    """The predecessor is silent by then, so the successor speaks all the same, with the state as it was."""
    line = Line()
    async with job(line) as old:
        await turn(old, "one")
        async with job(line.successor(), agents=[Clerk]) as new:
            old.session.update_agent(Boss())
            await until(lambda: isinstance(old.session.current_agent, Boss))
            await new.resumption.take_over()
            await turn(new, "two")
            assert said(new.session)[-1] == "answer 2 to two"


@since_1_5
@pytest.mark.parametrize("has_state", [True, False])
async def test_a_predecessor_that_died(has_state: bool) -> None:
    """The call goes on with the state, if it was handed on, and without last turns; else it begins anew."""
    line = Line()
    async with job(line) as old:
        await turn(old, "one")
        successor = line.successor()
        successor.take_over = _nothing  # type: ignore[method-assign]
        if not has_state:
            successor.resumed = SimpleNamespace(state=None)
        async with job(successor) as new:
            assert await new.resumption.take_over() is has_state
            await turn(new, "two")
            await until(lambda: said(new.session).count("hello") == 1)
            assert ("hello" in new.voice.texts) is not has_state
            assert f"answer {1 + has_state} to two" in said(new.session)


async def _nothing() -> None:
    """Return no last turns."""


@since_1_5
async def test_agents_that_can_not_go_on() -> None:
    """Each has one line, which names it and says what to do."""
    line = Line()
    async with job(line) as old:
        await old.resumption.take_over()
        old.session.update_agent(Stranger())
        with pytest.raises(
            NotKept, match=r"the agent Stranger is not in agents=\[…\], expected one of Clerk, Boss"
        ):
            line.provider()
        state = {**kept([], []), "agent": "Stranger", "userdata": None}
        with pytest.raises(NotResumed, match=r"agents=\[Clerk, Boss\]: the call goes on with Stranger"):
            async with job(Line(line, state)):
                raise AssertionError
    session = talking()
    lastcall.resume_session(Line(), session, agents=[Clerk])  # type: ignore[arg-type]
    with pytest.raises(NotKept, match="not been started"):
        line = Line()
        lastcall.resume_session(line, talking(), agents=[Clerk])  # type: ignore[arg-type]
        line.provider()


@since_1_5
async def test_before_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every agent that would find no state after a handover is refused from its first call on."""
    monkeypatch.setattr(session_module, "_is_connected", lambda: False)
    line = Line()
    with pytest.raises(RuntimeError, match=r"await ctx.connect\(\) before"):
        lastcall.resume_session(line, talking(), agents=[Clerk])  # type: ignore[arg-type]
    line.is_inert = True
    lastcall.resume_session(line, talking(), agents=[Clerk])  # type: ignore[arg-type]


async def test_an_older_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says which version is needed."""
    monkeypatch.setattr(session_module, "VERSION", (1, 3))
    with pytest.raises(RuntimeError, match=r"livekit-agents 1\.\S+: expected 1.5 or newer"):
        lastcall.resume_session(Line(), talking(), agents=[Clerk])  # type: ignore[arg-type]


@since_1_5
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"agents": []}, r"agents=\[\]: expected at least"),
        ({"agents": [Clerk, Clerk()]}, "Clerk …]: two have this name"),
        ({"agents": ["Clerk"]}, "'Clerk' …]: expected classes of agents, or agents"),
        ({"agents": [Clerk], "dump_userdata": list}, "expected both, or neither"),
    ],
)
async def test_wrong_arguments(options: dict[str, Any], error: str) -> None:
    """Each is refused with its name and what was expected."""
    with pytest.raises((TypeError, ValueError), match=error):
        lastcall.resume_session(Line(), talking(), **options)  # type: ignore[arg-type]


# -- both sides of a handover in a room -------------------------------------------------------------------


class Side:
    """The call of one agent on a stage, without a worker."""

    def __init__(self, on: Stage, *, is_new: bool) -> None:
        self._on = on
        self._is_new = is_new
        self.is_inert = False
        self.resumed = on.resumed if is_new else None
        self.busy = on.busy.during

    def keep(self, provider: Callable[[], Any]) -> None:
        if not self._is_new:
            self._on.capsule.keep(provider)

    def on_takeover(self, fn: Callable[[], Any]) -> None:
        if not self._is_new:
            self._on.leaving.on_takeover = fn

    def on_take_back(self, fn: Callable[[], Any]) -> None:
        if not self._is_new:
            self._on.leaving.on_take_back = fn

    async def take_over(self) -> Any:
        return await self._on.arriving.take_over() if self._is_new else None


@asynccontextmanager
async def in_room(side: Side, room: Any) -> AsyncIterator[Any]:
    """Run a session in a room as the entrypoint of an agent does."""
    session = talking(tts=Voice())
    resumption = lastcall.resume_session(side, session, agents=[Clerk, Boss])  # type: ignore[arg-type]
    await session.start(resumption.agent, room=room)
    try:
        assert await resumption.take_over() is (side.resumed is not None)
        yield session
    finally:
        async with asyncio.timeout(PATIENCE):
            await session.aclose()


@since_1_5
async def test_a_conversation_goes_on_in_its_room() -> None:
    """The caller types, and is answered by the first agent, then by its successor, which does not greet."""
    async with stage() as on:
        await on.old.connect(on.server.url, token(on.server, "bot", "agent"))
        async with in_room(Side(on, is_new=False), on.old):
            await until(lambda: read_by(on.caller) == [("bot", "hello")])
            type_to_agents(on.caller, "one")
            await until(lambda: len(read_by(on.caller)) == 2)
            on.leaving.begin(ORDER)
            await until(lambda: on.told("prepared", "impossible"))
            await on.arrive()
            async with in_room(Side(on, is_new=True), on.new):
                type_to_agents(on.caller, "two")
                await until(lambda: len(read_by(on.caller)) == 3)
                await until(on.left.is_set)
        answers = [("bot", "hello"), ("bot", "answer 1 to one"), ("bot~1", "answer 2 to two")]
        assert read_by(on.caller) == answers


# -- the state alone ------------------------------------------------------------------------------------


def message(text: str, **fields: Any) -> Any:
    return llm.ChatMessage(role="user", content=[text], **fields)


def test_exotic_items() -> None:
    """Texts of any kind, tools, images with a URL and fields of providers go through JSON; frames do not."""
    frame = rtc.AudioFrame(bytes(480), 24000, 1, 240)
    picture = rtc.VideoFrame(2, 2, rtc.VideoBufferType.RGBA, bytes(16))
    url = "data:image/png;base64,AAAA"
    content = [
        "ü \u2028 \x00 \U0001f600 <expr/>",
        llm.ImageContent(image=url),
        llm.ImageContent(image=picture),
        llm.AudioContent(frame=[frame], transcript="heard"),
    ]
    items = [
        llm.ChatMessage(role="user", content=content, interrupted=True),
        llm.FunctionCall(call_id="1", name="book", arguments='{"a": "ü"}'),
        llm.FunctionCallOutput(call_id="1", name="book", output="", is_error=True),
    ]
    history, context = restored(json.loads(json.dumps(kept(items, items))))
    assert [each.id for each in history] == [each.id for each in items]
    assert history[0].content[0] == content[0] and history[0].content[1].image == url
    assert len(history[0].content) == 2 and history[0].interrupted
    assert dumped(history[1:]) == dumped(items[1:])
    assert all(a is b for a, b in zip(history, context, strict=True))
    assert len(items[0].content) == 4, "the session's own item is as it was"


def test_the_limit() -> None:
    """A history that is too large for a capsule is told with its size, and with nothing of it."""
    history = [message("ü" * 1000) for _ in range(140)]
    with pytest.raises(TooLarge, match=rf"has \d+ bytes of JSON, at most {MAX_BYTES} are allowed"):
        encode(kept(history, history))
    encode(kept(history[:100], history[:100]))


def test_what_is_told_again() -> None:
    """Last turns have the items that are new or have changed. A copy that was changed keeps its text."""
    one, two = message("one"), message("two")
    own = message("my own one", id=one.id)
    before = kept([one], [own])
    assert before["context"] != before["history"]
    two.interrupted = True
    state = kept([one, two], [own, two])
    last = since(before["items"], state)
    assert list(last["items"]) == [two.id] and len(last["history"]) == len(last["context"]) == 2
    merged = {**before, **last, "items": {**before["items"], **last["items"]}}
    history, context = restored(json.loads(json.dumps(merged)))
    assert [each.text_content for each in history] == ["one", "two"]
    assert [each.text_content for each in context] == ["my own one", "two"]


def test_errors_show_nothing_that_was_said() -> None:
    """Neither an item that is no JSON nor one that can't be read shows its text."""
    item = message("my secret", extra={"raw": b"\xff\xfe"})
    with pytest.raises(NotKept, match=r"an item of the history \(message\) is no JSON") as no_json:
        kept([item], [])
    state = kept([message("my secret")], [])
    (key,) = state["history"]
    for wrong in ({"type": "of tomorrow"}, {"role": 7}):
        items = {key: {**state["items"][key], **wrong}}
        with pytest.raises(NotResumed, match="can't read the history") as unread:
            restored({**state, "items": items})
        assert "secret" not in "".join(map(str, (unread.value, unread.value.__cause__)))
        assert unread.value.__suppress_context__
    assert "secret" not in str(no_json.value)
    with pytest.raises(NotResumed):
        restored({})


class Form(AgentTask[None]):  # type: ignore[misc]  # livekit-agents is not type-checked
    """A task that is not over."""


@since_1_5
async def test_an_agent_task_is_not_handed_over() -> None:
    """An AgentTask is a part of a coroutine, and ends where it began."""
    line = Line()
    session: Any = SimpleNamespace(
        current_agent=Form(instructions="Ask."),
        on=lambda *_: None,
        history=llm.ChatContext.empty(),
    )
    lastcall.resume_session(line, session, agents=[Clerk])  # type: ignore[arg-type]
    with pytest.raises(NotKept, match="the AgentTask Form is under way"):
        line.provider()
