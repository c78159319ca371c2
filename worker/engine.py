"""One AgentServer, run and ended through its public side; what that side lacks comes from `sdk.agent_server`.

The engine decides which offers are answered with yes, and keeps the register of jobs. It does not decide
when to stop: `host` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any

from lastcall.worker import refused_key
from lastcall.worker.base.calls_over import CallsOver
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.errors import Incompatible, StartError
from lastcall.worker.base.settings import DEFAULT_FINISH, HandoverSettings
from lastcall.worker.base.stopping import unshielded
from lastcall.worker.base.succession import Succession
from lastcall.worker.base.wire import (
    CallHears,
    Counts,
    FullReason,
    JobFate,
    JobHandover,
    JobNotAsked,
    Ready,
    ShieldOpen,
    WorkerSays,
    shortened,
)
from lastcall.worker.handovers import Handovers
from lastcall.worker.job_memory import MemoryWatch
from lastcall.worker.jobs import EXIT_WITHIN, Job, Jobs
from lastcall.worker.room_service import Requests, RoomService, RoomServiceError
from lastcall.worker.sdk import agent_server, preflight, process_pool
from lastcall.worker.sdk.agent_server import Answer
from lastcall.worker.second_jobs import SecondJobs
from lastcall.worker.terminations import Terminations
from lastcall.worker.warming import Warming

Report = Callable[[WorkerSays], None]

log = logging.getLogger("lastcall.worker")

# Seconds within which the server is told of good ends before their processes are killed. Ours: a write to a
# socket takes milliseconds. While the connection is down the message waits in livekit-agents' queue.
TELL_WITHIN = 1.0
# Seconds of the close for requests that are under way, to remove the agents of killed jobs. Ours: a server of
# the same region answers within 20 ms.
REQUESTS_WITHIN = 0.5


# Seconds for the calls of a worker that is replaced, where their handover was asked for. Ours: hundreds of
# calls take a minute. The others then have grace, as ever.
ALL_WITHIN = 120.0


class Engine:
    """Run `server` until it is told to end.

    `must_refuse` is asked at the last moment before an offer is answered with yes. `report` gets a message
    for whatever the supervisor should know.
    """

    def __init__(
        self,
        server: Any,
        *,
        changed: Condition,
        must_refuse: Callable[[], bool],
        report: Report,
        calls_over: CallsOver,
        is_local: bool = False,
        max_running: int = 0,
        job_memory_limit: int = 0,
        finish: float = DEFAULT_FINISH,
        handover: HandoverSettings | None = None,
        say: Callable[[str, CallHears], bool] = lambda _job, _message: False,
    ) -> None:
        self.server = server
        self.jobs = Jobs(changed, report, self._on_ended)
        self._requests = Requests()
        self.second_jobs = SecondJobs(
            self.jobs,
            changed,
            self._room_service,
            ask=lambda job: self._requests.begin(self._ask_given_up(job)),
            is_closing=lambda: self._requests.is_closing,
        )
        self.handovers = Handovers(
            self.jobs,
            changed,
            self._room_service,
            settings=handover or HandoverSettings(),
            url=lambda: agent_server.url_of(server),
            say=say,
            report=report,
            begin=self._requests.begin,
            is_closing=lambda: self._requests.is_closing,
        )
        self.memory = MemoryWatch(
            self.jobs,
            changed,
            limit=job_memory_limit,
            ask=lambda job, end_at: self._ask(job.executor, end_at),
            kill=lambda job: agent_server.kill(job.executor),
            is_ending=self._is_ending,
        )
        self.terminations = Terminations(
            self.jobs,
            changed,
            finish=finish,
            ask=lambda job, end_at: self._ask(job.executor, end_at),
            kill=lambda job: agent_server.kill(job.executor),
            is_ending=self._is_ending,
            is_stopping=lambda: self._fenced,
        )
        self.worker_id = ""
        self.error: BaseException | None = None
        self.ended = False
        self.started = False
        self.shield_holes: dict[int, str] = {}
        self._calls_over = calls_over
        self._is_local = is_local
        self._max_running = max_running
        self._finish = finish
        self._told_full = False
        self._fenced = False
        self._held = False
        self._changed = changed
        self._report = report
        self._must_refuse = must_refuse
        self._run: asyncio.Task[None] | None = None
        self._warming = Warming(
            server, changed=changed, report=report, start_failed=self._on_first_process_failed
        )
        agent_server.gate_requests(server, admit=self._admit, settle=self._settle)
        agent_server.take_terminations(server, self.terminations.take)

    # -- life -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the server to its end; an error is kept in `error`, and a caller decides what it means."""
        refused_key.watch()
        self._run = asyncio.current_task()
        self.server.on("worker_started", self._on_started)
        self.server.on("worker_registered", self._on_registered)
        self._warming.begin()
        try:
            async with asyncio.TaskGroup() as self._announcements:
                await self._run_server()
        finally:
            self.ended = True
            self._changed.notify()

    async def _run_server(self) -> None:
        try:
            await self.server.run(devmode=False)
        except asyncio.CancelledError:
            if not self._fenced and self.error is None:
                raise
        except Exception as error:  # the user's or livekit's; the host reports it, with its text
            self.error = self.error or error

    @property
    def is_registered(self) -> bool:
        return self.worker_id != "" and agent_server.is_connected(self.server)

    @property
    def is_lost(self) -> bool:
        """Whether the start has failed, or livekit-agents has given the connection up for good."""
        return self.ended or self.error is not None or agent_server.has_given_up(self.server)

    @property
    def accepts(self) -> bool:
        """Whether offers would be answered with yes, and the server knows it."""
        return self.is_registered and not self._fenced and not self._told_full and not self.full_because

    @property
    def is_warm(self) -> bool:
        """Whether a process has been ready for a job."""
        return self._warming.was_warm

    @property
    def is_at_cap(self) -> bool:
        return 0 < self._max_running <= len(self.jobs)

    @property
    def is_cold(self) -> bool:
        """Whether a job would find no process.

        Either no process gets ready, or registration could not wait for the first one.
        """
        return self._warming.is_cold or (self.worker_id != "" and not self.is_warm)

    @property
    def is_full(self) -> bool:
        """Whether no offer would be answered with yes; livekit-agents itself looks at the load."""
        return self._fenced or self._held or self.is_cold or self.is_at_cap

    @property
    def full_because(self) -> FullReason | None:
        """Why the worker takes no job, the fence left out; of several reasons the one that lasts longest."""
        if self._held:
            return "hold"
        if self.is_cold:
            return "cold"
        if self.is_at_cap:
            return "cap"
        return "load" if self.started and process_pool.is_full_by_load(self.server) else None

    @property
    def load(self) -> float:
        return agent_server.load_of(self.server)

    # -- the stop -------------------------------------------------------------------------------------

    async def fence(self) -> None:
        """Answer no offer with yes any more, for good, and tell the server."""
        self._fenced = True
        self._warming.end()
        if not self.ended:
            self._told_full = True
            await agent_server.announce(self.server, full=True)

    def hold(self, on: bool) -> None:
        """Answer no offer with yes for as long as the hold lasts; `keep_told` tells the server."""
        self._held = on
        self._changed.notify()

    async def keep_told(self) -> None:
        """Tell the server at once whenever the worker has become full, or is no longer. Runs for ever.

        livekit-agents itself says so every 2.5 s, and some modes of it never.
        """
        while True:
            await self._changed.until(lambda: self.is_full is not self._told_full)
            full = self.is_full
            if not self.ended:
                await agent_server.announce(self.server, full=full)
                await agent_server.flush(self.server)
            self._told_full = full
            self._changed.notify()

    async def end_jobs(
        self, kill_at: float, give_up_at: float, due_at: Callable[[str], float] = lambda _job: 0.0
    ) -> None:
        """Ask every job to shut down, kill at `kill_at` what has not, and have every end reported.

        `due_at` gets the id of a job and returns the time before which the job is not asked.
        """
        asked: set[str] = set()
        self._take_calls_over()

        def unasked() -> list[Job]:
            return [job for job in self.jobs.running if job.id not in asked and due_at(job.id) <= now()]

        def next_at() -> float:
            return min([kill_at, *(due_at(job.id) for job in self.jobs.running if job.id not in asked)])

        async with asyncio.TaskGroup() as group:
            asking = []
            while len(self.jobs):
                for job in unasked():
                    asked.add(job.id)
                    self.handovers.note_late(job, is_last=False)
                    if not (self._is_ending(job) or job.has_ended):
                        self.jobs.cut_short(job)
                        asking.append(group.create_task(self._ask(job.executor, kill_at)))
                # A job whose process was still starting is asked as soon as it runs.
                await self._changed.until(lambda: not len(self.jobs) or unasked(), next_at)
                if now() >= kill_at:
                    break
            self._take_calls_over()
            for job in self.jobs.running:
                self.handovers.note_late(job, is_last=True)
            await self._end_processes(self.jobs.outliving)
            for job in self.jobs.running:
                if not job.was_killed:
                    if not (job.is_over or job.has_ended):
                        self.jobs.cut_short(job)
                    agent_server.kill(job.executor)
            await self._changed.until(lambda: not self.jobs.running, lambda: give_up_at)
            for task in asking:
                task.cancel()
        for job in self.jobs:
            if (
                job.was_told_to_end or not job.is_over
            ):  # of the others the server was told that they ended well
                await agent_server.report_failed(self.server, job.id)
        self.jobs.abandon()

    async def see_processes_out(self) -> None:
        """Kill each process that outlives its call by EXIT_WITHIN. Runs for ever."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._calls_over.fileno(), self._take_calls_over)
        try:
            while True:
                await self._changed.until(self._overdue, self._next_due_at)
                await self._end_processes(self._overdue())
        finally:
            loop.remove_reader(self._calls_over.fileno())

    def _take_calls_over(self) -> None:
        for told in self._calls_over.take():
            if told.what == "over":
                self.jobs.over(told.job_id, agent_server.call_is_over)
            else:
                self.jobs.in_room(told.job_id, told.what, told.reason, told.detail, self._is_ending)
                job = self.jobs.get(told.job_id)
                if job is not None and job.was_evicted:
                    log.warning(
                        "an agent is out of its room: another participant has joined with its identity",
                        extra={"job_id": job.id, "room": job.room, "identity": job.presence.identity},
                    )

    def _overdue(self) -> list[Job]:
        return [job for job in self.jobs.outliving if _due_at(job) <= now()]

    def _next_due_at(self) -> float | None:
        return min((_due_at(job) for job in self.jobs.outliving), default=None)

    async def _end_processes(self, jobs: list[Job]) -> None:
        """Kill processes whose calls are over, once the server was told of the good ends."""
        for job in jobs:
            job.was_killed = True
            log.warning("the process of a call that is over is killed", extra={"job_id": job.id})
        good = [job for job in jobs if not job.was_told_to_end]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TELL_WITHIN):
                for job in good:
                    await agent_server.report_succeeded(self.server, job.id)
                if good:
                    await agent_server.flush(self.server)
        for job in jobs:
            agent_server.kill(job.executor)
            if job.pid == os.getpid():
                self.jobs.let_go(job)

    async def close(self, deadline: float) -> Counts:
        """Close the connection, then the processes that run no job; those are killed, nothing is lost.

        The queue for the server, above all the ends of jobs, is sent first.
        """
        self._requests.is_closing = True
        self._changed.notify()
        await agent_server.flush(self.server)
        await self._requests.end(max(0.0, min(REQUESTS_WITHIN, deadline - now())))
        dropped = agent_server.drop_requests(self.server)
        if dropped:
            log.warning("request_fnc was still running and is cancelled", extra={"calls": dropped})
        killed = agent_server.let_go_of_processes(self.server)
        if self.started:
            await self.server.aclose()
        elif self._run is not None:
            # The server's lock is held until it has started, so aclose() would wait for the start.
            self._run.cancel()
        await self._changed.until(lambda: self.ended, lambda: deadline)
        return {"idle_processes": {"killed": killed}}

    def _is_ending(self, job: Job) -> bool:
        """Tell whether a job shuts down: by itself, or because this worker has told it to.

        livekit-agents begins to shut a job down when the room is gone.
        """
        if job.is_over or job.was_told_to_end or job.presence.asked_at or job.presence.left_at:
            return True
        return agent_server.is_ending(job.executor)

    async def _ask(self, executor: Any, kill_at: float) -> None:
        try:
            await agent_server.ask_to_end(executor, max(0.0, kill_at - now()))
        except Exception as error:  # the job's pipe may break at any moment; the kill does not depend on it
            self._report(JobNotAsked(error=shortened(repr(error))))

    async def _ask_given_up(self, job: Job) -> None:
        """Ask a job to shut down whose agent comes back to a room that another agent has taken over."""
        if self._is_ending(job):
            return
        job.presence.asked_at = now()
        self.jobs.cut_short(job)
        self._changed.notify()
        await self._ask(job.executor, now() + self._finish)

    def hand_over(self, id: str, reason: str) -> None:
        """Have a job go on elsewhere; with an empty id every job, once the worker takes no more."""
        job = self.jobs.get(id)
        if not id:
            self._requests.begin(self._hand_over_all(reason))
        elif job is None:
            self._report(JobHandover(id=id, result="refused", reason="not possible: the job has ended"))
        else:
            self._requests.begin(self._hand_over(job, reason))

    def hand_over_before(
        self, drain_at: Callable[[], float | None], late_at: Callable[[], float | None]
    ) -> None:
        """Have the calls go on elsewhere that a stop would cut, or that are yet to come here."""
        self.handovers.give_back()
        self._requests.begin(self.handovers.before(drain_at, late_at))
        self._changed.notify()  # those whose handover was asked for wait for the fence

    async def _hand_over_all(self, reason: str) -> None:
        until = now() + ALL_WITHIN
        await self._changed.until(lambda: self._fenced or self._requests.is_closing, lambda: until)
        await self.handovers.hand_over_all(reason, lambda: until)

    async def _hand_over(self, job: Job, reason: str) -> None:
        await self.handovers.hand_over(job, reason)

    # -- what livekit-agents tells --------------------------------------------------------------------

    def _admit(self, job: Any, found: Succession | None) -> Answer:
        if self.is_full or self._must_refuse():
            return "no"
        if found is not None:
            if self.handovers.is_taken(found):
                return "never"
        elif self.second_jobs.is_second(job):
            self._requests.begin(self.second_jobs.see_back(job))
            return "never"
        self.jobs.accept(job, found)
        return "yes"

    def _room_service(self) -> RoomService | None:
        """Return the way to ask the LiveKit server; None without a URL or a key."""
        url, names = agent_server.url_of(self.server), ("LIVEKIT_API_KEY", "LIVEKIT_API_SECRET")
        key, secret = (os.environ.get(name, "") for name in names)
        return RoomService(url, key, secret, os.environ) if url and key and secret else None

    def _on_ended(self, job: Job) -> None:
        self.handovers.forget(job.id)
        if job.presence.is_in_room and job.presence.sid:
            self._requests.begin(self._remove_ghost(job))

    async def _remove_ghost(self, job: Job) -> None:
        """Take the agent of a job that has died out of its room; the server would show it for 20 s more."""
        service = self._room_service()
        if service is None:
            return
        extra = {"job_id": job.id, "room": job.room}
        try:
            if await service.remove(job.room, job.presence.identity, job.presence.sid):
                log.info("the agent of a job that has died is removed from its room", extra=extra)
        except RoomServiceError as error:
            log.warning(
                "the agent of a job that has died can't be removed from its room",
                extra={**extra, "error": str(error)},
            )

    def _settle(self, id: str, error: BaseException | None) -> None:
        fate: JobFate | None = None
        if error is not None:
            fate = "unassigned" if agent_server.is_unassigned(error) else "failed"
        if (
            fate == "failed" and not self.ended
        ):  # the server would count the job as running while this worker lives
            self._announcements.create_task(agent_server.report_failed(self.server, id))
        self.jobs.settle(id, fate)

    def _on_started(self) -> None:
        try:
            preflight.check_running(self.server)
        except Incompatible as error:
            # Nothing of the connection has run yet: its task was made in this turn of the loop.
            self.error = error
            agent_server.cancel_start()
            return
        self.started = True
        if self._is_local:
            agent_server.connect_directly(self.server)
        agent_server.watch_jobs(self.server, launched=self._on_launched, closed=self._on_closed)
        agent_server.watch_processes(self.server, self._on_process)
        for executor in agent_server.executors(self.server):
            self._check_shield(executor)
        self._changed.notify()

    def _on_registered(self, worker_id: str, _info: Any) -> None:
        self.worker_id = worker_id
        # The connection counts as up only once this handler has returned, and a new connection is an
        # available worker to the server: one that is fenced or held has to say so again at once.
        asyncio.get_running_loop().call_soon(self._after_registered)

    def _after_registered(self) -> None:
        if self.is_full and not self.ended:
            self._announcements.create_task(agent_server.announce(self.server, full=True))
        self._report(Ready(worker_id=self.worker_id, warm=self.is_warm))
        self._changed.notify()

    def _on_process(self, executor: Any) -> None:
        self._check_shield(executor)
        self._changed.notify()

    def _on_first_process_failed(self, reason: str) -> None:
        self.error = StartError(f"its first job process did not get ready: {reason}")

    def _on_launched(self, executor: Any) -> None:
        self._check_shield(executor)
        job = agent_server.job_of(executor)
        if job is not None:
            self.jobs.launch(job.id, executor, job)

    def _on_closed(self, executor: Any) -> None:
        self._take_calls_over()
        job = agent_server.job_of(executor)
        if job is not None:
            self.jobs.close(job.id, executor)

    def _check_shield(self, executor: Any) -> None:
        pid = getattr(executor, "pid", None)
        if pid is None or pid == os.getpid():
            return
        for each in (pid, *agent_server.forkserver_pids()):
            holes = unshielded(each)
            if holes and each not in self.shield_holes:
                names = ", ".join(sorted(number.name for number in holes))
                self.shield_holes[each] = names
                self._report(ShieldOpen(pid=each, open_to=names))


def _due_at(job: Job) -> float:
    """Return by when the process of a call that is over has to have ended."""
    assert job.over_at is not None
    return job.over_at + EXIT_WITHIN
