"""Ready is registered and once warm, everywhere; what comes later is told, and takes nothing away."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lastcall.supervisor.fleet.full_time import FullTime
from lastcall.worker.base import setup_errors
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.wire import MAX_LINE_BYTES, encode
from lastcall.worker.job.setup import Setup
from lastcall.worker.sdk import process_pool
from lastcall.worker.warming import Warming
from tests.support.harness import AGENT, Run, StartRun
from tests.support.metrics import scrape
from tests.support.program import status, status_when, verb


async def readyz(r: Run) -> tuple[int, str]:
    """Return the answer of /readyz."""
    address = r.log("supervisor started")[0]["http"]

    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{address}/readyz", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(get)


def at(entry: dict[str, Any]) -> float:
    """Return when a line of the log was written."""
    return datetime.fromisoformat(entry["timestamp"]).timestamp()


@pytest.mark.core
@pytest.mark.parametrize(
    ("idle", "how", "says"), [(1, "raise", "no model"), (0, "bare", "ConnectionError()")]
)
async def test_first_process_that_fails(
    run: StartRun, tmp_path: Path, idle: int, how: str, says: str
) -> None:
    """The start has failed: no registration, no READY, the user's own reason, and back-off up to giving up.

    Without idle processes a trial process is started first. livekit-agents takes an error without a text for
    none.
    """
    config = tmp_path / "lastcall.toml"
    config.write_text("[restart]\nintensity = 1\nbackoff = [0.1, 0.2]\n")
    environment = {"PREWARM": how, "IDLE": str(idle)}
    options = ("--grace", "30", "--config", str(config), "--http", "127.0.0.1:0")
    r: Run = await run("run", *options, AGENT, environment=environment)
    await r.until(lambda: r.log("slot failed"), 60)
    if r.process.poll() is None:
        code, text = await readyz(r)
        assert code == 503 and "first job process did not get ready" in text and says in text
        assert (await r.livekit.dispatch("nobody")).outcome == "no_worker"
    assert await r.exit(90) == 69
    starts = len(r.log("slot starting"))
    assert starts == 2 and len(r.log("job process failed")) == starts
    assert says in r.receipt()["reason"]
    assert r.events("registered") == [] and not r.log("ready")
    await r.nothing_left(5)


@pytest.mark.core
@pytest.mark.timeout(240)
async def test_later_processes_that_fail(run: StartRun) -> None:
    """They end nothing: counted, backed off, told. No job is taken meanwhile, and one that runs goes on."""
    r: Run = await run("run", "--grace", "60", "--http", "127.0.0.1:0", AGENT)
    await r.ready()
    r.break_prewarm()
    job = await r.dispatch(mode="hold")
    await r.job_says(job.job_id, "started")
    await r.until(lambda: len(r.log("job process failed")) >= 4, 60)
    failed = r.log("job process failed")
    assert "no model" in failed[0]["reason"]
    # The pauses after the first three are 0.5, 1 and 2 s, less a fifth at most.
    assert at(failed[3]) - at(failed[0]) > 0.8 * 3.5
    assert [each["failures"] for each in failed[:4]] == [1, 2, 3, 4]
    await r.until(lambda: not r.livekit.available())
    assert (await r.livekit.dispatch("nobody")).outcome == "no_worker"
    document = await status_when(r, lambda document: document["full"])
    (row,) = document["slots"]
    assert (row["state"], row["full"]) == ("ready", "cold")
    assert row["process_failures"] >= 4 and "no model" in row["process_failure"]
    assert document["full"]["reasons"] == ["cold"] and document["full"]["since_s"] > 0
    code, text = await readyz(r)
    assert code == 200 and "no job process gets ready" in text
    seen = await scrape(r)
    assert seen["lastcall_process_failures_total"][0][1] >= 4
    assert "no model" in await verb(r, "doctor", code=1, timeout=60)
    r.job_log.with_name(r.job_log.name + ".raise").unlink()
    # The pause may have grown to 16 s, and before 1.8 a process that failed takes 10 s to be closed.
    await r.until(lambda: len(r.livekit.available()) == 1, 120)
    r.let_go()
    await r.job_says(job.job_id, "ended")
    r.kill()
    assert await r.exit() == 0
    # The job may have ended before the stop began.
    assert r.receipt()["totals"]["finished"] == 1 and len(r.log("slot starting")) == 1
    await r.clean(job)


@pytest.mark.core
async def test_load_and_hold_are_told(run: StartRun) -> None:
    """A worker that is full by livekit-agents' own measure stays ready, and every view says so."""
    environment = {"THRESHOLD": "0.7"}
    r: Run = await run("run", "--grace", "30", "--http", "127.0.0.1:0", AGENT, environment=environment)
    await r.ready()
    full = dict.fromkeys(("load", "cap", "hold", "cold"), 0.0)
    seen = await scrape(r)
    assert {labels["reason"]: value for labels, value in seen["lastcall_full_seconds_total"]} == full
    assert (await status(r))["full"] is None and (await readyz(r)) == (200, "ok\n")
    busy = r.job_log.with_name(r.job_log.name + ".busy")
    busy.touch()
    async with asyncio.timeout(30):
        while not (document := await status(r))["full"]:
            await asyncio.sleep(0.1)
    assert document["full"]["reasons"] == ["load"] and document["slots"][0]["full"] == "load"
    assert document["slots"][0]["state"] == "ready"
    await r.until(lambda: not r.livekit.available())
    assert "load" in await verb(r, "status")
    code, text = await readyz(r)
    assert code == 200 and "load_threshold" in text
    seen = await scrape(r)
    assert seen["lastcall_workers_accepting"][0][1] == 0
    await verb(r, "hold")
    async with asyncio.timeout(30):
        while (await status(r))["full"]["reasons"] != ["hold"]:
            await asyncio.sleep(0.1)
    assert (await readyz(r))[0] == 200
    await verb(r, "release")
    busy.unlink()
    await r.ready()
    async with asyncio.timeout(30):
        while (await status(r))["full"]:
            await asyncio.sleep(0.1)
    seen = await scrape(r)
    told = {labels["reason"]: value for labels, value in seen["lastcall_full_seconds_total"]}
    assert told["load"] > 0 and told["hold"] > 0 and told["cap"] == told["cold"] == 0
    r.kill()
    assert await r.exit() == 0


class Pool:
    """The part of livekit-agents' pool that is followed. Each start ends as the test says."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}
        self._warmed_proc_queue = asyncio.Queue[Any]()
        self._closed = False
        self.how: Any = None

    def on(self, event: str, handler: Any) -> None:
        self.handlers[event] = handler

    def emit(self, event: str, executor: Any) -> None:
        self.handlers[event](executor)

    async def _proc_spawn_task(self) -> None:
        executor = SimpleNamespace(
            running_job=None,
            _initialize_fut=asyncio.Future[None](),
            _shutting_down_fut=asyncio.Future[None](),
        )
        self.emit("process_created", executor)
        await asyncio.sleep(0)
        if isinstance(self.how, Exception):
            executor._initialize_fut.set_exception(self.how)
            async with asyncio.timeout(10):
                await executor._shutting_down_fut  # the pool closes the process, as in 1.5
            return
        self.emit("process_ready", executor)
        self._warmed_proc_queue.put_nowait(executor)
        if self.how == "taken":
            self._warmed_proc_queue.get_nowait()
            executor.running_job = "a job"
            self.emit("process_job_launched", executor)
        self.emit("process_closed", executor)


async def test_how_a_process_went() -> None:
    """Warm, failed with the reason, or ended without a job; nothing is said once the pool closes."""
    pool, told, slow, paused = Pool(), list[str](), list[str](), list[int]()

    async def pause() -> None:
        paused.append(1)

    def failed(reason: str, is_slow: bool) -> None:
        (slow if is_slow else told).append(reason)

    process_pool.follow_processes(pool, pause=pause, warm=lambda: told.append("warm"), failed=failed)
    for how in (TimeoutError("took too long"), RuntimeError("no model"), ConnectionError(), "idle", "taken"):
        pool.how = how
        await pool._proc_spawn_task()
    assert told == [
        "no model",
        "the process ended while it initialised (ConnectionError)",
        "warm",
        "the process ended while it waited for a job",
        "warm",
    ]
    assert slow == ["took too long"] and len(paused) == 5
    pool._closed = True
    pool.how = RuntimeError("killed")
    await pool._proc_spawn_task()
    assert len(told) == 5


async def test_processes_that_are_gone_wait_for_no_job() -> None:
    """A process that was closed and a thread whose setup raised get no call; the others keep their place."""
    pool, told = Pool(), list[str]()

    async def pause() -> None:
        pass

    process_pool.follow_processes(
        pool, pause=pause, warm=lambda: told.append("warm"), failed=lambda reason, _: told.append(reason)
    )
    living = object()
    pool._warmed_proc_queue.put_nowait(living)
    pool.how = "idle"
    await pool._proc_spawn_task()
    assert told == ["warm", "the process ended while it waited for a job"]
    assert pool._warmed_proc_queue.qsize() == 1

    setup_errors.tell("no model")
    pool.how = "idle"
    await pool._proc_spawn_task()
    await asyncio.sleep(0)
    assert told[2:] == ["no model"] and setup_errors.take() == ""
    assert pool._warmed_proc_queue.get_nowait() is living and pool._warmed_proc_queue.empty()


async def test_a_trial_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool without idle processes starts none itself: after a failure the next one is a trial."""
    started: list[object] = []
    monkeypatch.setattr(process_pool, "start_one", started.append)
    reported: list[Any] = []
    failed: list[str] = []
    pool: Any = SimpleNamespace(
        _default_num_idle_processes=0, _warmed_proc_queue=asyncio.Queue(), on=lambda *_: None
    )
    pool._proc_spawn_task = None
    server = SimpleNamespace(_proc_pool=pool)
    warming = Warming(server, changed=Condition(), report=reported.append, start_failed=failed.append)
    warming._prepare(pool)
    assert started == [pool] and not warming.is_cold
    warming._on_failed("took too long", True)
    assert len(started) == 2 and not failed and not warming.is_cold
    warming._on_failed("x" * 1_000_000, False)
    assert len(started) == 2 and len(failed) == 1 and len(encode(reported[-1])) < MAX_LINE_BYTES
    warming._on_warm()
    warming._on_failed("no model", False)
    assert len(started) == 3 and warming.is_cold
    pool._warmed_proc_queue.put_nowait(object())
    assert not warming.is_cold


def test_setup_that_raises_without_a_text() -> None:
    """livekit-agents takes an empty text for success, so that the exception gets one."""

    def bare(_: object) -> None:
        raise ConnectionError

    def spoken(_: object) -> None:
        raise ConnectionError("no model server")

    with pytest.raises(RuntimeError, match=r"ConnectionError\(\)"):
        Setup._set_up(bare, None)
    with pytest.raises(ConnectionError, match="no model server"):
        Setup._set_up(spoken, None)
    assert setup_errors.take() == ""


def test_seconds_by_reason() -> None:
    """Only the time counts in which nobody takes jobs; a reason that is not known is left out."""
    full = FullTime()
    full.note((), 10.0)
    full.note({"load", "", "of a newer worker"}, 20.0)
    assert (full.reasons, full.since) == (("load",), 20.0)
    full.note({"load", "cap"}, 23.0)
    assert full.since == 20.0
    full.note((), 24.0)
    assert not full.reasons and full.since is None
    assert full.seconds == {"hold": 0.0, "cold": 0.0, "cap": 1.0, "load": 4.0}
    full.note({"hold"}, 30.0)
    assert full.since == 30.0 and full.seconds["load"] == 4.0
