"""An agent whose jobs use `lastcall.call`, and note what they are told.

The metadata may have `stuck`, for a loop that does not turn until the test permits the end, and `extend`, the
seconds that the job asks for when its deadline has moved. A job that asks for more goes on for a second
beyond that deadline. Every job ends once the test permits it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time

from livekit.agents import JobContext, JobExecutorType, WorkerOptions, cli

import lastcall


def note(ctx: JobContext, what: str, **more: object) -> None:
    line = {"job": ctx.job.id, "what": what, "pid": os.getpid(), "at": time.monotonic(), **more}
    with open(os.environ["JOB_LOG"], "a") as file:
        file.write(json.dumps(line) + "\n")


def may_end() -> bool:
    return os.path.exists(os.environ["JOB_LOG"] + ".go")


async def entrypoint(ctx: JobContext) -> None:
    spec = json.loads(ctx.job.metadata or "{}")
    call = lastcall.call(ctx)
    moved: asyncio.Future[lastcall.Notice] = asyncio.get_running_loop().create_future()

    @call.on_stopping
    async def told(notice: lastcall.Notice) -> None:
        note(
            ctx,
            "told" if notice.is_first else "told again",
            reason=notice.reason,
            deadline=notice.deadline,
            left=notice.seconds_left,
        )
        if not notice.is_first and not moved.done():
            moved.set_result(notice)

    note(ctx, "started", inert=call.is_inert, same=lastcall.call(ctx) is call)
    if spec.get("stuck"):
        await asyncio.sleep(0.1)
        note(ctx, "stuck")
        while not may_end():
            time.sleep(0.02)
    notice = await call.stopping
    note(ctx, "heard", reason=notice.reason, deadline=notice.deadline)
    if "extend" in spec:
        deadline = (await moved).deadline
        note(ctx, "extended", deadline=await call.extend(spec["extend"]))
        await asyncio.sleep(deadline + 1 - time.monotonic())
    while not may_end():
        await asyncio.sleep(0.02)
    note(ctx, "ended")
    ctx.shutdown(reason="done")


def half_busy() -> float:
    return 0.5


if __name__ == "__main__":
    cli.run_app(
        WorkerOptions(
            entrypoint_fnc=entrypoint,
            load_fnc=half_busy,
            load_threshold=float("inf"),
            num_idle_processes=int(os.environ.get("IDLE", "1")),
            job_executor_type=JobExecutorType[os.environ.get("EXECUTOR", "PROCESS")],
        )
    )
