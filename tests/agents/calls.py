"""The tests' agent. The metadata of a dispatch says what the job does. Jobs note their steps in `JOB_LOG`.

The metadata is a JSON object. Each key may be left out:

    sleep             seconds that the job runs
    mode              "sleep", "hold", "swallow", "block", "hungry", "leak", "blocking_leak",
                      "leaking_program", "program", "crash", "spawn", "fork", "thread", "to_thread",
                      "exit_handler" or "bad_exit"
    mb                megabytes of a leak
    held              whether a job of any mode waits first as one that holds
    after             seconds of a shutdown callback
    prints            lines that a job prints, in mode "sleep" first, in mode "hold" last
    request_sleep     seconds that request_fnc sleeps before it accepts the job
    request_block     seconds that request_fnc blocks the loop before it accepts the job
    request_linger    seconds that request_fnc goes on after it has accepted the job
    accepts           how often request_fnc accepts the job
    severs            descriptor of the worker whose connection request_fnc ends
    closes            descriptor of the worker that request_fnc closes, and another socket gets
    busy              whether the loop of the worker is kept half busy from then on

A job that holds goes on when the file `JOB_LOG` with ".go" behind it exists.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import json
import logging
import multiprocessing.util
import os
import socket
import subprocess
import sys
import time
from typing import Any

from livekit.agents import JobContext, JobExecutorType, JobProcess, JobRequest, WorkerOptions, cli

from lastcall.worker.base.memory import held_alone

# A program that ignores SIGTERM and left its parent's session.
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""

# Sockets that a worker writes into, and that nobody reads.
STRANGERS: list[socket.socket] = []

# A program that takes 40 MB a second and never ends.
LEAK = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
hoard = []
while True:
    hoard.append(b"x" * (4 << 20))
    time.sleep(0.1)
"""


def note(ctx: JobContext, what: str, **more: object) -> None:
    line = {
        "job": ctx.job.id,
        "room": ctx.room.name,
        "what": what,
        "pid": os.getpid(),
        "at": time.monotonic(),
    }
    with open(os.environ["JOB_LOG"], "a") as file:
        file.write(json.dumps({**line, **more}) + "\n")


async def entrypoint(ctx: JobContext) -> None:
    spec = json.loads(ctx.job.metadata or "{}")
    seconds = float(spec.get("sleep", 1.0))
    mode = spec.get("mode", "sleep")
    note(ctx, "started")
    logging.getLogger("calls").info("job began", extra={"mode": mode})

    async def callback() -> None:
        note(ctx, "callback")
        await asyncio.sleep(spec.get("after", 0))

    ctx.add_shutdown_callback(callback)
    if mode == "hold" or spec.get("held"):
        while not os.path.exists(os.environ["JOB_LOG"] + ".go"):
            await asyncio.sleep(0.02)
    if mode == "block":
        time.sleep(seconds)
    elif mode == "swallow":
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                await asyncio.sleep(end - time.monotonic())
            except asyncio.CancelledError:
                note(ctx, "swallowed")
    elif mode == "hungry":
        hoard = []
        while True:
            hoard.append(b"x" * (16 << 20))
    elif mode == "leaking_program":
        note(ctx, "leaks", child=subprocess.Popen([sys.executable, "-c", LEAK], start_new_session=True).pid)
        await asyncio.sleep(600)
    elif mode in ("leak", "blocking_leak"):
        hoard = []
        while held_alone(os.getpid()) < spec["mb"] << 20:
            hoard.append(b"x" * (4 << 20))
            await asyncio.sleep(0.1) if mode == "leak" else time.sleep(0.1)
        await asyncio.sleep(600)
    elif mode == "hold":
        print_lines(spec)
    elif mode == "fork":
        child_pid = os.fork()  # it inherits whatever the job has open, livekit-agents' pipes among it
        if child_pid == 0:
            time.sleep(600)
            os._exit(0)
        note(ctx, "forked", child=child_pid)
        await asyncio.sleep(seconds)
    elif mode == "thread":
        concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 600)
        await asyncio.sleep(seconds)
    elif mode == "to_thread":
        task = asyncio.create_task(asyncio.to_thread(time.sleep, 600))
        await asyncio.sleep(seconds)
        task.cancel()
    elif mode == "exit_handler":
        multiprocessing.util.Finalize(None, time.sleep, (600,), exitpriority=1)
        await asyncio.sleep(seconds)
    elif mode == "bad_exit":
        multiprocessing.util.Finalize(None, os._exit, (3,), exitpriority=1)
        await asyncio.sleep(seconds)
    elif mode == "crash":
        os._exit(3)
    elif mode == "spawn":
        child = subprocess.Popen(
            [sys.executable, "-c", STUBBORN], start_new_session=True, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        note(ctx, "spawned", child=child.pid)
        await asyncio.sleep(seconds)
    elif mode == "program":
        # A program of a job must be stoppable by SIGTERM, whatever protects the job itself.
        child = subprocess.Popen(["sleep", "600"])
        await asyncio.sleep(0.2)
        child.terminate()
        code = await asyncio.to_thread(child.wait, 5)
        note(ctx, "program", code=code, collects_after=gc.get_threshold()[0])
        await asyncio.sleep(seconds)
    else:
        print_lines(spec)
        await asyncio.sleep(seconds)
    note(ctx, "ended")
    ctx.shutdown(reason="done")


def print_lines(spec: dict[str, Any]) -> None:
    for _ in range(int(spec.get("prints", 0))):
        print("x" * 1000)


def stay_busy(loop: asyncio.AbstractEventLoop) -> None:
    """Keep the loop half busy with callbacks, for good."""
    time.sleep(0.005)
    loop.call_later(0.005, stay_busy, loop)


async def request(offer: JobRequest) -> None:
    spec = json.loads(offer.job.metadata or "{}")
    if spec.get("busy"):
        stay_busy(asyncio.get_running_loop())
    if "request_block" in spec:
        time.sleep(spec["request_block"])
    if "request_sleep" in spec:
        await asyncio.sleep(spec["request_sleep"])
    for _ in range(int(spec.get("accepts", 1))):
        await offer.accept()
    if "severs" in spec:
        # Not os.close: the next file would get the number, and the worker would close that file.
        with socket.socket(fileno=os.dup(spec["severs"])) as connection:
            connection.shutdown(socket.SHUT_RDWR)
    if "closes" in spec:
        STRANGERS.extend(socket.socketpair())
        os.dup2(STRANGERS[0].fileno(), spec["closes"], inheritable=False)
    if "request_linger" in spec:
        await asyncio.sleep(spec["request_linger"])


def half_busy() -> float:
    return 0.9 if os.path.exists(os.environ["JOB_LOG"] + ".busy") else 0.5


def prewarm(process: JobProcess) -> None:
    if os.path.exists(os.environ["JOB_LOG"] + ".slow"):
        time.sleep(600)
    if os.environ.get("PREWARM") == "raise" or os.path.exists(os.environ["JOB_LOG"] + ".raise"):
        raise RuntimeError("no model")
    if os.environ.get("PREWARM") == "bare":
        raise ConnectionError


if __name__ == "__main__":
    cli.run_app(
        WorkerOptions(
            entrypoint_fnc=entrypoint,
            request_fnc=request,
            prewarm_fnc=prewarm,
            # The load is that of the machine, and the server gives nothing to a worker whose load is 1.
            load_fnc=half_busy,
            load_threshold=float(os.environ.get("THRESHOLD", "inf")),
            max_retry=int(os.environ.get("MAX_RETRY", "16")),
            num_idle_processes=int(os.environ.get("IDLE", "1")),
            job_executor_type=JobExecutorType[os.environ.get("EXECUTOR", "PROCESS")],
        )
    )
