"""The local servers, each as a process beside a demo or a dev run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from lastcall.supervisor.errors import SupervisorError

# Seconds. Ours: a start imports livekit's protocol, which takes long on a busy machine.
START_TIMEOUT = 15.0
END_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalServer:
    """A local server that runs. `where` are its addresses, and the variables that point at them."""

    pid: int
    where: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        return dict(self.where["environment"])


@asynccontextmanager
async def local_server(module: str, arguments: Sequence[str]) -> AsyncIterator[LocalServer]:
    """Run `python -m MODULE` for as long as the block runs. Raises SupervisorError when it does not start.

    The server ends with its standard input, so that it can't outlive the process that started it.
    """
    process = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        try:
            async with asyncio.timeout(START_TIMEOUT):
                line = await asyncio.to_thread(process.stdout.readline)
        except TimeoutError:
            raise SupervisorError(
                f"{module} did not start within {START_TIMEOUT:g} s: the machine is busy, try again"
            ) from None
        if not line:
            raise SupervisorError(f"{module} did not start; its own message is above")
        yield LocalServer(pid=process.pid, where=json.loads(line))
    finally:
        process.stdin.close()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT)
        process.kill()
        process.stdout.close()
