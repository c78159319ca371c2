"""The receipt: what becomes of each job in the ledger, and how a stop is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lastcall.supervisor.receipt.document import judge, write
from lastcall.supervisor.receipt.ledger import JobEntry, Ledger
from lastcall.supervisor.receipt.record import ResourceEntry, StopRecord
from lastcall.worker.base.exit_codes import Exit


def entry(id: str, *, generation: int = 1) -> JobEntry:
    return JobEntry(id=id, room="r", dispatch_id="d", slot=0, generation=generation, accepted_at=10.0)


def test_a_job_is_told_of_twice_and_counted_once() -> None:
    """Accepted first, with a pid later."""
    ledger = Ledger()
    assert ledger.start(entry("a")) is True
    with_pid = entry("a")
    with_pid.pid = 7
    assert ledger.start(with_pid) is False
    assert ([job.pid for job in ledger.of(0, 1)], ledger.started) == ([7], 1)


def test_the_receipt_has_the_jobs_of_the_stop() -> None:
    """Those that ran when it began and those told of since; earlier ones are only in the totals."""
    ledger = Ledger()
    ledger.start(entry("before"))
    ledger.end(0, 1, "before", "finished", 1.0)
    ledger.start(entry("running"))
    ledger.begin_stop()
    ledger.begin_stop()
    ledger.start(entry("late"))
    ledger.end(0, 1, "running", "finished", 2.00049)
    ledger.end(0, 1, "nobody's", "finished", 1.0)
    document = write(StopRecord(reason="SIGTERM"), ledger, grace=30.0, pid=1)
    assert [(job["id"], job["fate"], job["seconds"]) for job in document["jobs"]] == [
        ("running", "finished", 2.0),
        ("late", None, 0.0),
    ]
    assert document["totals"] == {
        "started": 3, "finished": 2, "failed": 0, "cut": 0, "ended_by_server": 0, "handed_over": 0,
        "lost": 0, "unassigned": 0,
    }  # fmt: skip


def test_an_unassigned_job_was_never_started() -> None:
    """The server gave it to another worker: neither the count nor the jobs of the stop have it."""
    ledger = Ledger()
    ledger.begin_stop()
    ledger.start(entry("a"))
    ledger.end(0, 1, "a", "unassigned", 0.1)
    assert (ledger.started, ledger.at_stop, ledger.totals["unassigned"]) == (0, [], 1)


def test_a_call_that_was_handed_over_stays_so() -> None:
    """A try that is refused afterwards changes nothing, and a successor may be told of after the end."""
    ledger = Ledger()
    ledger.begin_stop()
    for id in ("once", "late", "never", "first try"):
        ledger.start(entry(id))
    ledger.keeps(0, 1, "first try", 2, 0.0, "")
    ledger.end(0, 1, "first try", "failed", 1.0)
    ledger.handover(0, 1, "first try", "failed", "the agent died", "")
    ledger.handover(0, 1, "first try", "done", "", "AJ_5")
    ledger.handover(0, 1, "first try", "refused", "not possible: the job has ended", "")
    ledger.handover(0, 1, "once", "done", "", "AJ_2")
    ledger.handover(0, 1, "once", "refused", "not possible: the call is ending", "")
    ledger.end(0, 1, "once", "finished", 1.0)
    for id in ("late", "never"):
        ledger.handover(0, 1, id, "failed", "the agent died", "")
        ledger.end(0, 1, id, "failed", 1.0)
    ledger.handover(0, 1, "late", "done", "", "AJ_3")
    ledger.handover(0, 1, "nobody's", "done", "", "AJ_4")
    shown = {job.id: (job.fate, job.successor, job.handover, job.tries) for job in ledger.at_stop}
    assert shown == {
        "once": ("handed_over", "AJ_2", "", 2),
        "late": ("handed_over", "AJ_3", "", 2),
        "never": ("failed", "", "the agent died", 1),
        "first try": ("handed_over", "AJ_5", "", 2),
    }
    assert (ledger.totals["handed_over"], ledger.totals["failed"]) == (3, 1)
    assert (ledger.count("handed_over"), ledger.count("failed")) == (3, 3), "a counter never falls"


def test_jobs_of_a_worker_that_is_gone() -> None:
    """Cut on purpose, or lost; the jobs of another generation go on."""
    ledger = Ledger()
    for job in (entry("a"), entry("b"), entry("c", generation=2)):
        ledger.start(job)
    ledger.begin_stop()
    assert ledger.lose(0, 1, 14.0, cut={"a"}) == 2
    assert {job.id: (job.fate, job.seconds) for job in ledger.at_stop} == {
        "a": ("cut", 4.0),
        "b": ("lost", 4.0),
        "c": (None, 0.0),
    }


def test_a_call_that_was_over_when_its_worker_went() -> None:
    """It had ended by itself, so it is neither lost nor cut; the receipt says what became of its process."""
    ledger = Ledger()
    ledger.start(entry("a"))
    ledger.begin_stop()
    ledger.over(0, 1, "a")
    ledger.over(0, 1, "nobody's")
    assert ledger.lose(0, 1, 14.0, cut={"a"}) == 0
    (job,) = write(StopRecord(reason="SIGTERM"), ledger, grace=30.0, pid=1)["jobs"]
    assert (job["fate"], job["process"]) == ("finished", "killed")


CASES: list[tuple[dict[str, Any], str, Exit]] = [
    ({}, "clean", Exit.CLEAN),
    ({"left": 1}, "forced", Exit.FORCED),
    ({"killed": [{"slot": 0}]}, "forced", Exit.FORCED),
    ({"resources": [ResourceEntry(name="x", fate="closed")]}, "clean", Exit.CLEAN),
    ({"resources": [ResourceEntry(name="x", fate="forced")]}, "forced", Exit.FORCED),
    ({"resources": [ResourceEntry(name="x", fate="leaked")]}, "forced", Exit.FORCED),
    ({"gave_up": True}, "gave_up", Exit.GAVE_UP),
    ({"gave_up": True, "left": 1}, "gave_up", Exit.GAVE_UP),
    ({"fault": "x", "gave_up": True}, "fault", Exit.FAULT),
    ({"config_error": "x", "fault": "y"}, "fault", Exit.CONFIG),
]


@pytest.mark.parametrize(("seen", "outcome", "code"), CASES)
def test_the_worst_counts(seen: dict[str, Any], outcome: str, code: Exit) -> None:
    """The outcome and the exit code are those of the worst thing that the stop did."""
    assert judge(StopRecord(**seen), Ledger()) == (outcome, code)


@pytest.mark.parametrize(("fate", "outcome"), [("finished", "clean"), ("failed", "clean"), ("cut", "cut")])
def test_a_cut_job_is_a_cut_stop(fate: Any, outcome: str) -> None:
    """A job that failed by itself is no fault of the stop; a job that was cut is."""
    ledger = Ledger()
    ledger.begin_stop()
    ledger.start(entry("a"))
    ledger.end(0, 1, "a", fate, 1.0)
    assert judge(StopRecord(left=1), ledger)[0] == ("cut" if fate == "cut" else "forced")
    assert judge(StopRecord(), ledger)[0] == outcome


@pytest.mark.parametrize("page", ["docs/signals.md"])
def test_pages_say_when_a_stop_was_clean(page: str) -> None:
    """A job that failed, as for its memory, has not ended by itself, and the stop is clean all the same."""
    text = (Path(__file__).parents[1] / page).read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| 0 |")]
    assert "no job was cut or lost" in row
