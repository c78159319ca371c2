"""Every private name of livekit-agents that lastcall touches, and of multiprocessing beneath it.

livekit-agents from 1.3.12 on is supported, and its private side differs between versions. `names` lists the
private names, and `preflight` has looked for them before a function here runs. So a function looks only for
a name that a stop can do without. `tests/test_compat.py` runs each of them on each supported version.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import math
import os
import signal
import traceback
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal, NoReturn

import aiohttp
import livekit.agents
import livekit.agents.cli
from livekit.agents import AgentServer, JobRequest, WorkerOptions
from livekit.agents.utils.aio import ChanClosed
from livekit.protocol import agent

from lastcall.worker.base import loggers, succession
from lastcall.worker.base.succession import Succession
from lastcall.worker.sdk import child_processes

log = logging.getLogger("lastcall.worker")

# Part of the path of each file of livekit-agents.
IN_LIVEKIT_AGENTS = f"{os.sep}livekit{os.sep}agents{os.sep}"
# The attributes that a server object needs to run, each with the variable in place of the argument.
NEEDED = {
    "_ws_url": "LIVEKIT_URL",
    "_api_key": "LIVEKIT_API_KEY",
    "_api_secret": "LIVEKIT_API_SECRET",
}
# Loop turns between the user's accept() and the answer. A signal or a control message that arrived while the
# loop was blocked is read in the first turn and queued as a callback. The callback runs in the second turn,
# and may wake a task that runs in the third. One is to spare.
GATE_TURNS = 4


# -- before the target is loaded ---------------------------------------------------------------------------


def record_run_app(run_app: Callable[[Any], NoReturn]) -> None:
    """Put `run_app` in place of livekit's own, wherever user code can import it from."""
    livekit.agents.cli.run_app = run_app
    with contextlib.suppress(ImportError):
        from livekit.agents.cli import cli as module

        if hasattr(module, "run_app"):
            module.run_app = run_app


def refuse_to_run(refuse: Callable[[AgentServer], NoReturn]) -> Callable[[AgentServer], None]:
    """Have `refuse` called in place of each run of a server; return a function that lets one server run.

    `AgentServer.run` is public. The servers of a target may be of a class that calls it by super().
    """
    run: Any = AgentServer.run
    permitted: list[AgentServer] = []

    @functools.wraps(run)
    def refused(self: AgentServer, *arguments: Any, **options: Any) -> Any:
        if self not in permitted:
            refuse(self)
        return run(self, *arguments, **options)

    AgentServer.run = refused
    return permitted.append


def set_up_logging(server: AgentServer | None, *, coloured: bool) -> None:
    """Log as `python agent.py start` would: JSON lines on standard output, job processes included."""
    from livekit.agents.cli import log as cli_log

    loggers.enable()
    level = (os.environ.get("LIVEKIT_LOG_LEVEL") or _log_level(server)).upper()  # the CLI takes any case
    cli_log.setup_logging(level, devmode=coloured, console=False)


def _log_level(server: AgentServer | None) -> str:
    level = getattr(server, "log_level", "INFO")  # since 1.5
    return str(getattr(level, "prod_default", level))


# -- the server, before it runs ----------------------------------------------------------------------------


def as_server(value: object) -> AgentServer | None:
    """Return the AgentServer that the value is or describes, or None."""
    if isinstance(value, AgentServer):
        return value
    if isinstance(value, WorkerOptions):
        return AgentServer.from_server_options(value)
    return None


def url_of(server: AgentServer) -> str:
    """Return the URL that the server object will connect to."""
    return str(server._ws_url or "")


def missing_of(server: AgentServer) -> list[str]:
    """Return the variables without which `run()` of the server object would raise ValueError.

    The constructor has read the environment, so nothing that the agent sets is left out. A class that
    overrides `run` may set a URL there, so the list of its servers is empty.
    """
    return _missing(server) if type(server).run is AgentServer.run else []


def missing_of_run(server: AgentServer, error: BaseException) -> list[str]:
    """Return the variables for the lack of which a `run()` has ended with the error; else an empty list.

    A class that overrides `run` had its turn when the `run` of livekit-agents refuses. An error of the class
    itself is none of these: a lookup of the URL may succeed at the next start.
    """
    frames = traceback.extract_tb(error.__traceback__)
    is_theirs = frames != [] and frames[-1].name == "run" and IN_LIVEKIT_AGENTS in frames[-1].filename
    return _missing(server) if is_theirs else []


def _missing(server: AgentServer) -> list[str]:
    return [variable for name, variable in NEEDED.items() if not getattr(server, name, "not known")]


def has_entrypoint(server: AgentServer) -> bool:
    """Tell whether an rtc_session was registered; without one `run()` raises."""
    return server._entrypoint_fnc is not None


def wrap_entrypoint(server: AgentServer, wrap: Callable[[Callable[[Any], Awaitable[None]]], Any]) -> None:
    """Put a wrapper, which job processes have to be able to unpickle, in the entrypoint's place."""
    if server._entrypoint_fnc is not None:
        server._entrypoint_fnc = wrap(server._entrypoint_fnc)


def disregard_load(server: AgentServer) -> None:
    """Have the worker take jobs on a machine that is busy with something else, as that of a pipeline is.

    The `load_fnc` of the agent is not asked. Needs `_load_threshold`, because the public `update_options` of
    1.3 resets timeouts. Without the name a worker takes a second job only when the first has begun.
    """
    server.load_fnc = _no_load
    if hasattr(server, "_load_threshold"):
        server._load_threshold = math.inf


def _no_load() -> float:
    return 0.0


def use_private_ports(server: AgentServer) -> None:
    """Have health and metrics ports chosen by the kernel, on loopback: N workers share one host."""
    server._port, server._host = 0, "127.0.0.1"
    if server._prometheus_port is not None:
        server._prometheus_port = 0


def use_private_metrics_dir(server: AgentServer, suffix: str) -> None:
    """Give this worker a private Prometheus directory: livekit-agents empties the directory at start."""
    base = server._prometheus_multiproc_dir or os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if base:
        path = os.path.join(base, suffix)
        os.makedirs(path, exist_ok=True)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = path
        server._prometheus_multiproc_dir = path


# The answer to an offer. After `no` the server asks the next worker, after `never` it asks none.
Answer = Literal["yes", "no", "never"]
Admit = Callable[[Any, Succession | None], Answer]
Settle = Callable[[str, BaseException | None], None]


def gate_requests(server: AgentServer, *, admit: Admit, settle: Settle) -> None:
    """Have every `accept()` pass `admit(job, succession)` at the last moment, and report how it went.

    `settle(id, error)` is called once the accept has returned or raised. The first answer to an offer is the
    answer: livekit-agents would send a second one too, and a second accept would wait for an assignment that
    never comes while the job runs.

    An offer for a call that is handed over is shown to `request_fnc` as that of the call's first job. The new
    agent has the identity that the dispatch names, whatever `request_fnc` wants.
    """
    user: Callable[[JobRequest], Awaitable[None]] | None = server._request_fnc

    async def request(offer: JobRequest) -> None:
        accept, reject = offer._on_accept, offer._on_reject
        # An older livekit-protocol has no attributes of a job.
        found = succession.taken_from(getattr(offer.job, "attributes", {}))
        answered = False

        def is_second() -> bool:
            nonlocal answered
            before, answered = answered, True
            if before:
                log.warning("second answer to one offer is ignored", extra={"job_id": offer.job.id})
            return before

        async def refuse(terminate: bool) -> None:
            if not is_second():
                await reject(terminate)

        async def gated(arguments: Any) -> None:
            if is_second():
                return
            for _ in range(GATE_TURNS):
                await asyncio.sleep(0)
            answer = admit(offer.job, found)
            if answer != "yes":
                await reject(answer == "never")
                return
            if found is not None:
                offer.job.attributes.update(found.attributes())  # for the job, which takes them out again
                arguments.identity = found.identity
                arguments.attributes = {**(arguments.attributes or {}), **found.shown}
            # From here to the send inside accept() lastcall awaits nothing.
            error: BaseException | None = None
            try:
                await accept(arguments)
            except BaseException as raised:
                error = raised
                raise
            finally:
                settle(offer.job.id, error)

        offer._on_accept, offer._on_reject = gated, refuse
        if user is None:
            await offer.accept()
        else:
            await user(offer)

    server._request_fnc = request


def take_terminations(server: AgentServer, terminated: Callable[[str], None]) -> None:
    """Call back with the id of each job that the LiveKit server terminates, and do nothing else.

    livekit-agents asks the job to shut down, and kills it 10 s after its agent has left the room.
    """

    async def handle(message: agent.JobTermination) -> None:
        terminated(message.job_id)

    server._handle_termination = handle


def is_unassigned(error: BaseException) -> bool:
    """Tell whether an accept failed because the server never assigned the job."""
    return type(error).__name__ == "AssignmentTimeoutError"


# -- the server, while it runs -----------------------------------------------------------------------------


def watch_jobs(
    server: AgentServer, *, launched: Callable[[Any], None], closed: Callable[[Any], None]
) -> None:
    """Call back with the executor of each launched job and of each closed process."""
    server._proc_pool.on("process_job_launched", launched)
    server._proc_pool.on("process_closed", closed)


def watch_processes(server: AgentServer, started: Callable[[Any], None]) -> None:
    """Call back with each executor whose process has initialised."""
    server._proc_pool.on("process_ready", started)


def executors(server: AgentServer) -> list[Any]:
    """Return the executors of all job processes, idle ones included; none before the pool exists."""
    pool = getattr(server, "_proc_pool", None)
    return [] if pool is None else list(pool.processes)


def job_of(executor: Any) -> Any | None:
    """Return the livekit Job that an executor runs or ran, or None."""
    info = executor.running_job
    return None if info is None else info.job


def has_warm_process(server: AgentServer) -> bool:
    """Tell whether a process waits for the next job; true as well when none is meant to."""
    pool = getattr(server, "_proc_pool", None)
    queue = getattr(pool, "_warmed_proc_queue", None)
    if queue is None or getattr(pool, "_default_num_idle_processes", 0) == 0:
        return True
    return not queue.empty()


def cancel_start() -> None:
    """Cancel the start of a server, from its `worker_started`: `run()`, and the tasks that are to run next.

    One of these would connect. They are found by their code, because the names by which a server knows its
    tasks may be those that it lacks. The task that waits for a warm process is of this package.
    """
    current = asyncio.current_task()
    places = (IN_LIVEKIT_AGENTS, os.path.dirname(__file__))
    for task in asyncio.all_tasks():
        coroutine: Any = task.get_coro()
        is_new = inspect.iscoroutine(coroutine) and inspect.getcoroutinestate(coroutine) == "CORO_CREATED"
        if task is current or (is_new and any(place in coroutine.cr_code.co_filename for place in places)):
            task.cancel()


def connect_directly(server: AgentServer) -> None:
    """Have the worker connect to its server past the proxy; jobs keep the proxy for all that they do.

    At `worker_started`: job processes have been told the proxy, and the connection has not begun. Needs
    `_http_proxy` and `_http_session`.
    """
    through_proxy = getattr(server, "_http_session", None)
    if through_proxy is None or not getattr(server, "_http_proxy", None):
        return
    server._http_session = aiohttp.ClientSession(connector=through_proxy.connector)
    through_proxy.detach()
    server._http_proxy = None


def is_connected(server: AgentServer) -> bool:
    """Tell whether the worker is registered over a live connection right now."""
    connection = getattr(server, "_conn_task", None)
    return connection is not None and not connection.done() and not getattr(server, "_connecting", True)


def has_given_up(server: AgentServer) -> bool:
    """Tell whether the connection was given up for good (older versions only set a flag)."""
    return bool(getattr(server, "_connection_failed", False))


def load_of(server: AgentServer) -> float:
    """Return the load that the worker last measured, 0 to 1; 0 where its load_fnc returned no number."""
    try:
        return float(getattr(server, "_worker_load", 0.0))
    except (TypeError, ValueError):
        return 0.0


async def announce(server: AgentServer, *, full: bool) -> None:
    """Tell the server at once that this worker takes no jobs, or takes them again.

    `drain()` would do the first, but holds the server's lock until the last job has ended, so that `aclose()`
    could not be called in time; and it can't be undone.
    """
    server._draining = full
    if getattr(server, "_msg_chan", None) is not None:
        try:
            await server._update_worker_status()
        except ChanClosed:
            pass
        except (TypeError, ValueError) as error:  # the load_fnc of the agent returned no number
            log.warning("the LiveKit server can't be told the load", extra={"error": repr(error)})


async def flush(server: AgentServer) -> None:
    """Return when every message queued for the server has been handed to the socket."""
    channel = getattr(server, "_msg_chan", None)
    while channel is not None and is_connected(server):
        for _ in range(GATE_TURNS):
            await asyncio.sleep(0)
        if channel.empty():
            return
        await asyncio.sleep(0.001)


async def report_failed(server: AgentServer, job_id: str) -> None:
    """Tell the server that an assigned job has failed; for one that no process was ever given.

    livekit-agents itself reports only jobs that had a process.
    """
    await _report(server, job_id, agent.JobStatus.JS_FAILED)


async def report_succeeded(server: AgentServer, job_id: str) -> None:
    """Tell the server that a job has ended well, before its process has.

    livekit-agents says so again when the process has ended, and the server takes the first word.
    """
    await _report(server, job_id, agent.JobStatus.JS_SUCCESS)


async def _report(server: AgentServer, job_id: str, status: agent.JobStatus) -> None:
    update = agent.UpdateJobStatus(job_id=job_id, status=status)
    with contextlib.suppress(ChanClosed):
        await server._queue_msg(agent.WorkerMessage(update_job=update))


def drop_requests(server: AgentServer) -> int:
    """Cancel the `request_fnc` calls that still run and keep `aclose()` from waiting for them; say how many.

    Their jobs, if they accepted one, are over. The set is there once the server runs.
    """
    names = ("_job_lifecycle_tasks", "_tasks")
    tasks: set[asyncio.Task[Any]] = next((getattr(server, n) for n in names if hasattr(server, n)), set())
    dropped = [task for task in tasks if not task.done()]
    for task in dropped:
        task.cancel()
    tasks.clear()
    return len(dropped)


def call_is_over(executor: Any) -> Any:
    """Have the job count as a good one, whatever its process still does; return what has the true exit code.

    livekit-agents judges a job by the exit code of its process. For the thread executor the answer is None.
    """
    return child_processes.count_as_good(getattr(executor, "_proc", None))


def is_ending(executor: Any) -> bool:
    """Tell whether a job has begun to shut down by itself (since 1.5; older versions don't say)."""
    future = getattr(executor, "_shutting_down_fut", None)
    return future is not None and future.done()


async def ask_to_end(executor: Any, seconds: float) -> None:
    """Ask a job to shut down, as the server's termination does, and wait for its process to end.

    livekit-agents kills a job that has not acknowledged within `close_timeout` (10 s by default), with the
    job's callbacks unrun. lastcall keeps the deadline, so that of livekit-agents is moved out of the way.
    """
    options = getattr(executor, "_opts", None)
    if options is not None and hasattr(options, "close_timeout"):
        options.close_timeout = seconds + 60.0
    await executor.aclose()


def kill(executor: Any) -> None:
    """SIGKILL the process of an executor at once. livekit-agents' own kill waits half a second first."""
    pid = getattr(executor, "pid", None)
    if pid is None or pid == os.getpid():
        return  # the thread executor: its job ends with the worker
    if hasattr(executor, "_kill_sent"):
        executor._kill_sent = True  # else it logs an error for an exit that was meant
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the pid may be another program's by now
        os.kill(pid, signal.SIGKILL)


def let_go_of_processes(server: AgentServer) -> int:
    """Kill every process that runs no job, and keep `aclose()` from waiting for them; return how many.

    On 1.5 the pool's own close never returns when it finds a process that is still starting. Nothing is lost
    with processes that run no job, so the pool starts no more and is not closed: the worker is about to end.
    """
    pool = getattr(server, "_proc_pool", None)
    idle = executors(server)
    inference = getattr(server, "_inference_executor", None)
    for executor in (*idle, *(() if inference is None else (inference,))):
        kill(executor)
    if pool is not None and hasattr(pool, "_closed"):

        async def aclose() -> None:
            pool._closed = True

        pool.aclose = aclose
    return len(idle)


def forkserver_pids() -> Iterable[int]:
    """Return the pid of the forkserver, once it runs."""
    from multiprocessing import forkserver

    pid = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    return () if pid is None else (pid,)


def agent_name(server: AgentServer) -> str:
    """Return the name under which the agent is dispatched explicitly; empty for automatic dispatch."""
    return str(getattr(server, "_agent_name", ""))
