"""`lastcall.resume_session`: an AgentSession whose call goes on in another job.

In the leaving agent the state of the session is kept for a successor, and a takeover makes the session
silent. In the arriving agent the session is silent until the takeover, and goes on where the other one was.

Only names that livekit-agents promises are used, so a session is made silent from outside: its input and its
output are switched off, and `say` and `generate_reply` raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import livekit.agents
from livekit.agents import Agent, AgentSession, AgentTask, get_job_context, llm

from lastcall.worker.base.clock import now
from lastcall.worker.job import session_state
from lastcall.worker.job.call import Call
from lastcall.worker.job.session_state import NotKept, NotResumed, State
from lastcall.worker.job.session_voice import Heard, Tools, Voice

log = logging.getLogger("lastcall")

WHO = "lastcall.resume_session"
# Ours: on 1.3.12 a session does not always close that was interrupted in the first sentence of its agent.
NEEDED = (1, 5)
VERSION = tuple(int(part) for part in livekit.agents.__version__.split(".")[:2])
# Seconds for the room to link a caller and for the caller to subscribe to the agent's audio. Ours: it takes
# 0.2 s, and a caller that hears nothing, as one that only types, must not hold up the takeover.
CALLER_WITHIN = 1.0
# Seconds between two looks at the linked caller, for which livekit-agents has no event.
LOOK_EVERY = 0.01
# Seconds for which `on_enter` of an arriving agent waits. Ours: more than a handover may take. The close of a
# session waits for `on_enter`.
ENTER_WITHIN = 60.0

# Agents that go on with a call. A global, because `on_enter` of an agent has nothing but the agent.
_resumed: weakref.WeakSet[Any] = weakref.WeakSet()


def is_resumed(agent: Agent) -> bool:
    """Tell whether an agent goes on with a call that was handed over, for its `on_enter`. Since 0.2.0.

    True of the agent that was current when the call was handed over, and of no agent that follows it.
    """
    return agent in _resumed


class Resumption:
    """A session whose call can go on in another job, as `resume_session` returns it. Since 0.2.0.

    `agent`: the agent to start the session with.
    `is_resumed`: whether the call was handed over to this job, with its state.
    `has_left`: whether the call goes on in another job, and this one only has to end.
    """

    def __init__(
        self,
        call: Call,
        session: Any,
        agents: Mapping[str, Any],
        dump: Callable[[Any], object] | None,
        load: Callable[[Any], Any] | None,
    ) -> None:
        self._call = call
        self._session = session
        self._agents = agents
        self._dump = dump
        self._load = load
        self._voice = Voice(session)
        self._told: dict[str, session_state.Item] = {}
        self._heard = Heard(session)
        self._tools = Tools(call, session)
        self._may_enter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.has_left = False
        # Until the takeover of a successor, the agent before has the call.
        self._is_arriving = call.resumed is not None
        self._state: State | None = None if call.resumed is None else call.resumed.state
        self.is_resumed = self._state is not None
        if self._state is None:
            self.agent = _made(next(iter(agents.values())))
        else:
            self.agent = self._agent_of(self._state)
            self._load_userdata(self._state)
        if self._is_arriving:
            self._voice.close()
            self.agent.on_enter = self._entering(self.agent.on_enter)
            with contextlib.suppress(RuntimeError):  # outside a job, as in a test of the agent
                get_job_context().add_shutdown_callback(self._let_go)
        call.keep(self._keep)
        call.on_takeover(self._fall_silent)
        call.on_take_back(self._speak_again)

    async def take_over(self) -> bool:
        """Go on with a call that was handed over, and return `is_resumed`; call it after `session.start`.

        In a new call it returns at once. In a call that goes on, the history, the context of the agent and
        the userdata are put back, and the session is silent until the predecessor is. Then `on_enter` of the
        agent runs, and a turn that the predecessor could not end is answered.

        Raises `lastcall.Withdrawn` if the call stays with the predecessor, and RuntimeError for a history
        that can't be read.
        """
        if not self._is_arriving:
            return self.is_resumed
        try:
            if self._state is not None:
                await self._restore(self.agent, self._state)
            await self._until_heard()
            turns = await self._call.take_over()
        except BaseException:
            await self._let_go()
            raise
        # The predecessor is silent for good from here on: whatever fails, this agent speaks.
        self._is_arriving = False
        agent = self.agent
        if self._state is not None and turns is not None:
            agent = await self._catch_up(self._state, turns)
        self._voice.open()
        if not self._may_enter.done():
            self._may_enter.set_result(agent is self.agent)
        if agent is not self.agent:  # the predecessor has changed its agent since this one was started
            self.agent = agent
            self._session.update_agent(agent)
        await self._answer(turns or {})
        self._state = None
        return self.is_resumed

    # -- the leaving agent ----------------------------------------------------------------------------

    def _keep(self) -> State:
        """Return the state of the session. Raises NotKept."""
        if self._is_arriving:
            raise NotKept("the call has not been taken over from the agent before")
        state = self._state_now()
        self._told = state["items"]
        return state

    def _state_now(self) -> State:
        session = self._session
        try:
            agent = session.current_agent
        except RuntimeError:
            raise NotKept("the session has not been started") from None
        name = type(agent).__qualname__
        if isinstance(agent, AgentTask):
            raise NotKept(f"the AgentTask {name} is under way, which can't go on elsewhere")
        if name not in self._agents:
            raise NotKept(f"the agent {name} is not in agents=[…], expected one of {', '.join(self._agents)}")
        state = session_state.kept(session.history.items, agent.chat_ctx.items)
        return {"agent": name, **state, "userdata": self._userdata()}

    def _userdata(self) -> object:
        if self._dump is None:
            return None
        return self._dump(self._session.userdata)

    async def _fall_silent(self) -> State:
        """Close the session's voice, and return what has changed since the state was kept."""
        session = self._session
        if self._tools.is_running:
            raise NotKept("a tool is running")
        heard, is_speaking = self._heard.text, session.user_state == "speaking"
        speech = session.current_speech
        is_cut = speech is not None and not speech.done()
        await self._voice.fall_silent()
        self.has_left = True
        state = session_state.since(self._told, self._state_now())
        return {**state, "heard": heard, "owes": (is_cut or bool(heard)) and not is_speaking}

    async def _speak_again(self) -> None:
        """Open the session's voice: the successor has failed."""
        self.has_left = False
        self._voice.open()

    # -- the arriving agent ---------------------------------------------------------------------------

    def _agent_of(self, state: State) -> Any:
        """Return the agent of the class that a state names. Raises NotResumed."""
        name = state["agent"]
        if name not in self._agents:
            raise NotResumed(
                f"{WHO}: agents=[{', '.join(self._agents)}]: the call goes on with {name}; add that class"
            )
        agent = _made(self._agents[name])
        _resumed.add(agent)
        return agent

    def _load_userdata(self, state: State) -> None:
        if self._load is not None:
            self._session.userdata = self._load(state["userdata"])

    def _entering(self, on_enter: Callable[[], Any]) -> Callable[[], Any]:
        """Have `on_enter` of the agent wait until the agent may speak."""

        async def enter() -> None:
            try:
                async with asyncio.timeout(ENTER_WITHIN):
                    may_enter = await asyncio.shield(self._may_enter)
            except TimeoutError:
                log.warning(f"{WHO}: no take_over() has followed, and on_enter is left out")
                return
            if may_enter:
                await on_enter()

        return enter

    async def _restore(self, agent: Any, state: State) -> None:
        """Put history and context in the place of what `start` has made."""
        history, context = session_state.restored(state)
        await agent.update_chat_ctx(llm.ChatContext(context))
        self._session.history.items = history

    async def _catch_up(self, state: State, turns: State) -> Any:
        """Put the last turns of the predecessor in place, and return the agent that is current now."""
        try:
            newest = {**state, **turns, "items": {**state["items"], **turns["items"]}}
            is_same = newest["agent"] == state["agent"]
            agent = self.agent if is_same else self._agent_of(newest)
            await self._restore(agent, newest)
            if newest["userdata"] != state["userdata"]:
                self._load_userdata(newest)
        except Exception:  # the user's load_userdata may raise anything
            log.exception(f"{WHO}: the last turns of the predecessor are lost")
            return self.agent
        return agent

    async def _until_heard(self) -> None:
        """Wait until the room has linked the caller and the caller hears the agent, a second at most."""
        try:
            room_io = self._session.room_io
        except RuntimeError:  # a session without a room, as in a test
            return
        due = now() + CALLER_WITHIN
        while room_io.linked_participant is None and now() < due:  # noqa: ASYNC110  # there is no event
            await asyncio.sleep(LOOK_EVERY)
        if room_io.subscribed_fut is not None:
            await asyncio.wait([room_io.subscribed_fut], timeout=max(0.0, due - now()))

    async def _answer(self, turns: State) -> None:
        """Answer the turn that the predecessor has heard, or go on with a sentence that was cut."""
        heard = turns.get("heard") or ""
        if turns.get("owes"):
            options = {"user_input": heard} if heard else {}
            try:
                self._session.generate_reply(**options)
            except RuntimeError:  # an agent without an LLM, of which only the user knows what it should say
                log.info(f"{WHO}: the predecessor was interrupted, and there is no LLM to go on")
        elif heard:  # the caller is in the middle of a sentence, and the rest of it will be a turn
            message = llm.ChatMessage(role="user", content=[heard])
            self._session.history.items.append(message)
            context = llm.ChatContext([*self.agent.chat_ctx.items, message])
            await self.agent.update_chat_ctx(context)

    async def _let_go(self) -> None:
        if not self._may_enter.done():
            self._may_enter.set_result(False)


def _made(agent: Any) -> Any:
    """Return an agent of `agents`: as it is, or made of its class."""
    return agent() if isinstance(agent, type) else agent


def _is_connected() -> bool:
    """Tell whether the job is in its room. Code outside a job, as a test of the agent, has none to join."""
    try:
        room = get_job_context().room
    except RuntimeError:
        return True
    return bool(room.isconnected())


def resume_session(
    call: Call,
    session: AgentSession,
    *,
    agents: Sequence[Agent | type[Agent]],
    dump_userdata: Callable[[Any], object] | None = None,
    load_userdata: Callable[[Any], Any] | None = None,
) -> Resumption:
    """Have a session go on in another job when its call is handed over, and return the resumption.

    Call it after `await ctx.connect()`, start the session with `resumption.agent`, and then
    `await resumption.take_over()`. `call` is that of `lastcall.call(ctx)`.

    `agents`: every agent that can be current when the call is handed over, the one that a new call begins
    with first. An agent is a class that can be made without arguments, or an object of the class. A successor
    finds the current agent by the name of its class.
    `dump_userdata(session.userdata)` returns the userdata as JSON, and `load_userdata(json)` returns the
    userdata of the successor's session. Without both the userdata is not kept.

    Raises TypeError and ValueError for arguments that can't be used. Raises RuntimeError before
    `ctx.connect()`, in a successor that does not know the agent, and on livekit-agents before 1.5. Since
    0.2.0.
    """
    if VERSION < NEEDED:
        raise RuntimeError(
            f"{WHO}: livekit-agents {livekit.agents.__version__}: expected 1.5 or newer;"
            " use call.keep and call.on_takeover instead"
        )
    # A new call could do without the room. It is refused too, so that the mistake is seen before a handover.
    if not call.is_inert and not _is_connected():
        raise RuntimeError(f"{WHO}: the job is not in its room: await ctx.connect() before, to get the state")
    by_name: dict[str, Any] = {}
    for agent in agents:
        kind = agent if isinstance(agent, type) else type(agent)
        if not issubclass(kind, Agent):
            raise TypeError(f"{WHO}: agents=[… {agent!r} …]: expected classes of agents, or agents")
        if kind.__qualname__ in by_name:
            raise ValueError(f"{WHO}: agents=[… {kind.__qualname__} …]: two have this name, rename one")
        by_name[kind.__qualname__] = agent
    if not by_name:
        raise ValueError(f"{WHO}: agents=[]: expected at least the agent that a call begins with")
    if (dump_userdata is None) != (load_userdata is None):
        raise ValueError(f"{WHO}: dump_userdata and load_userdata: expected both, or neither")
    return Resumption(call, session, by_name, dump_userdata, load_userdata)
