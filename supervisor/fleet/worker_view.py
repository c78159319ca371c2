"""What one worker has said of itself, as it stands. Nothing here decides anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lastcall.supervisor.receipt import JobEntry, Ledger, ResourceEntry, StopRecord
from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import Message

EX_CONFIG = 78


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """The last sign of life of a worker."""

    at: float
    lag_ms: float = 0.0
    load: float = 0.0
    rss_bytes: int = 0
    registered: bool = False
    accepting: bool = False
    warm: bool = False


class Reports:
    """The words of one generation of one slot; its jobs go to the ledger, its faults to the log."""

    def __init__(self, slot: int, generation: int, *, ledger: Ledger, record: StopRecord, log: Any) -> None:
        self.worker_id = ""
        self.agent_name = ""
        self.sdk = ""
        self.is_loaded = False
        self.beat: Beat | None = None
        self.fenced_at: float | None = None
        self.fence_reason = ""
        self.is_drained = False
        self.fault = ""
        self.is_config_error = False
        self.jobs_started = 0
        self.metrics = ""
        self.metrics_asked = self.metrics_told = 0
        # Resources go into the receipt only when the worker closes as a part of the supervisor's own stop.
        self.counts_for_receipt = False
        self._slot = slot
        self._generation = generation
        self._ledger = ledger
        self._record = record
        self._log = log

    def take(self, message: Message) -> None:
        """Take one message; unknown types are of a newer worker, and no concern of ours."""
        handle = getattr(self, f"_on_{message['type']}", None)
        if handle is not None:
            handle(message)

    def _on_loaded(self, message: Message) -> None:
        self.agent_name = str(message.get("agent_name", ""))
        self.sdk = str(message.get("sdk", ""))
        self.is_loaded = True

    def _on_ready(self, message: Message) -> None:
        self.worker_id = str(message["worker_id"])
        # A worker that is held, or fenced, says so with its next beat, which follows at once.
        accepting = self.fenced_at is None
        self.beat = Beat(at=now(), registered=True, accepting=accepting, warm=bool(message.get("warm")))

    def _on_beat(self, message: Message) -> None:
        self.beat = Beat(
            at=now(),
            lag_ms=float(message["lag_ms"]),
            load=float(message["load"]),
            rss_bytes=int(message["rss_bytes"]),
            registered=bool(message["registered"]),
            accepting=bool(message["accepting"]) and self.fenced_at is None,
            warm=bool(message.get("warm", True)),
        )

    def _on_job_started(self, message: Message) -> None:
        job = message["job"]
        entry = JobEntry(
            id=str(job["id"]),
            room=str(job["room"]),
            dispatch_id=str(job["dispatch_id"]),
            slot=self._slot,
            generation=self._generation,
            accepted_at=float(job["accepted_at"]),
            pid=job["pid"],
        )
        self.jobs_started += self._ledger.start(entry)

    def _on_job_ended(self, message: Message) -> None:
        fate = str(message["fate"])
        seconds = float(message["seconds"])
        self._ledger.end(self._slot, self._generation, str(message["id"]), fate, seconds)
        if fate in ("cut", "lost"):
            self._log.warning("job " + fate, job_id=message["id"], seconds=message["seconds"])

    def _on_fenced(self, message: Message) -> None:
        self.fenced_at = float(message.get("at", now()))
        self.fence_reason = str(message.get("reason", ""))
        if self.beat is not None:
            self.beat = Beat(at=now(), registered=self.beat.registered)

    def _on_drained(self, _message: Message) -> None:
        self.is_drained = True

    def _on_resource(self, message: Message) -> None:
        if not self.counts_for_receipt:
            return
        entry = ResourceEntry(
            name=str(message["name"]),
            fate=message["fate"],
            slot=self._slot,
            counts=dict(message["counts"]),
        )
        self._record.resources.append(entry)

    def _on_metrics(self, message: Message) -> None:
        self.metrics = str(message["text"])
        self.metrics_told = int(message["id"])

    def _on_shield(self, message: Message) -> None:
        self._log.error("shield does not hold", pid=message.get("pid"), open_to=message.get("open_to"))

    def _on_log(self, message: Message) -> None:
        fields = {k: v for k, v in message.items() if k not in ("type", "v", "event")}
        self._log.warning(str(message.get("event", "worker says")), **fields)

    def _on_fault(self, message: Message) -> None:
        self.fault = str(message["message"])
        self.is_config_error = message.get("exit") == EX_CONFIG
