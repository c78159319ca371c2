"""Processes as /proc shows them: which are below which, their memory, and the order in which they die.

Every function takes a process that ends meanwhile, or that can't be seen, for one that holds nothing. Other
errors, as without a free descriptor, are raised.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lastcall.worker.base.records import dataclass

# Errors of reading about a process that has ended, or that /proc hides from other users (hidepid).
NOT_THERE = (FileNotFoundError, ProcessLookupError, PermissionError)
# A list of children, of kernels with CONFIG_PROC_CHILDREN.
CHILDREN = Path("/proc/thread-self/children")
# The kernel kills a process with this value before all others: proc(5), oom_score_adj.
FIRST_TO_DIE = 1000
# Lines of /proc/PID/smaps_rollup: the memory that would be free if only this process ended. Clean pages of
# files are not among them, because the kernel drops those before it kills. Dirty ones are, and the bound
# takes them out again.
HELD_ALONE = ("Private_Dirty:", "Private_Hugetlb:", "SwapPss:")
# Lines of /proc/PID/status whose sum is never less than the sum of those.
HELD_AT_MOST = ("RssAnon:", "RssShmem:", "VmSwap:", "HugetlbPages:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process. The start, in clock ticks after boot, tells it from a later one with the same pid."""

    pid: int
    parent: int
    started: int


def process_of(pid: int) -> Process | None:
    """Return the process with a pid, if there is one that can be seen."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except NOT_THERE:
        return None
    # The name, in parentheses, may hold anything. Fields from the third on: proc(5), stat.
    fields = text.rpartition(b")")[2].split()
    return Process(pid=pid, parent=int(fields[1]), started=int(fields[19]))


def all_processes() -> dict[int, Process]:
    """Return every process that can be seen, by pid."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return {pid: process for pid in pids if (process := process_of(pid)) is not None}


def processes_below(pids: Iterable[int]) -> dict[int, list[Process]]:
    """Return the descendants of each of the pids, as `below` does, and look at no other processes.

    A kernel without lists of children has all processes read.
    """
    if not CHILDREN.exists():
        return below(pids, all_processes())
    found = {}
    for pid in pids:
        found[pid] = list(_children(pid))
        for process in found[pid]:  # grows while it is read
            found[pid] += _children(process.pid)
    return found


def _children(pid: int) -> Iterator[Process]:
    # Each thread has the list of those that it has forked: proc(5), /proc/pid/task/tid/children.
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except NOT_THERE:
        return
    for thread in threads:
        try:
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        except NOT_THERE:
            continue
        for child in map(int, children):
            process = process_of(child)
            if process is not None:
                yield process


def kill_if_same(process: Process) -> None:
    """SIGKILL a process that was seen before, and not a later one with the same pid."""
    same = process_of(process.pid)
    if same is not None and same.started == process.started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)


def below(pids: Iterable[int], processes: Mapping[int, Process]) -> dict[int, list[Process]]:
    """Return the descendants of each of the pids, as far as nothing between them has ended."""
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process)
    found = {}
    for pid in pids:
        found[pid] = list(children.get(pid, ()))
        for process in found[pid]:  # grows while it is read
            found[pid] += children.get(process.pid, ())
    return found


def held_at_most(pid: int) -> int:
    """Return a bound of `held_alone`, which costs a tenth."""
    try:
        return _sum(pid, "status", HELD_AT_MOST)
    except PermissionError:  # /proc is mounted with hidepid
        return 0


def held_alone(pid: int) -> int:
    """Return the bytes that the process shares with no other and that the kernel can't drop."""
    bound = held_at_most(pid)
    try:
        return min(bound, _sum(pid, "smaps_rollup", HELD_ALONE))
    except PermissionError:  # a program that has changed its user
        return bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Bytes of a process: its part of the pages that it shares, and what `held_alone` returns of it."""

    pss: int
    private: int


def shares(pid: int | str) -> Shares:
    """Return the shares of a process, by its pid or as "self"; nothing of one that can't be seen.

    The kernel walks the page tables of the process, which waits meanwhile if it changes them.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(errors="replace").splitlines()
    except NOT_THERE:
        lines = []

    def kilobytes(names: tuple[str, ...]) -> int:
        return sum(int(line.split()[1]) for line in lines if line.startswith(names))

    return Shares(pss=kilobytes(("Pss:",)) * 1024, private=kilobytes(HELD_ALONE) * 1024)


def _sum(pid: int, file: str, names: tuple[str, ...]) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(names)) * 1024


def oom_adjustment(pid: int | str = "self") -> int:
    """Return the process's oom_score_adj; 0 where it can't be read."""
    try:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    except (OSError, ValueError):
        return 0


def adjust_oom(adjustment: int) -> None:
    """Set the oom_score_adj of this process, to a value that it has had before. Raises OSError."""
    if oom_adjustment() != adjustment:
        Path("/proc/self/oom_score_adj").write_text(str(adjustment))


@contextlib.contextmanager
def first_to_die() -> Iterator[None]:
    """Have the kernel kill this process before others while the block runs. No privilege is needed for that.

    Processes that it starts meanwhile stay there.
    """
    before = oom_adjustment()
    die_before(FIRST_TO_DIE)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # as `die_before`: a help and no condition
            adjust_oom(before)


def die_before(adjustment: int, pid: int | str = "self") -> None:
    """Raise the oom_score_adj of a process, never lower it, and never to the top.

    A step of 1 stands for a thousandth of the memory of the machine, or of the control group at its limit.
    """
    wanted = min(adjustment, FIRST_TO_DIE - 1)
    # No right to it, as for a program that has changed its user: the order is a help and no condition.
    with contextlib.suppress(OSError):
        if oom_adjustment(pid) < wanted:
            Path(f"/proc/{pid}/oom_score_adj").write_text(str(wanted))
