"""Figures and receipts, decided: what is certain, what can't be read, and a pipe that takes nothing."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from lastcall.supervisor.app import App
from lastcall.supervisor.config import Inworld
from lastcall.supervisor.fleet.states import SlotEvent as E
from lastcall.supervisor.fleet.states import SlotState as S
from lastcall.supervisor.inworld_broker import Companion
from lastcall.supervisor.receipt import Ledger, StopRecord, textfile, write
from lastcall.supervisor.receipt.ledger import JobEntry
from lastcall.supervisor.receipt_file import is_special, write_figures, write_whole
from lastcall.supervisor.views.metrics import Collector
from lastcall.supervisor.views.worker_metrics import WorkerMetrics
from lastcall.worker.base.budget import Shares, plan
from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import Serving
from tests.support.generations import Silent, generation_in
from tests.support.metrics import Samples

GOOD = '# HELP lk_agents_load Load.\n# TYPE lk_agents_load gauge\nlk_agents_load{nodename="n"} 0.5\n'
BAD = [
    "lk_agents_load{ 1",
    "}",
    'lk{a="b} 1',
    "lk_agents_load one",
    "# TYPE",
    "\0",
    "x" * 9,
    "lk{a=b} 1 2 3 4",
]


def entry(id: str) -> JobEntry:
    return JobEntry(id=id, room="r", dispatch_id="d", slot=0, generation=1, accepted_at=10.0)


def test_a_worker_whose_end_is_not_seen() -> None:
    """Its jobs have a fate in the receipt all the same: a machine may be too busy for an end in time."""
    generation, _ = generation_in(S.KILLING)
    ledger = generation.shared.ledger
    for id in ("told", "killed", "passed on", "nobody's"):
        ledger.start(entry(id))
    ledger.begin_stop()
    ledger.cut(0, 1, "told", at=now())
    ledger.handover(0, 1, "passed on", "done", "", "AJ_2")
    generation._cut = frozenset({"killed", "passed on"})
    generation.write_off()
    fates = {each.id: each.fate for each in ledger.at_stop}
    assert fates == {"told": "cut", "killed": "cut", "passed on": "handed_over", "nobody's": "lost"}
    generation.write_off()
    assert (ledger.totals["cut"], ledger.totals["handed_over"], ledger.totals["lost"]) == (2, 1, 1)


def test_a_cut_counts_when_it_is_certain() -> None:
    """From the request to shut down on, once, however the job or its worker ends."""
    ledger = Ledger()
    for id in ("told", "crashed", "other"):
        ledger.start(entry(id))
    ledger.begin_stop()
    for id in ("told", "told", "crashed", "nobody's"):
        ledger.cut(0, 1, id)
    assert (ledger.count("cut"), ledger.count("lost"), ledger.totals["cut"]) == (2, 0, 0)
    ledger.end(0, 1, "told", "cut", 1.0)
    assert ledger.count("cut") == 2
    assert ledger.lose(0, 1, 14.0) == 2
    assert (ledger.count("cut"), ledger.count("lost")) == (2, 1)
    assert {job.id: job.fate for job in ledger.at_stop} == {"told": "cut", "crashed": "cut", "other": "lost"}


@pytest.mark.parametrize("given_up", [E.KILL, E.TERMINATE, E.FAIL])
def test_only_a_drain_counts_as_one(given_up: E) -> None:
    """From the fence to the close, or to an end; not to the moment at which the worker was given up."""
    drained, _ = generation_in(S.READY)
    for event in (E.FENCE, E.CLOSE, E.EXIT):
        drained.change(event)
    assert drained.shared.drain_seconds.buckets[-1] == ("+Inf", 1.0)
    given, _ = generation_in(S.READY)
    for event in (E.FENCE, given_up, *([] if given_up is E.FAIL else [E.EXIT])):
        given.change(event)
    cut, _ = generation_in(S.READY)
    cut.shared.ledger.start(entry("still runs"))
    for event in (E.FENCE, E.CLOSE, E.EXIT):
        cut.change(event)
    for generation in (given, cut):
        assert generation.shared.drain_seconds.buckets[-1] == ("+Inf", 0.0)


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, event: str, **_: Any) -> None:
        self.lines.append(event)


@pytest.mark.parametrize("is_opaque", [False, True])
def test_jobs_that_nobody_knows_are_not_none(is_opaque: bool) -> None:
    """A worker without jobs has none to cut; of an opaque program nothing is said."""
    fleet = SimpleNamespace(generations=[], launcher=SimpleNamespace(is_opaque=is_opaque))
    status: Any = SimpleNamespace(fleet=fleet)
    names = {family.name for family in Collector(status)._cuts()}
    assert names == (set() if is_opaque else {"lastcall_jobs_to_cut", "lastcall_drain_left_seconds"})


@pytest.mark.parametrize("text", BAD)
def test_a_worker_whose_metrics_can_not_be_read(text: str) -> None:
    """It is left out, and one line says so; the others are there, and the scrape is none the worse."""
    good, bad = (
        SimpleNamespace(slot=slot, number=1, log=Log(), reports=SimpleNamespace(metrics=metrics))
        for slot, metrics in ((0, GOOD), (1, text))
    )
    for _ in range(2):
        registry = CollectorRegistry()
        collector: Any = WorkerMetrics([bad, good])  # type: ignore[list-item]  # what a scrape looks at
        registry.register(collector)
        seen = Samples.of(generate_latest(registry).decode())
        assert seen.value("lk_agents_load", slot="0") == 0.5
    assert good.log.lines == [] and len(bad.log.lines) <= 1


def test_the_last_stop_as_a_textfile() -> None:
    """Each fate and outcome has a sample, and the path of the receipt is on each; any path can be."""
    ledger = Ledger()
    ledger.begin_stop()
    for id, fate in (("a", "cut"), ("b", "finished")):
        ledger.start(entry(id))
        ledger.end(0, 1, id, fate, 1.0)  # type: ignore[arg-type]  # a fate
    record = StopRecord(reason="SIGTERM", phases={"draining": 2.0}, left=1, seconds=3.0)
    document = write(record, ledger, grace=60.0, pid=1)
    path = '/a "strange"\\ path\n.json'
    seen = Samples.of(textfile.text_of(document, path, 1000.5))
    assert all(labels["receipt"] == path for samples in seen.values() for labels, _ in samples)
    assert [seen.value("lastcall_last_stop_jobs", fate=fate) for fate in textfile.FATES] == [1, 0, 1, 0, 0, 0]
    assert (
        seen.value("lastcall_last_stop_outcome", outcome="cut")
        == seen.value("lastcall_last_stop_outcome")
        == 1
    )
    assert seen.value("lastcall_last_stop_exit_code") == 75
    assert seen.value("lastcall_last_stop_timestamp_seconds") == 1000.5
    assert seen.value("lastcall_last_stop_processes", what="left") == 1
    assert seen.value("lastcall_last_stop_phase_seconds", phase="draining") == 2


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    """The old text or the new one is there, and no temporary file after it."""
    path = tmp_path / "receipt.json"
    for text in ("old", "new"):
        write_whole(path, text)
        assert path.read_text() == text and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError):
        write_whole(tmp_path / "none" / "receipt.json", "x")


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    """The label has a replacement for what is no UTF-8, and the files have the path as it is."""
    path = Path(f"{tmp_path}/\udcffä.json")
    before = os.umask(0o077)
    try:
        write_figures(path, write(StopRecord(), Ledger(), grace=60.0, pid=1))
        write_whole(tmp_path / "receipt", "")
    finally:
        os.umask(before)
    assert (tmp_path / "receipt").stat().st_mode & 0o777 == 0o600
    seen = Samples.of(Path(f"{path}.prom").read_text(encoding="utf-8"))
    # The umask is that of a unit, whose receipt nobody else reads; node_exporter reads the figures.
    assert Path(f"{path}.prom").stat().st_mode & 0o777 == 0o644
    (labels, code), *_ = seen["lastcall_last_stop_exit_code"]
    assert (labels["receipt"], code) == (f"{tmp_path}/\ufffdä.json", 0)


def test_a_fault_in_the_figures_is_none_of_the_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The receipt is there, the log has the fault or the reason, and nothing is raised."""
    lines: list[tuple[str, dict[str, Any]]] = []
    app: Any = SimpleNamespace(
        log=SimpleNamespace(error=lambda event, **fields: lines.append((event, fields)))
    )
    document = write(StopRecord(), Ledger(), grace=60.0, pid=1)
    path = tmp_path / "receipt.json"
    (tmp_path / "receipt.json.prom").mkdir()
    App._write_receipt(app, path, document)
    assert path.is_file() and not list(tmp_path.glob(".*"))
    monkeypatch.setattr(textfile, "text_of", lambda *_: 1 / 0)
    (tmp_path / "receipt.json.prom").rmdir()
    App._write_receipt(app, path, document)
    assert [event for event, _ in lines] == ["receipt could not be written", "fault in lastcall"]
    assert lines[0][1]["path"] == f"{path}.prom" and lines[1][1]["exc_info"]


def test_a_pipe_is_written_to_within_a_bound(tmp_path: Path) -> None:
    """Without a reader, and with one that reads nothing, the write is given up; a reader gets it all."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert is_special(path) and not is_special(tmp_path / "none")
    with pytest.raises(OSError, match="nobody reads") as caught:
        write_whole(path, "x", within=0.05)
    assert caught.value.errno == errno.ENXIO
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(TimeoutError, match="does not read on"):
        write_whole(path, "x" * 1_000_000, within=0.05)
    os.close(reader)
    text = "y" * 300_000
    read: list[str] = []
    thread = threading.Thread(target=lambda: read.append(path.read_text()), daemon=True)
    thread.start()
    write_whole(path, text, within=30.0)
    thread.join(30.0)
    assert read == [text] and path.is_fifo()
    write_whole(Path(os.devnull), "z")


@pytest.mark.parametrize(("has_served", "fate"), [(False, "closed"), (True, "forced")])
async def test_a_broker_that_is_not_up_at_the_stop(has_served: bool, fate: str) -> None:
    """One that never served has opened nothing; the connections of another went with its process."""
    record, nothing = StopRecord(), lambda *_: None
    reaper: Any = None  # no process is started here
    broker = Companion(
        Inworld(),
        key="a-key",
        grace=60.0,
        close=5.0,
        supervisor_id="1-a",
        environment={},
        reaper=reaper,
        record=record,
        is_stopping=lambda: True,
        known_pids=set(),
        keys_in_use=tuple,
        write=nothing,
        on_change=nothing,
        log=Silent(),
    )
    if has_served:
        broker._on_message(Serving())
    await broker.stop(lambda: plan(now(), 60.0, Shares(companion=5.0)))
    broker._endpoint.close()
    assert [each.fate for each in record.resources] == [fate]
