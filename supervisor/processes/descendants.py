"""Descendants: which processes are left of a worker, and how to end them. Only this module imports psutil.

A descendant is known by parentage while its line is unbroken. One that left its group, its session and its
parent behind becomes a child of the supervisor, its subreaper, and is known by the marker in its
environment: supervisor, slot and generation. So the crash of one slot never sweeps another's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

from lastcall.worker.base.process import FORKSERVER, IMAGE, TRACKER
from lastcall.worker.base.variables import MARK


def mark_of(supervisor: str, slot: int, generation: int) -> str:
    """Return the value of the marker for one generation of one slot.

    All have one width for each supervisor: a fork of an image writes its mark over that of the image.
    """
    return f"{supervisor}:{slot:03d}:{generation:09d}"


def image_mark_of(supervisor: str, number: int) -> str:
    """Return the value of the marker for an image: no generation has it, and its width is theirs."""
    return f"{supervisor}:img:{number:09d}"


def adopted(known: Iterable[int]) -> set[int]:
    """Return the pids of children of this process that are not among the known ones.

    The check is one read, which is cheap enough for every exit of a child. The kernel lists children by
    thread. The main thread's list is complete: the supervisor starts every child from the main thread, and
    the kernel gives an orphan to the first living thread, which is the main thread too.
    """
    pid = os.getpid()
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN: every process of the machine is looked at
        return {child.pid for child in psutil.Process().children()}.difference(known)
    return {int(child) for child in children}.difference(known)


def tree(pid: int) -> list[psutil.Process]:
    """Return every living descendant of a process, itself not included."""
    try:
        return [each for each in psutil.Process(pid).children(recursive=True) if _lives(each)]
    except psutil.NoSuchProcess:
        return []


def marked(pids: Iterable[int], mark: str, *, unmarked: bool) -> list[psutil.Process]:
    """Return those of the pids, with all below them, that carry the mark.

    A process that cleared its environment carries none; `unmarked` says whether such are meant too.
    """
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            own = _mark(process)
            if own == mark or (own is None and unmarked):
                found[pid] = process
                found.update((child.pid, child) for child in process.children(recursive=True))
    return [process for process in found.values() if _lives(process)]


def everywhere(mark_prefix: str) -> list[psutil.Process]:
    """Return every living process of the machine whose marker starts so; slow, for the end of a stop."""
    found = []
    for process in psutil.process_iter():
        if process.pid != os.getpid():
            own = _mark(process)
            if own is not None and own.startswith(mark_prefix) and _lives(process):
                found.append(process)
    return found


def kill(processes: Iterable[psutil.Process], *, spares_trackers: bool = False) -> None:
    """SIGKILL each; psutil makes sure that a pid is still the process it was.

    A resource tracker that is spared removes shared memory and semaphores once the others have ended.
    """
    for process in processes:
        if not (spares_trackers and is_tracker(process)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process.kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):
        return None


def look_at(pid: int) -> tuple[str, str]:
    """Return the kernel's word for what a process does, and the kernel function that it waits in."""
    try:
        return psutil.Process(pid).status(), Path(f"/proc/{pid}/wchan").read_text()
    except (psutil.Error, OSError):
        return "unknown", ""


def is_multiprocessing(name: str, command: str) -> bool:
    """Tell by its name and command line whether a process is one of multiprocessing's, or a fork of one.

    A forkserver or a resource tracker that was forked from its worker has the command line of the worker. So
    has a fork of an image that nobody has made a worker yet.
    """
    return name.encode() in (FORKSERVER, TRACKER, IMAGE) or "from multiprocessing." in command


def is_framework(process: psutil.Process) -> bool:
    """Tell whether a process is multiprocessing's: a forkserver, a fork of one, or a resource tracker.

    Those always end with their worker, and any other process was a program of a job. A process that a job
    made by a bare `os.fork()` looks like a fork of the forkserver, so the process is swept but not counted.
    """
    try:
        command = process.cmdline()
        # A process that is just ending has no command line any more.
        return not command or is_multiprocessing(process.name(), " ".join(command))
    except psutil.Error:
        return True  # gone meanwhile


def is_tracker(process: psutil.Process) -> bool:
    """Tell whether a process is a resource tracker of multiprocessing, forked or not."""
    try:
        name, command = process.name(), " ".join(process.cmdline())
    except psutil.Error:
        return False  # gone meanwhile
    return name.encode() == TRACKER or "from multiprocessing.resource_tracker" in command


class Swept:
    """The programs that were swept so far. Each counts once, in however many sweeps it takes to die."""

    def __init__(self) -> None:
        self._programs: set[psutil.Process] = set()  # equal by pid and start time

    def add(self, processes: Iterable[psutil.Process]) -> int:
        """Note the programs among the processes; return how many of them are new."""
        new = {each for each in processes if each not in self._programs and not is_framework(each)}
        self._programs |= new
        return len(new)


def each(pid: int) -> psutil.Process | None:
    """Return the process of a pid, or None when it has ended, reaped or not."""
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None
    return process if _lives(process) else None
