"""How livekit-agents starts job processes: each is followed and may be delayed, and registration may wait.

lastcall can do without each private name here. A function that misses one changes nothing and returns False.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from lastcall.worker.base import setup_errors

# The tasks of `start_one`, where the pool has no place for them.
_trials: set[asyncio.Task[Any]] = set()


@dataclass(slots=True, eq=False)
class _Attempt:
    """One start of a job process. `future` is done once the process has initialised, or has failed to."""

    future: asyncio.Future[Any] | None = None
    is_settled: bool = False

    @property
    def error(self) -> BaseException | None:
        """Why it failed; None as long as that is not known."""
        future = self.future
        return future.exception() if future is not None and future.done() and not future.cancelled() else None

    @property
    def reason(self) -> str:
        error = self.error
        if error is None:
            return ""
        # The channel's own exception has no text.
        return str(error) or f"the process ended while it initialised ({type(error).__name__})"


def before_first_process(prepare: Callable[[Any], None]) -> bool:
    """Have `prepare(pool)` called before the server's pool starts its first process; tell whether it will be.

    A worker runs one server, which makes one pool inside `run()`, so the class is changed. Needs
    `ProcPool.start` and `ProcPool._proc_spawn_task`.
    """
    from livekit.agents.ipc import proc_pool

    kind: Any = getattr(proc_pool, "ProcPool", None)
    start = getattr(kind, "start", None)
    if start is None or not hasattr(kind, "_proc_spawn_task"):
        return False

    async def prepared(self: Any) -> None:
        prepare(self)
        await start(self)

    kind.start = prepared
    return True


def follow_processes(
    pool: Any,
    *,
    pause: Callable[[], Awaitable[object]],
    warm: Callable[[], None],
    failed: Callable[[str, bool], None],
) -> None:
    """Await `pause()` before each start of a process, and tell how it went: warm, or failed and why.

    A process that ends without ever having had a job has failed too. `failed` gets the reason, and whether
    the process was only too slow: livekit-agents gives it `initialize_process_timeout` (10 s).

    The pool starts a process in place of each that failed, ten times a second. A start that is paused counts
    as one under way, so that the pool adds no other. Needs `_proc_spawn_task`; `_initialize_fut` of the
    executor has the reason, and tells it before the pool has closed the failed process.
    """
    spawn = pool._proc_spawn_task
    # The pool emits its events within the task that starts the process.
    attempts: dict[asyncio.Task[Any] | None, _Attempt] = {}
    idle: list[Any] = []

    def settle(attempt: _Attempt, reason: str = "") -> None:
        if attempt.is_settled or getattr(pool, "_closed", False):
            return
        attempt.is_settled = True
        if reason:
            failed(reason, isinstance(attempt.error, TimeoutError))
        else:
            warm()

    def settle_failed(attempt: _Attempt) -> None:
        if attempt.reason:
            settle(attempt, attempt.reason)

    def on_created(executor: Any) -> None:
        attempt = attempts.get(asyncio.current_task())
        future = getattr(executor, "_initialize_fut", None)
        if attempt is not None and future is not None:
            attempt.future = future
            future.add_done_callback(lambda _: settle_failed(attempt))
            future.add_done_callback(lambda _: _end_shutdown(executor, future))

    def on_ready(executor: Any) -> None:
        attempt = attempts.get(asyncio.current_task())
        error = setup_errors.take()
        if error:  # the pool puts the executor into the queue behind this event
            asyncio.get_running_loop().call_soon(_take_from_queue, pool, executor)
        else:
            idle.append(executor)
        if attempt is not None:
            settle(attempt, error)

    def on_launched(executor: Any) -> None:
        if executor in idle:
            idle.remove(executor)

    def on_closed(executor: Any) -> None:
        if executor in idle:
            idle.remove(executor)
            # Only the newest versions do so: a process that is gone would be given a call.
            _take_from_queue(pool, executor)
            if executor.running_job is None:
                settle(_Attempt(), "the process ended while it waited for a job")

    async def paced() -> None:
        await pause()
        task = asyncio.current_task()
        attempt = attempts[task] = _Attempt()
        try:
            await spawn()
        except asyncio.CancelledError:
            attempt.is_settled = True  # the pool closes
            raise
        finally:
            del attempts[task]
            settle(attempt, attempt.reason or "the process could not be started")

    pool.on("process_created", on_created)
    pool.on("process_ready", on_ready)
    pool.on("process_job_launched", on_launched)
    pool.on("process_closed", on_closed)
    pool._proc_spawn_task = paced


def _end_shutdown(executor: Any, initialized: asyncio.Future[Any]) -> None:
    """Keep the close of a process that has failed to initialise from waiting for the process's shutdown.

    livekit-agents 1.5 waits without a limit, and nothing ends the wait if the end of the process is seen
    before its channel is read (`_supervise_task` in ipc/supervised_proc.py). The pool would start no other.
    """
    future = getattr(executor, "_shutting_down_fut", None)
    has_failed = initialized.cancelled() or initialized.exception() is not None
    if has_failed and future is not None and not future.done():
        future.set_result(None)


def _take_from_queue(pool: Any, executor: Any) -> None:
    """Take an executor out of those that wait for a job. Needs `_warmed_proc_queue`."""
    queue = getattr(pool, "_warmed_proc_queue", None)
    if queue is None:
        return
    waiting = [queue.get_nowait() for _ in range(queue.qsize())]
    for each in waiting:
        if each is not executor:
            queue.put_nowait(each)


def has_idle_process(pool: Any) -> bool:
    """Tell whether a process waits for a job. Needs `_warmed_proc_queue`."""
    queue = getattr(pool, "_warmed_proc_queue", None)
    return queue is None or not queue.empty()


def keeps_idle_processes(pool: Any) -> bool:
    """Tell whether the pool starts processes before there is a job. Needs `_default_num_idle_processes`."""
    return bool(getattr(pool, "_default_num_idle_processes", 1) > 0)


def start_one(pool: Any) -> None:
    """Start one process that waits for a job, as the pool does for a job that finds none.

    Needs `_proc_spawn_task`. `_spawn_tasks` owns the task, so that the close of the pool waits for it.
    """
    owner: set[asyncio.Task[Any]] = getattr(pool, "_spawn_tasks", _trials)
    task = asyncio.create_task(pool._proc_spawn_task())
    owner.add(task)
    task.add_done_callback(owner.discard)


def register_after(server: Any, is_ready: Callable[[], Awaitable[object]]) -> bool:
    """Have the server await `is_ready()` before it connects; tell whether it will.

    Needs `_connection_task`. `_connecting` keeps status messages out of the queue until there is a
    connection: livekit-agents sets it only once the connection task has begun.
    """
    connect = getattr(server, "_connection_task", None)
    if connect is None:
        return False

    async def connect_when_ready() -> None:
        await is_ready()
        await connect()

    def connection_task() -> Any:
        server._connecting = True
        return connect_when_ready()

    server._connection_task = connection_task
    return True


def is_full_by_load(server: Any) -> bool:
    """Tell whether livekit-agents itself says FULL for its load. Needs `_load_threshold`, `_worker_load`.

    The load counts jobs that have no process yet since 1.5 (`_get_effective_load`).
    """
    option = getattr(server, "_load_threshold", None)
    threshold = getattr(option, "prod_default", option)
    if threshold is None or getattr(server, "_proc_pool", None) is None:
        return False
    effective = getattr(server, "_get_effective_load", None)
    load = getattr(server, "_worker_load", 0.0) if effective is None else effective()
    try:
        return bool(load >= threshold)
    except TypeError:  # the load_fnc of the agent returned no number
        return False
