"""The jobs of one worker, from the yes to the end of the process.

A job is accepted (the server was told yes), launched (a process runs it) and ended. It has ended when
livekit-agents says that its process closed *and* the process is gone by its pidfd: when the forkserver is
killed, livekit-agents takes jobs that live on for ended ones.

    accepted --launched--> running --closed and gone--> finished | failed | cut
        |--no assignment came--> unassigned          |--its worker died--> lost (the supervisor's word)
        |--could not be launched--> failed
        |--no process by the deadline--> cut

A call is over when its job says so (`base.calls_over`), after the last callback; then its process has
EXIT_WITHIN. The fate is the call's: a process that is kept by a thread, or crashes at its exit, changes
nothing about a call that had ended by itself, and is only noted (`process`).

A job whose call goes on in another one (`worker.handovers`) is `finished`, and told with its successor,
however it ends then.

A successor that leaves before it has the call is `finished`: the call stays where it is.

A job that the owner of its room ends is `finished`, and told as ended by the server (`worker.presence`).

A job that is ended for its memory (`worker.job_memory`) is `failed`, as one is that the kernel kills for it.

A job whose agent another participant of the same identity has thrown out of the room is `cut`, unless the job
had begun to shut down by itself.

`cut` is every job that this worker ended. A job that was told to shut down while its entrypoint had more to
do is cut, even if the agent then shuts down in order. A job that had begun to shut down by itself is not
told, and ends as it would have. Such a job is cut only when it has to be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.succession import Succession
from lastcall.worker.base.wire import JobCut, JobEnded, JobFate, JobLeft, JobOver, JobStarted
from lastcall.worker.presence import EVICTED, Presence

# multiprocessing's exit code for a process whose status went with the forkserver.
STATUS_LOST = 255
# Characters of a name that are told. Ours: a message has a bound (`wire.MAX_LINE_BYTES`), and no job is
# refused for the length of its name.
MAX_NAME_LENGTH = 1024
# Seconds that the process of a job has to exit once its call is over. As livekit-agents gives one that it has
# asked to end (`shutdown_process_timeout`, ipc/supervised_proc.py:345).
EXIT_WITHIN = 10.0


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One accepted dispatch. Times are readings of the monotonic clock.

    `epoch`: of the last try to hand over the call. `successor`: the job in which the call goes on.
    """

    id: str
    room: str
    dispatch_id: str
    accepted_at: float
    room_sid: str = ""
    agent_name: str = ""
    succession: Succession | None = None
    epoch: int = 0
    successor: str = ""
    type: int = 0
    pid: int | None = None
    executor: Any = None
    answers: int = 0
    launched: bool = False
    closed: bool = False
    gone: bool = False
    cut_short: bool = False
    exit_code: int | None = None
    pidfd: int | None = None
    over_at: float | None = None
    popen: Any = None
    was_killed: bool = False
    over_memory: bool = False
    was_evicted: bool = False
    has_withdrawn: bool = False
    presence: Presence = field(default_factory=Presence)

    @property
    def has_ended(self) -> bool:
        """Whether its process has, by the kernel: the loop may be too busy to have noticed an end yet."""
        if self.pidfd is None:
            return self.gone
        looking = select.poll()
        looking.register(self.pidfd, select.POLLIN)
        return bool(looking.poll(0))

    @property
    def has_exited(self) -> bool:
        """Whether its process has; the thread of the thread executor is none, and can't be looked at."""
        return self.pid != os.getpid() and self.has_ended

    @property
    def has_process(self) -> bool:
        """Whether the job has a process, and does not run in a thread of the worker."""
        return self.pid is not None and self.pid != os.getpid()

    @property
    def asked(self) -> Any:
        """The job as the LiveKit server has described it, while it runs."""
        return self.executor.running_job.job

    @property
    def callbacks(self) -> str:
        """Whether the job was ended after its call had gone on elsewhere, before its callbacks were done."""
        return "killed" if self.successor and self.was_told_to_end and not self.is_over else ""

    @property
    def fate(self) -> JobFate:
        if self.successor:
            return "finished"
        if self.over_memory:
            return "failed"
        if self.cut_short or self.was_evicted:
            return "finished" if self.has_withdrawn else "cut"
        return "finished" if self.is_over or self.exit_code == 0 else "failed"

    @property
    def is_ended_by_server(self) -> bool:
        """Whether the owner of the room has ended the job: the room is deleted, the agent removed."""
        return self.presence.is_ended_by_server and self.fate == "finished"

    def withdraw(self) -> None:
        """Note that this job leaves a call to its predecessor. One that was told to end before is cut."""
        self.has_withdrawn = self.has_withdrawn or not self.was_told_to_end

    @property
    def was_told_to_end(self) -> bool:
        """Whether this worker has ended the call, and not the call itself."""
        return self.cut_short or self.over_memory

    @property
    def is_over(self) -> bool:
        """Whether the call is, and not the process yet."""
        return self.over_at is not None

    @property
    def process(self) -> str:
        """How the process ended, when that was not as its call did."""
        if not self.is_over or self.was_told_to_end:
            return ""
        if self.was_killed:
            return "killed"
        code: int | None = getattr(self.popen, "returncode", None)
        if code is None or code in (0, STATUS_LOST):
            return ""
        if code > 0:
            return f"exit code {code}"
        known = -code in signal.valid_signals() and -code < signal.SIGRTMIN
        return f"killed by {signal.Signals(-code).name if known else f'signal {-code}'}"


class Jobs:
    """The register of accepted and running jobs; `report` is called at each beginning and each end."""

    def __init__(
        self,
        changed: Condition,
        report: Callable[[JobStarted | JobOver | JobLeft | JobCut | JobEnded], None],
        ended: Callable[[Job], None] = lambda _job: None,
    ) -> None:
        self._jobs: dict[str, Job] = {}
        self._changed = changed
        self._report = report
        self._ended = ended
        self.cut = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Any:
        return iter(list(self._jobs.values()))

    def get(self, id: str) -> Job | None:
        return self._jobs.get(id)

    def __contains__(self, job: object) -> bool:
        return isinstance(job, Job) and self._jobs.get(job.id) is job

    @property
    def running(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.launched]

    def accept(self, job: Any, found: Succession | None = None) -> None:
        """Count a job from before the yes is sent. `found`: the handover that it was dispatched for."""
        record = self._jobs.get(job.id)
        if record is None:
            record = Job(
                id=job.id,
                room=job.room.name[:MAX_NAME_LENGTH],
                dispatch_id=job.dispatch_id[:MAX_NAME_LENGTH],
                accepted_at=now(),
                room_sid=getattr(job.room, "sid", "")[:MAX_NAME_LENGTH],
                agent_name=getattr(job, "agent_name", "")[:MAX_NAME_LENGTH],
                succession=found,
                epoch=0 if found is None else found.epoch,
                type=getattr(job, "type", 0),
            )
            self._jobs[job.id] = record
            self._tell_started(record)
        # The server may offer one job twice, when the first answer was too late for it.
        record.answers += 1

    def launch(self, id: str, executor: Any, job: Any) -> None:
        """A process has been given the job; also for jobs that no dispatch brought."""
        if id not in self._jobs:
            self.accept(job)
        record = self._jobs[id]
        record.launched = True
        record.executor = executor
        record.pid = getattr(executor, "pid", None) or os.getpid()
        if record.pid == os.getpid():
            record.gone = True
        else:
            self._watch(record)
        self._tell_started(record)

    def settle(self, id: str, fate: JobFate | None) -> None:
        """The accept has returned: None when the job runs, else what became of it instead."""
        record = self._jobs.get(id)
        if record is None:
            return
        record.answers -= 1
        if fate is not None and not record.launched and not record.answers:
            self._end(record, fate)

    def over(self, id: str, count_as_good: Callable[[Any], Any]) -> None:
        """The job says that its call is over. `count_as_good` gets the executor, if the call ended itself."""
        record = self._jobs.get(id)
        if record is None or record.is_over:
            return
        record.over_at = now()
        if not record.was_told_to_end:
            record.popen = count_as_good(record.executor)
            if not record.was_evicted:
                self._report(JobOver(id=id))
        self._changed.notify()

    def in_room(
        self,
        id: str,
        what: str,
        reason: int,
        detail: str,
        is_ending: Callable[[Job], bool] = lambda _job: False,
    ) -> None:
        """The job says what becomes of its room. `is_ending` tells whether a job shuts down already."""
        record = self._jobs.get(id)
        if record is not None:
            record.was_evicted = what == "left" and reason == EVICTED and not is_ending(record)
            record.presence.take(what, reason, detail, now())
            if what == "joined" and record.presence.asked_at is not None:
                self.cut_short(record)  # asked as one that has not joined
            if what == "left":
                self._report(JobLeft(id=id))
            self._changed.notify()

    def cut_short(self, record: Job) -> None:
        """End a job while it has more to do: its fate is certain from now on.

        A job that was told to end for its memory will be failed. A count of cut jobs that rose for such a job
        would fall at its end, and Prometheus would take that for a reset.
        """
        if not record.was_told_to_end:
            record.cut_short = True
            if not (record.successor or record.has_withdrawn):
                self._report(JobCut(id=record.id))

    @property
    def outliving(self) -> list[Job]:
        """The jobs whose calls are over, and whose processes still run and were not killed."""
        return [job for job in self if job.is_over and not job.was_killed and not job.has_exited]

    def close(self, id: str, executor: Any) -> None:
        """livekit-agents says that the job's process has ended."""
        record = self._jobs.get(id)
        if record is None or record.executor is not executor:
            return
        record.closed = True
        record.exit_code = getattr(executor, "exitcode", None)
        if record.exit_code is None and record.pid == os.getpid():
            record.exit_code = 0 if str(getattr(executor.status, "value", "")) == "success" else 1
        self._end_if_over(record)

    def let_go(self, job: Job) -> None:
        """Count a job as ended whose call is over, and whose thread can't be ended."""
        if job.id in self._jobs:
            self._end(job, job.fate)

    def abandon(self) -> None:
        """Write off what is still accepted or running: this worker is about to end."""
        for record in list(self._jobs.values()):
            has_ended = record.is_over or (record.launched and record.has_ended)
            is_known = has_ended or record.was_told_to_end or record.successor
            self._end(record, record.fate if is_known else "cut")

    def _watch(self, record: Job) -> None:
        assert record.pid is not None
        try:
            record.pidfd = os.pidfd_open(record.pid)
        except ProcessLookupError:
            record.gone = True
            return
        asyncio.get_running_loop().add_reader(record.pidfd, self._is_gone, record)

    def _is_gone(self, record: Job) -> None:
        record.gone = True
        self._unwatch(record)
        self._end_if_over(record)

    def _unwatch(self, record: Job) -> None:
        if record.pidfd is not None:
            asyncio.get_running_loop().remove_reader(record.pidfd)
            with contextlib.suppress(OSError):
                os.close(record.pidfd)
            record.pidfd = None

    def _end_if_over(self, record: Job) -> None:
        if record.closed and record.gone and record.id in self._jobs:
            self._end(record, record.fate)

    def _end(self, record: Job, fate: JobFate) -> None:
        del self._jobs[record.id]
        self._unwatch(record)
        self.cut += fate == "cut"
        seconds = round(now() - record.accepted_at, 3)
        ended = JobEnded(
            id=record.id,
            fate=fate,
            seconds=seconds,
            process=record.process,
            by_server=fate == "finished" and record.is_ended_by_server and not record.successor,
            successor=record.successor,
            callbacks=record.callbacks,
        )
        self._report(ended)
        self._changed.notify()
        self._ended(record)

    def _tell_started(self, record: Job) -> None:
        self._report(
            JobStarted(
                id=record.id,
                room=record.room,
                dispatch_id=record.dispatch_id,
                accepted_at=record.accepted_at,
                pid=record.pid,
                room_sid=record.room_sid,
                agent_name=record.agent_name,
            )
        )
        self._changed.notify()
