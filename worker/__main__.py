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
import os
import sys
from typing import TYPE_CHECKING, NoReturn

import uvloop

from lastcall.worker import scratch
from lastcall.worker import target as loading
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.errors import Incompatible, StartError, TargetError
from lastcall.worker.base.settings import Settings
from lastcall.worker.base.stopping import OTHERS, Stopping
from lastcall.worker.base.wire import Fault, Loaded

if TYPE_CHECKING:
    from lastcall.worker.host import Host

EX_FAILED = 1
EX_USAGE = 2
EX_CONFIG = 78


def main() -> NoReturn:
    """Run the worker and end the process with its exit code."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m lastcall.worker TARGET", file=sys.stderr)
        raise SystemExit(EX_USAGE)
    settings = Settings.take(os.environ)
    for fd in (*settings.output_fds, settings.control_fd, settings.lifeline_fd):
        if fd is not None:
            os.set_inheritable(fd, False)
    # The one signal without a loop handler: its use is to show where a loop that runs no handler is stuck.
    faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OTHERS)
    os.environ["LASTCALL_WORKER_PID"] = str(os.getpid())
    if settings.scratch:
        scratch.use(settings.scratch)
    changed = Condition()
    stopping = Stopping(changed)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        # The target is loaded before the loop runs, as it would be in a program of its own. The signals stay
        # blocked until then: uvloop forgets what its handlers received before it ran, the kernel does not.
        code = _host(runner, settings, stopping, changed, sys.argv[1])
        # Nothing is left to do that an interpreter's end would do better: threads that livekit-agents never
        # ends would be joined, and 10 ms go by. Output is all that has to get out.
        scratch.remove()
        _leave(code)


def _host(
    runner: asyncio.Runner, settings: Settings, stopping: Stopping, changed: Condition, target: str
) -> int:
    from lastcall.worker.host import Host

    host = Host(settings, stopping, changed)
    try:
        _load(host, runner.get_loop(), target)
    except TargetError as error:
        return _fault(host, EX_CONFIG, error, error.traceback)
    except Incompatible as error:
        return _fault(host, EX_CONFIG, error, "")
    except StartError as error:
        return _fault(host, EX_FAILED, error, error.traceback)
    code = runner.run(host.run())
    if host.engine is not None and host.engine.error is not None:
        failure = host.engine.error
        return _fault(host, code, failure, loading.users_traceback(failure))
    return code


def _load(host: "Host", loop: asyncio.AbstractEventLoop, text: str) -> None:
    target = loading.parse(text)
    from lastcall.worker.sdk import agent_server, child_processes
    from lastcall.worker.shield import raise_shield

    raise_shield(loop)
    child_processes.lock_process_poll()
    child_processes.preload_ours()
    child_processes.keep_interrupt_handler()
    child_processes.end_log_pipes()
    from lastcall.worker.inworld.plugin import attached  # noqa: F401  # in place before the target imports the plugin

    server = loading.load(target, record=agent_server.record_run_app, classify=agent_server.as_server)
    if not agent_server.has_entrypoint(server):
        raise TargetError(
            f"{text}: its AgentServer has no @server.rtc_session() function, so no job could run"
        )
    agent_server.set_up_logging(server, coloured=host.settings.coloured)
    agent_server.use_private_ports(server)
    agent_server.use_private_metrics_dir(server, f"slot-{host.settings.slot}-{host.settings.generation}")
    from lastcall.worker.job.setup import Held, Setup

    server.setup_fnc = Setup(server.setup_fnc)
    if host.settings.hold:
        agent_server.wrap_entrypoint(server, lambda user: Held(user, host.settings.hold))
    host.adopt(server)
    host.control.say(Loaded(agent_name=agent_server.agent_name(server)))


def _fault(host: "Host", code: int, error: BaseException, traceback: str) -> int:
    host.control.say(Fault(exit=code, message=str(error), traceback=traceback))
    if not host.control.is_supervised:
        if traceback:
            print(traceback, file=sys.stderr, end="")
        print(f"lastcall: {error}", file=sys.stderr)
    return code


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # nobody reads any more
    os._exit(code)


if __name__ == "__main__":
    main()
