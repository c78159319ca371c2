"""A steady stream of dispatches, and what became of each."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import livekit.agents

from lastcall.worker.local.livekit_server import Dispatched
from tests.support.harness import Run

# Job processes of older versions cost more than a CPU second each.
NEWEST = tuple(int(part) for part in livekit.agents.__version__.split(".")[:2]) >= (1, 8)
RATE = 5.0 if NEWEST else 0.5
# Processes that wait for jobs, for the environment of the tests' agent.
IDLE = {"IDLE": "3" if NEWEST else "1"}


class Stream:
    """Dispatch `RATE` jobs a second for as long as the block runs; then wait until all have ended."""

    def __init__(self, r: Run, **spec: Any) -> None:
        self.results: list[Dispatched] = []
        self._run = r
        self._metadata = json.dumps({"sleep": 0.3, **spec})
        self._on = True

    async def __aenter__(self) -> Stream:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._group.create_task(self._flow())
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self._on = False
        await self._group.__aexit__(*exc)

    async def _flow(self) -> None:
        n = 0
        while self._on:
            self._group.create_task(self._one(f"stream-{n}"))
            n += 1
            await asyncio.sleep(1 / RATE)

    async def _one(self, room: str) -> None:
        self.results.append(await self._run.livekit.dispatch(room, metadata=self._metadata))

    async def some(self, count: int) -> None:
        """Wait until so many more have been dispatched."""
        target = len(self.results) + count
        await self._run.until(lambda: len(self.results) >= target, 60)

    @property
    def outcomes(self) -> dict[str, int]:
        return dict(Counter(result.outcome for result in self.results))

    async def all_ended(self) -> None:
        """Assert that every dispatch found a worker, and every job ended well, by itself."""
        assert set(self.outcomes) == {"assigned"}, (self.outcomes, self._run.logs())
        jobs = self._run.livekit.jobs
        await self._run.until(
            lambda: all(jobs[result.job_id].status != "JS_RUNNING" for result in self.results), 120
        )
        bad = {r.job_id: jobs[r.job_id] for r in self.results if jobs[r.job_id].status != "JS_SUCCESS"}
        assert not bad, (bad, self._run.logs())
        assert not any(jobs[result.job_id].forgotten for result in self.results)
