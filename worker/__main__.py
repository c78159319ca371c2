"""`python -m lastcall.worker TARGET`: host one agent, with or without a supervisor."""

import signal

if __name__ == "__main__":
    # First of all: a stop that comes while the imports below run waits until somebody can handle it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    for _number in (signal.SIGHUP, signal.SIGUSR1):
        # Meant for the supervisor, and harmless here. Not ignored: that would be inherited through exec.
        if signal.getsignal(_number) is signal.SIG_DFL:
            signal.signal(_number, lambda *_: None)

import asyncio
import faulthandler
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

import uvloop

from lastcall.worker import scratch
from lastcall.worker import target as loading
from lastcall.worker.base import garbage, target_form, variables
from lastcall.worker.base.channel import Control
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.errors import Incompatible, StartError, TargetError
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.process import leave
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.base.stopping import SUPERVISOR_SIGNALS, Stopping
from lastcall.worker.base.wire import FOR_WORKER, Fault, Loaded, WorkerHears, WorkerSays, shortened
from lastcall.worker.sdk import forkserver, image_process

if TYPE_CHECKING:
    from lastcall.worker.host import Host


log = logging.getLogger("lastcall.worker")


def main() -> NoReturn:
    """Run the worker and end the process with its exit code."""
    given = target_form.read_words(sys.argv[1:])
    if given is None:
        print("usage: python -m lastcall.worker TARGET [--args ARG...]", file=sys.stderr)
        raise SystemExit(Exit.USAGE)
    settings = WorkerSettings.take(os.environ)
    imports = None
    if settings.is_image:
        # Returns in each worker that the image forks; the image itself ends there.
        with garbage.no_collections():
            settings, imports = image_process.serve(
                settings, lambda: _run_target(*given), loading.parts_of(given[0])
            )
    for fd in (*settings.output_fds, settings.control_fd, settings.lifeline_fd):
        if fd is not None:
            os.set_inheritable(fd, False)
    # The one signal without a loop handler: its use is to show where a loop that runs no handler is stuck.
    faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SUPERVISOR_SIGNALS)
    with garbage.no_collections():
        # While there is one thread, and before anything of the agent is imported.
        forkserver.fork(imports)
    os.environ[variables.WORKER_PID] = str(os.getpid())
    if settings.scratch:
        scratch.use(settings.scratch)
    changed = Condition()
    stopping = Stopping(changed)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        # The target is loaded before the loop runs, as it would be without lastcall. The signals stay
        # blocked until then: uvloop forgets what its handlers received before it ran, the kernel does not.
        code = _host(runner, settings, stopping, changed, *given)
        # Not by the end of the interpreter: livekit-agents has threads that never end, and 10 ms would go by.
        scratch.remove()
        leave(code)


def _host(
    runner: asyncio.Runner,
    settings: WorkerSettings,
    stopping: Stopping,
    changed: Condition,
    target: str,
    arguments: list[str],
) -> int:
    from lastcall.worker.sdk import preflight

    try:
        preflight.check()
    except Incompatible as error:
        # Not by the host: its import needs names that may be missing.
        return _fault(_control(settings), Exit.CONFIG, error, "")
    from lastcall.worker.host import Host
    from lastcall.worker.sdk import agent_server

    host = Host(settings, stopping, changed)
    try:
        with garbage.no_collections():
            _load(host, runner.get_loop(), target, arguments)
    except TargetError as error:
        return _fault(host.control, Exit.CONFIG, error, error.traceback)
    except Incompatible as error:
        return _fault(host.control, Exit.CONFIG, error, "")
    except StartError as error:
        return _fault(host.control, Exit.FAILED, error, error.traceback)
    code = runner.run(host.run())
    if host.engine is not None and host.engine.error is not None:
        failure = host.engine.error
        try:
            loading.check_server_is_known(target, agent_server.missing_of_run(host.engine.server, failure))
        except TargetError as error:
            return _fault(host.control, Exit.CONFIG, error, error.traceback)
        code = Exit.CONFIG if isinstance(failure, Incompatible) else code
        return _fault(host.control, code, failure, loading.users_traceback(failure))
    return code


def _run_target(text: str, arguments: list[str]) -> None:
    """Load the target as a worker does, in a process that is to tell what that imports. Raises anything."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop()
        from lastcall.worker.sdk import agent_server

        loading.load(
            loading.parse(text, arguments),
            record=agent_server.record_run_app,
            refuse_to_run=agent_server.refuse_to_run,
            classify=agent_server.as_server,
        )


def _control(settings: WorkerSettings) -> Control[WorkerSays, WorkerHears]:
    """Return the control channel, for a worker that has nothing to hear."""
    sock = None if settings.control_fd is None else socket.socket(fileno=settings.control_fd)
    return Control(sock, FOR_WORKER, lambda _message: None, lambda: None)


def _load(host: "Host", loop: asyncio.AbstractEventLoop, text: str, arguments: list[str]) -> None:
    target = loading.parse(text, arguments)
    from lastcall.worker.sdk import agent_server, child_processes, preflight
    from lastcall.worker.shield import raise_shield

    raise_shield(loop)
    child_processes.lock_process_poll()
    child_processes.start_while_others_end()
    child_processes.preload_ours()
    child_processes.keep_interrupt_handler()
    child_processes.end_log_pipes()
    from lastcall.worker.inworld.plugin import attached  # noqa: F401  # in place before the target imports the plugin

    server = loading.load(
        target,
        record=agent_server.record_run_app,
        refuse_to_run=agent_server.refuse_to_run,
        classify=agent_server.as_server,
    )
    lacks = preflight.check()  # again: the target may have replaced parts of livekit-agents
    if not agent_server.has_entrypoint(server):
        raise TargetError(
            f"{text}: its AgentServer has no @server.rtc_session() function, so no job could run"
        )
    local_url = host.settings.local_url
    url = agent_server.url_of(server)
    if local_url:
        _refuse_other_server(text, url, local_url)
    else:
        loading.check_server_is_known(text, agent_server.missing_of(server))
        loading.check_server_url(text, url)
    agent_server.set_up_logging(server, coloured=host.settings.coloured)
    for lack in lacks:
        log.warning("a private name is missing", extra={"missing": lack.text, "instead": lack.name.without})
    agent_server.use_private_ports(server)
    agent_server.use_private_metrics_dir(server, f"slot-{host.settings.slot}-{host.settings.generation}")
    from lastcall.worker.job.rehearsed import RehearsedEntrypoint
    from lastcall.worker.job.room_watch import WatchedEntrypoint
    from lastcall.worker.job.setup import Setup

    server.setup_fnc = Setup(
        server.setup_fnc, host.calls_over.writer, host.calls.address, is_local=bool(local_url)
    )
    rehearsal = host.settings.rehearsal
    if rehearsal is not None:
        agent_server.wrap_entrypoint(server, lambda user: RehearsedEntrypoint(user, rehearsal))
        agent_server.disregard_load(server)
    agent_server.wrap_entrypoint(server, WatchedEntrypoint)
    host.adopt(server)
    host.control.say(Loaded(agent_name=shortened(agent_server.agent_name(server))))


def _refuse_other_server(text: str, url: str, local_url: str) -> None:
    """Refuse a server object that would not connect to the local server.

    Raises TargetError. Its worker would take real calls, run them in local rooms, and end with the verb.
    """
    address = loading.address_of(url)
    if address != loading.address_of(local_url):
        raise TargetError(
            f"{text}: its server would connect to {address or 'no URL'}, and only the local server"
            f" {local_url} is allowed here: let LIVEKIT_URL of the environment win, without ws_url= and"
            " without load_dotenv(override=True)"
        )


def _fault(control: Control[WorkerSays, WorkerHears], code: int, error: BaseException, traceback: str) -> int:
    control.say(Fault(exit=code, message=shortened(str(error)), traceback=shortened(traceback)))
    if not control.is_supervised:
        if traceback:
            print(traceback, file=sys.stderr, end="")
        print(f"lastcall: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
