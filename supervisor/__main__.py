"""The `lastcall` command, also as `python -m supervisor`."""

import signal

# First of all, and before any import that takes time: a stop that comes now waits until somebody can handle
# it. The verbs that do not supervise let it in again at once. SIGCHLD is read from a signalfd later, which
# only works when every thread has it blocked, and threads inherit the mask of the one that starts them.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` puts the working directory first, where a worker.py of the user's would hide ours.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import asyncio
import traceback
from typing import NoReturn

import uvloop

from .errors import ConfigError, NotRunning, Refused, SupervisorError, UsageError
from .inbox import STOP_SIGNALS, Inbox, receive

SUPERVISING = frozenset({"run", "demo", "dev"})


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    if SUPERVISING.intersection(sys.argv[1:2]):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            _leave(runner.run(_supervise()))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP_SIGNALS, signal.SIGCHLD})
    _leave(asyncio.run(_command(None)))


async def _supervise() -> int:
    """Let the signals in once their handlers stand, then import the rest.

    In the running loop, because uvloop forgets what its handlers received before it ran.
    """
    inbox = Inbox()
    with receive(asyncio.get_running_loop(), inbox):
        return await _command(inbox)


async def _command(inbox: Inbox | None) -> int:
    from . import cli

    try:
        return await cli.main(sys.argv[1:], inbox)
    except UsageError as error:
        return _complain(error, 2)
    except ConfigError as error:
        return _complain(error, 78)
    except NotRunning as error:
        return _complain(error, 69)
    except Refused as error:
        return _complain(error, 1)
    except SupervisorError as error:
        return _complain(error, 70)
    except Exception:
        traceback.print_exc()  # a fault of ours; the workers, if any, drain by themselves
        return 70


def _complain(error: Exception, code: int) -> int:
    print(f"lastcall: {error}", file=sys.stderr)
    return code


def _leave(code: int) -> NoReturn:
    """End without the interpreter's own end: it would wait for a thread that may hang in a write for ever."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)


if __name__ == "__main__":
    main()
