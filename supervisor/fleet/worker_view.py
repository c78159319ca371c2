"""The messages of one worker, as one picture of its state. No code here decides anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, assert_never

from lastcall.supervisor.receipt import EntryFate, JobEntry, Ledger, ResourceEntry, StopRecord
from lastcall.worker.base.clock import now
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.records import dataclass
from lastcall.worker.base.wire import (
    Beat,
    Drained,
    Fault,
    Fenced,
    HandoverOff,
    Imported,
    JobCut,
    JobEnded,
    JobFate,
    JobHandover,
    JobKeeps,
    JobLeft,
    JobNotAsked,
    JobOver,
    JobStarted,
    Loaded,
    MetricsText,
    ProcessFailed,
    Ready,
    Resource,
    ShieldOpen,
    WorkerSays,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastBeat:
    """The last sign of life of a worker, and when the supervisor read it.

    A figure is None until the worker has told it.
    """

    at: float
    lag_ms: float | None = None
    load: float | None = None
    rss_bytes: int | None = None
    registered: bool = False
    accepting: bool = False
    warm: bool = False
    full: str = ""


class WorkerView:
    """The state of one generation of a slot, as it tells it. Jobs go to the ledger, faults to the log."""

    def __init__(self, slot: int, generation: int, *, ledger: Ledger, record: StopRecord, log: Any) -> None:
        self.worker_id = ""
        self.agent_name = ""
        self.is_loaded = False
        self.imported: set[str] = set()
        self.beat: LastBeat | None = None
        self.fenced_at: float | None = None
        self.fence_reason = ""
        self.is_drained = False
        self.fault = ""
        self.is_config_error = False
        self.jobs_started = 0
        self.process_failures = 0
        self.process_failure = ""
        self.metrics = ""
        self.metrics_asked = self.metrics_told = 0
        # Resources go into the receipt only when the worker closes as a part of the supervisor's own stop.
        self.counts_for_receipt = False
        self._slot = slot
        self._generation = generation
        self._ledger = ledger
        self._record = record
        self._log = log

    def take(self, message: WorkerSays) -> None:
        """Take one message."""
        match message:
            case Loaded(agent_name=agent_name):
                self.agent_name = agent_name
                self.is_loaded = True
            case Imported(files=files):
                self.imported.update(files)
            case Ready():
                self.worker_id = message.worker_id
                # The beat that follows at once says whether the worker accepts: a candidate is on hold. An
                # old worker that went too early would leave a moment in which nobody takes an offer.
                self._shows_life(registered=True, accepting=False, warm=message.warm, full="")
            case Beat():
                self.beat = LastBeat(
                    at=now(),
                    lag_ms=message.lag_ms,
                    load=message.load,
                    rss_bytes=message.rss_bytes,
                    registered=message.registered,
                    accepting=message.accepting and self.fenced_at is None,
                    warm=message.warm,
                    full=message.full,
                )
            case ProcessFailed(failures=failures, reason=reason):
                self.process_failures, self.process_failure = failures, reason
                self._log.warning("job process failed", failures=failures, reason=reason)
            case JobStarted():
                self._start(message)
            case JobOver(id=id):
                self._ledger.over(self._slot, self._generation, id)
            case JobLeft(id=id):
                self._ledger.left(self._slot, self._generation, id)
            case JobCut(id=id):
                self._ledger.cut(self._slot, self._generation, id, now())
            case JobKeeps(id=id, size=size, kept_at=kept_at, lacks=lacks):
                self._ledger.keeps(self._slot, self._generation, id, size, kept_at, lacks)
            case JobHandover():
                self._handover(message)
            case HandoverOff():  # the generation writes the log
                pass
            case JobEnded():
                self._end(message)
            case Fenced(reason=reason, at=at):
                self.fenced_at = at
                self.fence_reason = reason
                if self.beat is not None:
                    self._shows_life(accepting=False, full="")
            case Drained():
                self.is_drained = True
            case Resource(name=name, fate=fate, counts=counts):
                if self.counts_for_receipt:
                    entry = ResourceEntry(name=name, fate=fate, slot=self._slot, counts=counts)
                    self._record.resources.append(entry)
            case MetricsText(id=id, text=text):
                self.metrics = text
                self.metrics_told = id
            case ShieldOpen(pid=pid, open_to=open_to):
                self._log.error("shield does not hold", pid=pid, open_to=open_to)
            case JobNotAsked(error=text):
                self._log.warning("job could not be asked to end", error=text)
            case Fault():
                self.fault = message.message
                self.is_config_error = message.exit == Exit.CONFIG
            case _:
                assert_never(message)

    def _shows_life(self, **changes: Any) -> None:
        """Note a sign of life that has no figures: those of the last beat stay."""
        self.beat = replace(self.beat or LastBeat(at=0.0), at=now(), **changes)

    def _start(self, job: JobStarted) -> None:
        entry = JobEntry(
            id=job.id,
            room=job.room,
            dispatch_id=job.dispatch_id,
            slot=self._slot,
            generation=self._generation,
            accepted_at=job.accepted_at,
            pid=job.pid,
            room_sid=job.room_sid,
            agent_name=job.agent_name,
        )
        self.jobs_started += self._ledger.start(entry)

    def _handover(self, job: JobHandover) -> None:
        where = (self._slot, self._generation, job.id)
        self._ledger.handover(*where, job.result, job.reason, job.successor)
        if job.result == "done":
            self._log.info("call handed over", job_id=job.id, successor=job.successor)
        else:
            self._log.warning("call not handed over", job_id=job.id, reason=job.reason)

    def _end(self, job: JobEnded) -> None:
        where = (self._slot, self._generation, job.id)
        fate: EntryFate | JobFate = "ended_by_server" if job.by_server else job.fate
        if job.successor:
            fate = "handed_over"
        self._ledger.end(*where, fate, job.seconds, process=job.process, callbacks=job.callbacks)
        if job.process:
            self._log.warning("process outlived its call", job_id=job.id, process=job.process)
        if job.fate == "cut":
            self._log.warning("job cut", job_id=job.id, seconds=job.seconds)
