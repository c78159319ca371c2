"""One child process: started by posix_spawn in a new session, signalled and watched by its pidfd.

There are two reasons for posix_spawn instead of fork. The supervisor has threads, and the child's signal mask
and dispositions are part of the call, so that there is no instant in which they are wrong. A signal by pidfd
can't reach another process that has got the pid of an ended child.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence

from lastcall.supervisor.errors import ConfigError, SpawnError
from lastcall.supervisor.processes.reaper import ExitStatus, Reaper
from lastcall.worker.base.plurals import counted

# Above every number that a child is given, so that no dup2 in the child overwrites one still needed. Ours:
# children are given less than ten.
HIGH_FD = 64
# The signals that a supervisor may ignore: Python ignores the first two, and with a terminal the supervisor
# ignores the others. An ignored signal stays ignored across exec. A program that expects the default would
# not end on a broken pipe, and not stop where a terminal that it has opened says so.
IGNORED_HERE = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTTIN, signal.SIGTTOU)
# Descriptors that the supervisor holds for a worker: two pipes, the control channel and the pidfd.
FDS_OF_A_WORKER = 4
# Descriptors above HIGH_FD for the moment of a start, and for a worker that is replaced. Ours: a start opens
# fewer than ten at a time.
FDS_TO_SPARE = 24


def check_open_files(workers: int) -> None:
    """Raise ConfigError when the limit of open files is too low for so many workers."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = HIGH_FD + FDS_TO_SPARE + FDS_OF_A_WORKER * workers
    if resource.RLIM_INFINITY != limit < needed:
        raise ConfigError(
            f"the limit of open files is {limit}, expected {needed} for {counted(workers, 'worker')};"
            " raise it: ulimit -n, or LimitNOFILE= of the unit"
        )


def high(fd: int) -> int:
    """Move a descriptor above the numbers that children use; it is not inheritable.

    Raises OSError where no number is left; the descriptor is closed then too.
    """
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
    finally:
        os.close(fd)


def pipe() -> tuple[int, int]:
    """Return read and write end of a pipe, both out of the way of children's descriptors."""
    read, write = os.pipe()
    try:
        read = high(read)
    except OSError:
        os.close(write)
        raise
    try:
        return read, high(write)
    except OSError:
        os.close(read)
        raise


class Child:
    """A running or ended child. `status` is None while it runs."""

    def __init__(
        self, pid: int, reaper: Reaper, on_exit: Callable[[ExitStatus], None], *, pidfd: int | None = None
    ) -> None:
        self.pid = pid
        self.status: ExitStatus | None = None
        self._reaper = reaper
        self._on_exit = on_exit
        self._pidfd = pidfd
        reaper.own(pid, self._ended)
        if pidfd is None:
            with contextlib.suppress(OSError):  # a kernel without pidfds: SIGCHLD alone has to do
                self._pidfd = os.pidfd_open(pid)
        if self._pidfd is not None:
            asyncio.get_running_loop().add_reader(self._pidfd, reaper.collect_one, pid)

    def send(self, number: signal.Signals) -> None:
        """Signal the process itself; nothing happens when it has ended."""
        if self.status is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.pid, number)  # not reaped yet, so no other process has the pid

    def _ended(self, status: ExitStatus) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        self.status = status
        self._on_exit(status)


def spawn(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    descriptors: Mapping[int, int],
    blocked: Iterable[signal.Signals],
    reaper: Reaper,
    on_exit: Callable[[ExitStatus], None],
) -> Child:
    """Start a program in a new session, with exactly these descriptors.

    `descriptors` maps a number in the child to a descriptor of the supervisor. `blocked` is the child's whole
    signal mask. Raises SpawnError when there is no such program, or it may not be run, or the system has no
    room for it.
    """
    path = shutil.which(argv[0], path=environment.get("PATH", os.defpath))
    if path is None:
        raise SpawnError(
            f"{argv[0]!r} is no program that can be run: no such file in PATH, or not executable"
        )
    actions: list[tuple[int, int, int]] = []
    for number, fd in sorted(descriptors.items()):
        actions.append((os.POSIX_SPAWN_DUP2, fd, number))
    try:
        pid = os.posix_spawn(
            path,
            list(argv),
            dict(environment),
            file_actions=actions,
            setsid=True,
            setsigmask=list(blocked),
            setsigdef=IGNORED_HERE,
        )
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SpawnError(f"{argv[0]!r} can't be started: {why}") from error
    return Child(pid, reaper, on_exit)
