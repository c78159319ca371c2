"""The ledger: every job that the workers told of, and how it ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Literal

from lastcall.worker.base.records import dataclass
from lastcall.worker.base.wire import HandoverResult, JobFate

# How a job in the receipt ended. A worker tells all but the last. The supervisor notes a job as lost when its
# worker ended without a word about the job.
EntryFate = Literal["finished", "failed", "cut", "ended_by_server", "handed_over", "lost"]
# Jobs with a capsule that are remembered after their end: a successor may be seen late, and `lastcall
# handover` names it. Ours: more than a stop of a large worker hands over.
MAX_KEPT = 1000


@dataclass(slots=True, kw_only=True)
class JobEntry:
    """One accepted job. `accepted_at` is monotonic; `fate` is None while the job runs.

    `is_over`: the call has ended by itself, and only its process is left. `process` says how that ended when
    it did not end well by itself. `has_left`: its agent is not in its room any more. `is_cut`: the job was
    asked to shut down at `asked_at`, so its fate is certain.

    `capsule_bytes` and `kept_at` are those of `call.keep`, None without. `lacks`: why the agent can't hand
    the call over. `tries`: how often that was tried, and `handover` how the last try failed. `successor`: the
    job in which the call goes on. `callbacks`: how those of such a job ended, when not by themselves.
    """

    id: str
    room: str
    dispatch_id: str
    slot: int
    generation: int
    accepted_at: float
    room_sid: str = ""
    agent_name: str = ""
    pid: int | None = None
    fate: EntryFate | None = None
    seconds: float = 0.0
    is_over: bool = False
    has_left: bool = False
    is_cut: bool = False
    asked_at: float | None = None
    process: str = ""
    capsule_bytes: int | None = None
    kept_at: float = 0.0
    lacks: str = ""
    tries: int = 0
    handover: str = ""
    successor: str = ""
    callbacks: str = ""


class Ledger:
    """Running jobs by slot, generation and id, the totals, and the jobs of the stop once it has begun."""

    def __init__(self) -> None:
        self.running: dict[tuple[int, int, str], JobEntry] = {}
        self.started = 0
        self.totals: dict[JobFate | EntryFate, int] = {
            "finished": 0, "failed": 0, "cut": 0, "lost": 0, "ended_by_server": 0, "handed_over": 0,
            "unassigned": 0,
        }  # fmt: skip
        self.handovers: Counter[HandoverResult] = Counter()
        self._at_stop: list[JobEntry] | None = None
        # The last jobs that ended and had a capsule, and the fates that were changed later.
        self._kept: dict[tuple[int, int, str], JobEntry] = {}
        self._retold: Counter[EntryFate] = Counter()

    def start(self, entry: JobEntry) -> bool:
        """Note a job, or the pid of a job that was noted as accepted before; tell whether the job is new."""
        key = (entry.slot, entry.generation, entry.id)
        known = self.running.get(key)
        if known is not None:
            known.pid = entry.pid
            return False
        self.running[key] = entry
        self.started += 1
        if self._at_stop is not None:
            self._at_stop.append(entry)
        return True

    def over(self, slot: int, generation: int, id: str) -> None:
        """Note that the call of a job has ended by itself, whatever becomes of its process."""
        entry = self.running.get((slot, generation, id))
        if entry is not None:
            entry.is_over = True

    def left(self, slot: int, generation: int, id: str) -> None:
        """Note that the agent of a job has left its room."""
        entry = self.running.get((slot, generation, id))
        if entry is not None:
            entry.has_left = True

    def cut(self, slot: int, generation: int, id: str, at: float | None = None) -> None:
        """Note that a job was asked to shut down: it counts as cut from now on, however it ends."""
        entry = self.running.get((slot, generation, id))
        if entry is not None:
            entry.is_cut, entry.asked_at = True, at

    def keeps(self, slot: int, generation: int, id: str, size: int, kept_at: float, lacks: str) -> None:
        """Note that a job has a capsule."""
        entry = self.running.get((slot, generation, id))
        if entry is not None:
            entry.capsule_bytes, entry.kept_at, entry.lacks = size, kept_at, lacks

    def handover(
        self, slot: int, generation: int, id: str, result: HandoverResult, reason: str, successor: str
    ) -> None:
        """Note how a try to hand over a job ended. The successor of a call that was handed over stays.

        One that a worker tells of after the end of its job changes how that ended.
        """
        self.handovers[result] += 1
        entry = self.running.get((slot, generation, id))
        if entry is None and result != "refused":
            entry = self._kept.get((slot, generation, id))
            if result == "done" and entry is not None and entry.fate is not None and not entry.successor:
                self.totals[entry.fate] -= 1
                self._retold[entry.fate] += 1
                entry.fate = "handed_over"
                self.totals["handed_over"] += 1
        if entry is not None:
            entry.tries += 1
            if not entry.successor:
                entry.handover, entry.successor = reason, successor

    def find(self, id: str) -> JobEntry | None:
        """Return a running job."""
        return next((each for each in self.running.values() if each.id == id), None)

    def successor_of(self, id: str) -> str:
        """Return the job in which the call of another one has gone on; empty for a job that none followed."""
        entries = (*self.running.values(), *self._kept.values())
        return next((each.successor for each in entries if each.id == id), "")

    def count(self, fate: EntryFate) -> int:
        """Return how many jobs have a fate, those included whose fate is certain while they still run.

        It never falls: a job whose fate has changed counts for both.
        """
        certain = sum(1 for each in self.running.values() if fate == "cut" and each.is_cut)
        return self.totals[fate] + self._retold[fate] + certain

    def end(
        self,
        slot: int,
        generation: int,
        id: str,
        fate: JobFate | EntryFate,
        seconds: float,
        *,
        process: str = "",
        callbacks: str = "",
    ) -> None:
        """Note how a job ended. A job that the server never assigned counts as never started.

        A job whose call goes on in another one is `handed_over`, however it ended then.
        """
        entry = self.running.pop((slot, generation, id), None)
        if entry is None:
            return
        if entry.successor:
            fate, entry.callbacks = "handed_over", callbacks
        self.totals[fate] += 1
        if fate == "unassigned":
            self.started -= 1
            if self._at_stop is not None and entry in self._at_stop:
                self._at_stop.remove(entry)
            return
        if entry.tries or entry.capsule_bytes is not None:  # its first handover may be under way yet
            self._kept[slot, generation, id] = entry
            if len(self._kept) > MAX_KEPT:
                del self._kept[next(iter(self._kept))]
        entry.fate = fate
        entry.seconds = round(seconds, 3)
        entry.process = process

    def lose(
        self,
        slot: int,
        generation: int,
        now: float,
        *,
        cut: Collection[str] = (),
        is_vouched: bool = False,
    ) -> int:
        """Note that a worker is gone, and its running jobs with it; return how many calls were not finished.

        `cut` are the jobs that were ended with the worker on purpose. Of the others nothing is known, unless
        the worker has seen all of them out (`is_vouched`). Its exit code says that of all jobs together: one
        that failed can't be told from one that ended well, and is `finished` too.
        """
        gone = self.of(slot, generation)
        for entry in gone:
            fate: EntryFate = "finished" if is_vouched else "lost"
            if entry.is_over:
                fate = "finished"
            elif entry.is_cut or entry.id in cut:
                fate = "cut"
            process = "killed" if entry.is_over and not is_vouched else ""
            callbacks = "" if entry.is_over or is_vouched else "killed"
            seconds = now - entry.accepted_at
            self.end(slot, generation, entry.id, fate, seconds, process=process, callbacks=callbacks)
        return sum(1 for entry in gone if entry.fate not in ("finished", "handed_over"))

    def of(self, slot: int, generation: int) -> list[JobEntry]:
        """Return the running jobs of one worker."""
        return [e for e in self.running.values() if (e.slot, e.generation) == (slot, generation)]

    def served_beside(self, slot: int, generation: int) -> list[tuple[str, str, str]]:
        """Return name, sid and agent name of the rooms in which other workers have agents."""
        others = (e for e in self.running.values() if (e.slot, e.generation) != (slot, generation))
        return [(e.room, e.room_sid, e.agent_name) for e in others if e.pid is not None and not e.has_left]

    def begin_stop(self) -> None:
        """Remember every job from now on: the running ones, and accepted ones that are yet to tell."""
        if self._at_stop is None:
            self._at_stop = list(self.running.values())

    @property
    def at_stop(self) -> list[JobEntry]:
        """The jobs of the stop: running when it began, or told of since."""
        return self._at_stop or []
