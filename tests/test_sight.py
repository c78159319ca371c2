"""Metrics, status document, dashboard and alerts show an operator the truth."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import jsonschema
import yaml

from lastcall.supervisor.fleet.states import SlotState
from lastcall.supervisor.receipt import Ledger, StopRecord, textfile, write
from lastcall.supervisor.views.families import POOL
from lastcall.worker.base.wire import Beat, Fenced, Ready
from tests.support.generations import generation_in
from tests.support.harness import AGENT, LASTCALL, Run, StartRun
from tests.support.metrics import Samples, scrape
from tests.support.program import status, verb

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "scripts" / "deploy" / "grafana.json"
ALERTS = ROOT / "scripts" / "deploy" / "alerts.yaml"
PAGE = ROOT / "docs" / "metrics.md"
SCHEMA = json.loads((ROOT / "docs" / "status.schema.json").read_text())
LAST_STOP = write(StopRecord(phases={"draining": 1.0}), Ledger(), grace=60.0, pid=1)
NAME = re.compile(r"\blastcall_[a-z_]+")


async def test_metrics_and_status_say_what_happened(run: StartRun, tmp_path: Path) -> None:
    """A job finished, one crashed, one runs, a worker was restarted, a reload done; and each slot's own.

    The document is of its schema in a stop too, and says why and how long. `drain --wait` follows it. Every
    name that dashboard, alerts and pages use is exported; every name that is exported is on the page, those
    of the Inworld pool too.
    """
    config = tmp_path / "lastcall.toml"
    # Nothing is said, so nothing is dialled.
    config.write_text('[inworld]\nenabled = true\nws_url = "ws://127.0.0.1:9/"\n')
    options = ("--config", str(config), "--http", "127.0.0.1:0")
    key = {"INWORLD_API_KEY": "a-key"}
    r: Run = await run("run", "-w", "2", "--grace", "60", *options, AGENT, environment=key)
    await r.until(lambda: r.log("supervisor started"))
    first = await scrape(r)
    counters = re.findall(r"^\| `(lastcall_\w+_total)` \| counter", PAGE.read_text(), re.MULTILINE)
    assert counters and all(first[name] and first.value(name) == 0 for name in counters)
    reasons = {labels["reason"] for labels, _ in first["lastcall_restarts_total"]}
    assert reasons == {"exited", "killed", "never ready", "not started", "left"}

    await r.ready(2)
    good = await r.dispatch("good", sleep=0.1)
    bad = await r.dispatch("bad", mode="crash")
    for job in (good, bad):
        await r.until(lambda job=job: r.livekit.jobs[job.job_id].status != "JS_RUNNING", 20)  # type: ignore[misc]
    (killed, _second) = r.workers()
    killed.kill()
    await r.until(lambda: len(r.log("slot ready")) == 3, 40)
    await verb(r, "recycle", "0", "--wait", timeout=60)
    await r.until(lambda: len(r.livekit.available()) == 2, 20)
    running = await r.dispatch("running", mode="hold")
    await r.job_says(running.job_id, "started")
    seen = await scrape(r)
    value = seen.value
    assert value("lastcall_jobs_started_total") == 3
    assert value("lastcall_jobs_finished_total") == 1
    assert value("lastcall_jobs_failed_total") == 1
    assert value("lastcall_jobs_cut_total") == value("lastcall_jobs_lost_total") == 0
    assert value("lastcall_jobs_running") == 1
    assert value("lastcall_restarts_total", slot="0", reason="killed") == 1
    assert value("lastcall_operations_total", verb="recycle", result="done") == 1
    assert value("lastcall_slots", state="ready") == 2
    assert value("lastcall_workers_accepting") == value("lastcall_workers_wanted") == 2
    assert value("lastcall_fence_seconds_count") == value("lastcall_drain_seconds_count") == 1
    assert value("lastcall_jobs_to_cut") == 0
    assert value("lastcall_worker_resident_memory_bytes") > 2 * 10_000_000
    own = {(labels["slot"], labels["generation"]) for labels, _ in seen["lk_agents_worker_load"]}
    assert {slot for slot, _ in own} == {"0", "1"}
    jsonschema.validate(await status(r), SCHEMA)
    names_are_those_of_the_pages(await exported(r))

    said = tmp_path / "said"
    with said.open("w") as file:
        command = [*LASTCALL, "drain", "--wait", "--control", str(r.control)]
        drain = await asyncio.create_subprocess_exec(*command, stdout=file)
    await r.until(lambda: r.log("stop draining"))
    document = await status(r)
    jsonschema.validate(document, SCHEMA)
    assert (document["phase"], document["reason"]) == ("draining", "drain was asked for")
    assert 0 < document["grace_left_s"] <= 60
    (slot,) = [slot for slot in document["slots"] if slot["jobs"]]
    assert [each["room"] for each in slot["jobs"]] == ["running"]
    assert slot["rss_bytes"] > 10_000_000, "the fence has no figures, so the last ones stay"
    await r.until(lambda: re.search(r"^draining: 1 job, \d+ s left$", said.read_text(), re.MULTILINE))
    r.let_go()
    assert await r.exit() == 0
    assert await asyncio.wait_for(drain.wait(), 15) == 0
    assert said.read_text().endswith("\nstopped; the receipt says how it went\n")


async def exported(r: Run) -> set[str]:
    """Return every name that a supervisor exports with a worker and the Inworld pool, both of which beat."""
    names: set[str] = set()
    wanted = {"lastcall_pool_connections", "lastcall_worker_loop_lag_seconds", "lastcall_worker_pss_bytes"}
    async with asyncio.timeout(60):
        while not wanted <= names:
            await status(r)  # memory is read for it after 5 s, and for a scrape after 30
            names = set(await scrape(r))
    return names


def names_are_those_of_the_pages(names: set[str]) -> None:
    """Assert that the names which a supervisor exports are those in use and those of docs/metrics.md."""
    known = {name for name in names if name.startswith("lastcall_")}
    assert {family.exposed_name for family in POOL.values()} <= known
    dashboard = json.loads(DASHBOARD.read_text())
    used = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in NAME.findall(target["expr"])
    }
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    used |= {name for rule in rules for name in NAME.findall(rule["expr"])}
    for path in (ROOT / "docs" / "operations.md", *(ROOT / "scripts" / "deploy" / "k8s").rglob("*.yaml")):
        used |= {name for name in NAME.findall(path.read_text()) if name != "lastcall_"}
    known |= set(Samples.of(textfile.text_of(LAST_STOP, "receipt.json", 0.0)))
    assert used and used <= known, used - known
    base = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in known}
    on_page = set(NAME.findall(PAGE.read_text()))
    assert base == on_page, base ^ on_page


def test_a_figure_that_is_not_known_yet() -> None:
    """A worker that has registered and not beaten yet has figures of null, and no sample in the metrics."""
    generation, _log = generation_in(SlotState.READY)
    view = generation.reports
    view.take(Ready(worker_id="AW_1", warm=True))
    assert view.beat is not None and view.beat.registered and not view.beat.accepting
    assert (view.beat.rss_bytes, view.beat.lag_ms, view.beat.load) == (None, None, None)
    beat = Beat(lag_ms=1.5, load=0.25, rss_bytes=9_000_000, registered=True, accepting=True, warm=True)
    view.take(beat)
    for again in (Ready(worker_id="AW_2", warm=True), Fenced(reason="SIGTERM", at=1.0)):
        view.take(again)
        assert not view.beat.accepting
        assert (view.beat.rss_bytes, view.beat.lag_ms, view.beat.load) == (9_000_000, 1.5, 0.25)
