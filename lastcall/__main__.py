"""The `lastcall` command, also as `python -m lastcall`."""

import signal

# First of all, and before any import that takes time: a stop that comes now waits until somebody can handle
# it. The verbs that do not supervise let it in again at once. SIGCHLD is read from a signalfd later, which
# only works when every thread has it blocked, and threads inherit the mask of the one that starts them.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
# Under an ignored SIGCHLD the kernel throws away the exit status of each child, so the default comes back.
signal.signal(signal.SIGCHLD, signal.SIG_DFL)

import gc
import os
import sys

# Imports leave no garbage, and a look for it takes a tenth of their time. Verbs and `App` switch it on again.
gc.disable()

for _fd in range(3):
    # Started with one of the three closed: the next descriptor that anybody opens would be taken for it.
    try:
        os.fstat(_fd)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)

import errno
import traceback
from typing import NoReturn

from lastcall.supervisor.errors import ConfigError, NotRunning, Refused, SupervisorError, UsageError
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.process import leave

SUPERVISING = frozenset({"run", "demo", "dev"})
# The first that fits counts.
EXIT_CODES: dict[type[Exception], int] = {
    UsageError: Exit.USAGE,
    ConfigError: Exit.CONFIG,
    NotRunning: Exit.GAVE_UP,
    Refused: Exit.FAILED,
    SupervisorError: Exit.FAULT,
}


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    if SUPERVISING.intersection(sys.argv[1:2]):
        # Not above: the verbs that ask a running supervisor need no loop, and would wait for these imports.
        import asyncio

        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            leave(runner.run(_supervise()))
    leave(_ask())


async def _supervise() -> int:
    """Let the signals in once their handlers stand, then import the rest.

    In the running loop, because uvloop forgets what its handlers received before it ran.
    """
    import asyncio

    from lastcall.supervisor.signals import Inbox, receive

    inbox = Inbox()
    with receive(asyncio.get_running_loop(), inbox):
        try:
            from lastcall.supervisor.cli import run

            work = run.read(sys.argv[1:], inbox)
            return work if isinstance(work, int) else await work
        except Exception as error:
            return _explain(error)


def _ask() -> int:
    """Run a verb that does not supervise. Without a loop, which would keep the first Ctrl-C to itself.

    And without Python's handler, whose exception an import may swallow: until a verb has something to put in
    order, Ctrl-C just ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
    try:
        from lastcall.supervisor.cli import operate

        gc.enable()
        if operate.knows(sys.argv[1:]):
            return operate.read(sys.argv[1:])
        from lastcall.supervisor.cli import run

        code = run.read(sys.argv[1:], None)
        assert isinstance(code, int), "a verb that is to supervise, but is not listed as one"
        return code
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    """Print an error that a user can mend in one line, and a fault of lastcall with its traceback."""
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            print(f"lastcall: {error}", file=sys.stderr)
            return code
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        print(
            f"lastcall: {error.strerror}; raise the limit: ulimit -n, or LimitNOFILE= of the unit",
            file=sys.stderr,
        )
        return Exit.CONFIG
    traceback.print_exception(error)  # the workers, if any, drain by themselves
    return Exit.FAULT


if __name__ == "__main__":
    main()
