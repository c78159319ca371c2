"""The `lastcall` command, also as `python -m supervisor`."""

import signal

# First of all, and before any import that takes time: a stop that comes now waits until somebody can handle
# it. The verbs that do not supervise let it in again at once. SIGCHLD is read from a signalfd later, which
# only works when every thread has it blocked, and threads inherit the mask of the one that starts them.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})

import asyncio
import os
import sys
import traceback
from typing import NoReturn

import uvloop

from .errors import ConfigError, NotRunning, UsageError
from .inbox import STOP_SIGNALS, Inbox, receive

SUPERVISING = frozenset({"run", "demo"})


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    if not SUPERVISING.intersection(sys.argv[1:2]):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP_SIGNALS, signal.SIGCHLD})
        _leave(_command(None, None))
    inbox = Inbox()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, receive(runner.get_loop(), inbox):
        _leave(_command(runner, inbox))


def _command(runner: asyncio.Runner | None, inbox: Inbox | None) -> int:
    from . import cli

    try:
        return cli.main(sys.argv[1:], runner, inbox)
    except UsageError as error:
        return _complain(error, 2)
    except ConfigError as error:
        return _complain(error, 78)
    except NotRunning as error:
        return _complain(error, 69)
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
