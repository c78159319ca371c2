"""Every child is reaped: those started here when their pidfd says so, adopted orphans when SIGCHLD does.

Problem: as PID 1 and as subreaper the supervisor inherits processes that it never started. Each becomes a
zombie when it ends. A pidfd tells only of children that were started here, and uvloop refuses a SIGCHLD
handler (libuv keeps the signal to itself). Option: `waitid(P_ALL)` once a second, which wakes an idle
supervisor for ever and leaves zombies meanwhile. Option: a thread in waitid, which would steal the exit
status of children that have an owner. Choice: a signalfd. SIGCHLD blocked and read from a signalfd costs
nothing while nothing happens, and arrives at once. No child inherits the mask, because every spawn sets one
explicitly. Where signalfd can't be had, the look once a second takes its place.

`collect` peeks with WNOWAIT: a child is reaped by pid, and its owner told if it has one.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections.abc import Callable

from lastcall.worker.base.process import adopt_orphans
from lastcall.worker.base.records import dataclass

SFD_NONBLOCK = 0o4000  # signalfd(2); the same two bits as O_NONBLOCK and O_CLOEXEC on x86-64 and arm64
SFD_CLOEXEC = 0o2000000
SIGINFO_BYTES = 128  # struct signalfd_siginfo, signalfd(2)
SIGSET_BYTES = 128  # sizeof(sigset_t) of glibc and musl
# Seconds between two looks where there is no signalfd. Ours: a zombie for a second harms nobody.
LOOK_EVERY = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How a process ended: an exit code, or the signal that killed it.

    Without either the status was lost, because other code of this process had reaped the child.
    """

    code: int | None
    signal: signal.Signals | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by {self.signal.name}"
        if self.code is None:
            return "ended, with a status that was lost"
        return f"exit code {self.code}"


class Reaper:
    """Reaps for one process: children that have an owner, and adopted orphans."""

    def __init__(self) -> None:
        self.is_subreaper = False
        self._owners: dict[int, Callable[[ExitStatus], None]] = {}
        self._signalfd: int | None = None
        self._look: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Become the parent of orphaned descendants and begin to reap. Call from the running loop."""
        self.is_subreaper = os.getpid() == 1 or adopt_orphans()
        loop = asyncio.get_running_loop()
        self._signalfd = _open_signalfd(ctypes.CDLL(None, use_errno=True))
        if self._signalfd is not None:
            loop.add_reader(self._signalfd, self._on_signal)
        else:
            self._look_again()

    def close(self) -> None:
        """Stop reaping; children that are left are left."""
        loop = asyncio.get_running_loop()
        if self._signalfd is not None:
            loop.remove_reader(self._signalfd)
            os.close(self._signalfd)
            self._signalfd = None
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        if self._look is not None:
            self._look.cancel()

    def own(self, pid: int, on_exit: Callable[[ExitStatus], None]) -> None:
        """Have `on_exit` called, once, when this child has been reaped."""
        self._owners[pid] = on_exit

    def collect(self) -> None:
        """Reap everything that has ended."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            self._reap(ended.si_pid)

    def collect_one(self, pid: int) -> None:
        """Reap one child that has an owner, if it has ended, as its readable pidfd says."""
        if pid not in self._owners:
            return
        try:
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            # Reaped elsewhere in this process, so all that is known is that it has ended.
            self._owners.pop(pid)(ExitStatus(code=None))
            return
        if ended:
            self._reap(pid)

    def _reap(self, pid: int) -> None:
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        if info is None:
            return
        owner = self._owners.pop(pid, None)
        if owner is None:
            return
        if info.si_code == os.CLD_EXITED:
            owner(ExitStatus(code=info.si_status))
        else:
            owner(ExitStatus(code=None, signal=signal.Signals(info.si_status)))

    def _on_signal(self) -> None:
        assert self._signalfd is not None
        try:
            while os.read(self._signalfd, SIGINFO_BYTES * 16):
                pass
        except BlockingIOError:
            pass
        self.collect()

    def _look_again(self) -> None:
        self.collect()
        self._look = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look_again)


def _open_signalfd(libc: ctypes.CDLL) -> int | None:
    if not hasattr(libc, "signalfd"):
        return None
    mask = ctypes.create_string_buffer(SIGSET_BYTES)
    libc.sigemptyset(mask)
    libc.sigaddset(mask, signal.SIGCHLD)
    fd: int = libc.signalfd(-1, mask, SFD_NONBLOCK | SFD_CLOEXEC)
    if fd < 0:
        return None
    # Already so in `lastcall` itself, since its first statement: a thread that does not block the signal
    # would be given it, and drop it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    return fd
