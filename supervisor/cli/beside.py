"""Work beside a supervisor, on which the supervisor does not depend: to watch files, or to show a table."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from lastcall.supervisor.app import App
from lastcall.worker.base.exit_codes import Exit

Work = Callable[[], Coroutine[Any, Any, None]]


async def run_with(app: App, work: Mapping[str, Work]) -> Exit:
    """Run a supervisor to its end, and other work, by name, for as long as the supervisor runs.

    Work that fails is one line of the log, and nothing else. Raises what `App.run` raises.
    """
    failure: Exception | None = None
    code = Exit.FAULT
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_guarded(app, name, each), name=name) for name, each in work.items()]
        try:
            code = await app.run()
        except Exception as error:  # raised below: a task group would wrap it
            failure = error
        for task in tasks:
            task.cancel()
    if failure is not None:
        raise failure
    return code


async def _guarded(app: App, name: str, work: Work) -> None:
    try:
        await work()
    except Exception as error:
        app.log.warning("goes on without", what=name, reason=f"{type(error).__name__}: {error}")
