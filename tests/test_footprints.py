"""Memory as the kernel divides it among processes: what is shown of it, and what is done by it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import psutil
import pytest

from lastcall.supervisor.fleet.footprints import LOOK_EVERY, Footprints
from lastcall.worker.base import memory
from tests.support.harness import AGENT, Run, StartRun
from tests.support.metrics import scrape
from tests.support.program import status

SCHEMA = Path(__file__).parent.parent / "docs" / "status.schema.json"


async def test_shared_memory_counts_once(run: StartRun, tmp_path: Path) -> None:
    """Two workers of one image: the figures are those of the kernel, and far below resident memory."""
    config = tmp_path / "lastcall.toml"
    config.write_text("[start]\nimage = true\n")
    options = ("--config", str(config), "--http", "127.0.0.1:0")
    r: Run = await run("run", "-w", "2", "--grace", "40", *options, AGENT)
    await r.ready(2)
    document = await status(r)
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    whole, rows = document["memory"], document["slots"]
    tree = [psutil.Process(r.pid), *psutil.Process(r.pid).children(recursive=True)]
    pss = sum(memory.shares(process.pid).pss for process in tree)
    resident = sum(process.memory_info().rss for process in tree)
    assert whole["pss_bytes"] == pytest.approx(pss, rel=0.2)
    assert whole["pss_bytes"] < 0.7 * resident
    assert 0 < whole["image_private_bytes"] < whole["image_pss_bytes"]
    for row in rows:
        assert 0 < row["private_bytes"] < row["pss_bytes"]
    parts = sum(row["pss_bytes"] for row in rows) + whole["image_pss_bytes"]
    assert whole["pss_bytes"] - parts == pytest.approx(memory.shares(r.pid).pss, rel=0.2)
    value = (await scrape(r)).value
    assert value("lastcall_worker_pss_bytes") == sum(row["pss_bytes"] for row in rows)
    assert value("lastcall_worker_private_memory_bytes") == sum(row["private_bytes"] for row in rows)
    assert value("lastcall_image_pss_bytes") == whole["image_pss_bytes"]
    r.kill()
    assert await r.exit() == 0
    await r.clean()


async def test_recycle_by_private_memory(run: StartRun, tmp_path: Path) -> None:
    """A worker that has written more than the limit is replaced, and the log has the figure."""
    config = tmp_path / "lastcall.toml"
    config.write_text("[recycle]\nmax_rss_mb = 1\n[stall]\nbeat = 0.3\n")
    r: Run = await run("run", "--grace", "40", "--config", str(config), AGENT)
    await r.ready()
    await r.until(lambda: r.log("recycle done") and r.log("slot draining"), 60)
    (reason,) = {line["reason"] for line in r.log("slot draining")}
    assert reason.startswith("recycle: ") and reason.endswith(" MB")
    r.kill()
    assert await r.exit() == 0
    await r.clean()


def fleet_of(*pids: int, is_stopping: bool = False) -> Any:
    generations = [SimpleNamespace(slot=n, number=1, pid=pid) for n, pid in enumerate(pids)]
    return SimpleNamespace(generations=generations, image_pids=set(), is_stopping=is_stopping)


async def looked(footprints: Footprints, at_most_every: float, is_done: Callable[[], object]) -> None:
    """Look until it is so: on a busy machine a look goes on after nobody waits for it any more."""
    async with asyncio.timeout(30):
        await footprints.look(at_most_every)
        while not is_done():
            await asyncio.sleep(0.01)


async def test_a_look_is_taken_as_seldom_as_it_may() -> None:
    """Figures count for a while. A new process is looked at, one that is gone is not. A stop reads none."""
    fleet = fleet_of(os.getpid(), 1 << 22)
    footprints = Footprints(fleet)
    await looked(footprints, LOOK_EVERY, lambda: footprints.looked_at is not None)
    first = footprints.looked_at
    own = footprints.of((0, 1))
    assert first is not None and own is not None and own.pss >= own.own_private > 0
    assert footprints.of((1, 1)) is None
    await footprints.look(LOOK_EVERY)
    assert footprints.looked_at == first
    await looked(footprints, 0.0, lambda: footprints.looked_at != first)
    assert footprints.looked_at > first
    fleet.image_pids.add(os.getpid())
    assert footprints.images() == []
    await looked(footprints, LOOK_EVERY, footprints.images)
    stopping = Footprints(fleet_of(os.getpid(), is_stopping=True))
    await stopping.look(0.0)
    assert stopping.looked_at is None
