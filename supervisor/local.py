"""The local dispatch server, as a process beside a demo or a dev run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from .errors import SupervisorError

START = 15.0
END = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalServer:
    """A running one, and the variables that point a worker at it."""

    pid: int
    environment: dict[str, str]


@asynccontextmanager
async def local_server(arguments: Sequence[str]) -> AsyncIterator[LocalServer]:
    """Run `python -m worker.local` for as long as the block runs. Raises SupervisorError if it won't.

    It is a process of its own, which ends with its standard input, so that it can't outlive us.
    """
    process = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-P", "-m", "worker.local", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        async with asyncio.timeout(START):
            line = await asyncio.to_thread(process.stdout.readline)
        if not line:
            raise SupervisorError("the local dispatch server did not start; its own message is above")
        yield LocalServer(pid=process.pid, environment=json.loads(line)["environment"])
    finally:
        process.stdin.close()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END)
        process.kill()
        process.stdout.close()
