"""Find the installed packages that a target imports, and import those that a fork may bring along.

    image                              scout, a fork                trial, a fork
    forks, waits ────────────────────► runs the target
    packages, changed variables ◄───── tells, is killed
    forks, waits ─────────────────────────────────────────────────► imports, looks at itself
    clean packages, reasons ◄────────────────────────────────────── tells after each, ends at the first reason
    imports the clean packages

The files of the agent run in the scout, as they run in each worker and in each job. The image runs none of
them, so no state of their modules is shared.

A package is left out if its import adds anything that a fork would lose or share: a thread, a process, an
open file, memory, a handler of a signal or of the exit. So is one that reads a variable which the target
changes before. Each process imports a package that was left out, as it would without an image. The trial goes
on behind that package in another fork.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import logging
import os
import select
import signal
import stat
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn  # what a fork tells is JSON

from lastcall.worker import scratch
from lastcall.worker.base.process import TRACKER_ENDS_WITHIN, adopt_orphans, end_with_parent
from lastcall.worker.base.target_form import INSTALLED
from lastcall.worker.sdk.forkserver import (
    TRACKER_COMMAND,
    WHOLE,
    Imports,
    import_all,
    is_native,
    is_single_threaded,
    passed_on,
)

# Seconds for the target, and for each trial. Ours: programs import for some seconds. One that loads a model
# for longer tells what it has imported until then.
SCOUT_WITHIN = 10.0
TRIAL_WITHIN = 20.0
# Packages that a trial may refuse: each one costs another fork. Ours: an agent has one or two.
MAX_REFUSED = 16
# Characters of a reason. Ours: a line, because an error of an import may have any length.
MAX_REASON = 200
# A logger that no configuration of a target names, so that the target disables it where it disables all.
PROBE = "scout of lastcall"
# Bytes of one line of a fork. Ours: some thousand modules.
MAX_BYTES = 1 << 22
CHUNK_BYTES = 1 << 16


@dataclass(slots=True)
class Found:
    """The imports of a target: the file of each installed module, in order. And the variables it changes.

    `seen` has the file of every module, those of the program too; empty where there is none. `clash` says
    which module the image has imported meanwhile from another file; empty where there is none. `audible` has
    the loggers that came after the target had disabled all others (logging.config). `was_killed` tells that
    the scout was killed, or a trial.
    """

    files: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    seen: dict[str, str] = field(default_factory=dict)
    audible: set[str] = field(default_factory=set)
    clash: str = ""
    was_killed: bool = False

    def other(self, before: set[str]) -> str:
        """Say which module that came after `before` is another one here; empty where there is none.

        The program may have a module with the name of an installed one, and all that the program imports gets
        the program's.
        """
        names = [name for name in self.seen if name in sys.modules and name not in before]
        others = [name for name in names if _file(sys.modules[name]) != self.seen[name]]
        return f"{others[0]} is another file here than in the target" if others else ""

    @property
    def packages(self) -> dict[str, list[str]]:
        """Return the modules by package, in the order in which their imports have begun."""
        found: dict[str, list[str]] = {}
        for name, file in self.files.items():
            found.setdefault(package_of(name, file), []).append(name)
        return found


def look(
    run_target: Callable[[], None], is_own: Callable[[str, str], bool], meanwhile: Callable[[], None]
) -> Found:
    """Run the target in a fork, and `meanwhile` here; return what the target alone has imported.

    Returns nothing if the fork does not tell. `run_target` may raise anything. `is_own` tells by name and
    file whether a module is one of the program.
    """
    before, environment, loggers = set(sys.modules), dict(os.environ), _loggers()
    probe = logging.getLogger(PROBE)
    folders = {*sys.path}

    def run(tell: Callable[[object], None]) -> None:
        scout = os.getpid()

        def end(*_: object) -> NoReturn:
            signal.setitimer(signal.ITIMER_REAL, 0)  # not a second time, in the middle of a line
            if os.getpid() != scout:  # the target has forked
                os._exit(0)
            modules = [(name, each) for name, each in list(sys.modules.items()) if name not in before]
            installed = [(name, _installed_file(each)) for name, each in modules]
            # A folder that the target has put on the path, as one with vendored packages, is not here.
            files = {
                name: file
                for name, file in installed
                if file and _folder_of(name, file) in folders and not is_own(name, file)
            }
            names = {*environment, *os.environ}
            changed = [name for name in names if environment.get(name) != os.environ.get(name)]
            audible = [each for each in _loggers() - loggers if not logging.getLogger(each).disabled]
            seen = {name: _file(each) for name, each in modules}
            tell([files, changed, seen, audible if probe.disabled else []])
            scratch.remove()
            tell(None)
            os._exit(0)

        # In time even where the target does not come to its end.
        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, SCOUT_WITHIN)
        with suppress(BaseException):
            run_target()
        end()

    told, was_killed = _told_by(run, SCOUT_WITHIN * 1.2, meanwhile)
    files, changed, seen, audible = told[0] if told else ({}, (), {}, ())
    files = {name: file for name, file in files.items() if name not in sys.modules}
    found = Found(files, set(changed), seen, set(audible), was_killed=was_killed)
    found.clash = found.other(before)
    return found


def import_packages(found: Found) -> tuple[Imports, dict[str, str]]:
    """Import the packages that a fork may bring along; return the traces, and why others are left out."""
    packages = found.packages
    waiting = list(packages)
    imports, left_out = Imports(), dict[str, str]()
    while waiting and len(left_out) < MAX_REFUSED:
        told, was_killed = _told_by(functools.partial(_try_each, packages, waiting, found), TRIAL_WITHIN)
        found.was_killed |= was_killed
        clean = [package for package, why in told if not why]
        for package in clean:
            imports.add(import_all(packages[package]))
        if imports.why:
            break
        for package in waiting[len(clean) : len(clean) + 1]:
            reasons = [why for _, why in told if why]
            late = f"its import ends the process, or takes more than {TRIAL_WITHIN:g} s"
            left_out[package] = (reasons[0] if reasons else late)[:MAX_REASON]
        waiting = waiting[len(clean) + 1 :]
    return imports, left_out | dict.fromkeys(waiting, f"{MAX_REFUSED} others are left out")


def _try_each(
    packages: Mapping[str, list[str]], names: list[str], found: Found, tell: Callable[[object], None]
) -> None:
    """Import the packages, and tell about each; end with the first that is to be left out."""
    for package in names:
        why = _try(packages[package], found)
        tell([package, why])
        if why:
            break
    scratch.remove()
    tell(None)  # a process that the import has left may hold the pipe open


def _try(modules: list[str], found: Found) -> str:
    """Import the modules; return the reason why a fork must not bring them along."""
    # Not by its name, because the directory may have been removed.
    before, here, was, loggers = set(sys.modules), os.stat("."), _traits(), _loggers()
    trial = os.getpid()
    try:
        with _exit_handlers() as has_exit_handler:
            imports = import_all(modules)
    except BaseException as error:
        return f"an import failed: {error!r}"
    finally:
        if os.getpid() != trial:  # the import has forked, and the trial sees the process
            _stay()
    if imports.why:
        return imports.why
    files = [fd for fd in sorted(imports.opened) if stat.S_ISREG(os.fstat(fd).st_mode)]
    if files:  # its offset and its locks are shared by all forks
        return f"it keeps {os.readlink(f'/proc/self/fd/{files[0]}')} open"
    if has_exit_handler():
        return "it has an exit handler"
    changed = [trait for trait, value in _traits().items() if was.get(trait) != value]
    if changed:
        return f"it {changed[0]}"
    if other := found.other(before):
        return other
    if found.audible & (_loggers() - loggers):
        return "the target disables all loggers before, and would disable those of the package too"
    added = [module for name, module in sys.modules.items() if name not in before]
    has_native_code = any(_installed_file(module).endswith(".so") for module in added)
    natively = {name for name in found.changed if is_native(name)}
    if natively and has_native_code:
        return f"it has native code, which may read {min(natively)}, and the target changes that before"
    reads = found.changed & imports.reads
    if reads or (found.changed and WHOLE in imports.reads):
        return f"it reads {min(reads, default='the environment')}, and the target changes that before"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "it has a CUDA context"
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        return "it runs an event loop"
    if Path(f"/proc/self/task/{os.getpid()}/children").read_text():
        return "it has started a process"
    if not os.path.samestat(os.stat("."), here):
        return "it changes the working directory"
    if len(os.listdir("/proc/self/task")) > 1:
        # Some native threads end in the first fork (pthread_atfork(3)).
        os.waitpid(_fork(lambda: None), 0)
        if not is_single_threaded():
            return "it has started a thread"
    return ""


def _stay() -> NoReturn:
    """Wait for the end of the trial, which kills all of its session."""
    while True:
        signal.pause()


@contextmanager
def _exit_handlers() -> Iterator[Callable[[], bool]]:
    """Tell whether the block has a function called at the exit of the process, by `atexit` or `weakref`.

    It would run at the end of each forkserver, and remove for all what was made once, such as a temporary
    directory. A finalizer counts as long as it is alive.
    """
    finalizer_class: Any = weakref.finalize
    register, begin = atexit.register, finalizer_class.__init__
    functions: list[Any] = []
    finalizers: list[Any] = []

    def registered(function: Any, *arguments: Any, **options: Any) -> Any:
        functions.append(function)
        return register(function, *arguments, **options)

    def begun(finalizer: Any, *arguments: Any, **options: Any) -> None:
        known = len(functions)
        begin(finalizer, *arguments, **options)
        del functions[known:]  # the first finalizer registers a function for all
        finalizers.append(finalizer)

    atexit.register = registered  # type: ignore[assignment]  # for this block
    finalizer_class.__init__ = begun
    try:
        yield lambda: bool(functions) or any(each.alive and each.atexit for each in finalizers)
    finally:
        atexit.register = register
        finalizer_class.__init__ = begin


def _traits() -> dict[str, object]:
    """Return what an import may change here and a fork would share or lose, by what that is called.

    A handler of a signal is lost in job processes.
    """
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    mappings = Path("/proc/self/maps").read_text().splitlines()
    modes = [line.split()[1] for line in mappings]
    status = Path("/proc/self/status").read_text().splitlines()
    return {
        "handles a signal": (handlers, [line for line in status if line.startswith(("SigCgt", "SigBlk"))]),
        "shares memory": sum(mode[1] == "w" and mode[3] == "s" for mode in modes),
    } | {f"changes {name} of the process": value for name, value in passed_on().items()}


def _loggers() -> set[str]:
    """Return the names of the loggers that there are."""
    known = logging.root.manager.loggerDict.items()
    return {name for name, each in known if isinstance(each, logging.Logger)}


# -- names --------------------------------------------------------------------------------------------------


def _file(module: object) -> str:
    """Return the file of a module; empty where it has none."""
    # Not by getattr: a module that is loaded at its first use would be loaded by the question.
    file = vars(module).get("__file__") if isinstance(module, ModuleType) else None
    return file if isinstance(file, str) else ""


def _installed_file(module: object) -> str:
    """Return the file of a module of an installed package; empty for others."""
    file = _file(module)
    if not file or vars(module).get("__spec__") is None:
        return ""
    return file if not INSTALLED.isdisjoint(Path(file).parts) else ""


def _folder_of(name: str, file: str) -> str:
    """Return the folder on `sys.path` in which a module was found."""
    path = Path(file)
    module = path.parent if path.stem == "__init__" else path
    return str(module.parents[min(name.count("."), len(module.parents) - 1)])


def package_of(name: str, file: str) -> str:
    """Return the name of the outermost package that is not a namespace, such as `livekit.plugins.openai`."""
    parts, folder = name.split("."), Path(file).parent
    depth = len(parts) if Path(file).stem == "__init__" else len(parts) - 1
    if depth == 0 or not _is_package(folder):
        return name
    while depth > 1 and _is_package(folder.parent):
        folder, depth = folder.parent, depth - 1
    return ".".join(parts[:depth])


def _is_package(folder: Path) -> bool:
    return any(folder.glob("__init__.*"))


# -- forks --------------------------------------------------------------------------------------------------


def _told_by(
    run: Callable[[Callable[[object], None]], None],
    within: float,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[list[Any], bool]:
    """Run in a fork, and return what it tells until it ends, tells None, or its seconds are over.

    Return also whether it was killed by somebody else, as by the kernel where memory runs out. The seconds
    begin when `meanwhile` has returned.
    The fork has no output: the workers will say the same. It is killed then, with all that it has started in
    its session; and with this process.
    """
    reader, writer = os.pipe()

    def tell(what: object) -> None:
        text = json.dumps(what).encode() + b"\n"
        while text:
            text = text[os.write(writer, text) :]

    def begin() -> None:
        os.setsid()
        end_with_parent()
        adopt_orphans()  # so that a process whose parent has ended is seen
        os.close(reader)
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.close(null)
        run(tell)

    pid = _fork(begin)
    os.close(writer)
    told: list[Any] = []
    has_ended, status = False, 0
    try:
        meanwhile()
        due = time.monotonic() + within
        for each in _lines(reader, due):
            if each is None:
                break
            told.append(each)
        else:
            has_ended = time.monotonic() < due
    finally:
        os.close(reader)
        status = _end(pid)
    return told, has_ended and os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def _end(pid: int) -> int:
    """Kill a fork with all of its session, reap it, and return its wait status.

    A resource tracker of multiprocessing comes last. It removes shared memory and semaphores of the fork,
    once all processes that know of them have ended. Nobody else would remove them.
    """
    # Twice: the kernel may leave out a child while another one ends (proc_pid_task(5)).
    below = list(dict.fromkeys(_below(pid) + _below(pid)))
    trackers = [each for each in below if TRACKER_COMMAND in _command(each)]
    pidfds = []
    for tracker in trackers:
        with suppress(OSError):
            pidfds.append(os.pidfd_open(tracker))
    for each in (pid, *below) if trackers else ():
        with suppress(ProcessLookupError, PermissionError):
            if each not in trackers:
                os.kill(each, signal.SIGKILL)
    due = time.monotonic() + 10 * TRACKER_ENDS_WITHIN  # a tracker may still be an interpreter that starts
    for pidfd in pidfds:
        select.select([pidfd], [], [], max(0.0, due - time.monotonic()))
        os.close(pidfd)
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _below(pid: int) -> list[int]:
    """Return the pids of all descendants of a process; fewer on a kernel that does not list children."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended, or the process
            for child in map(int, listed.read_text().split()):
                found += [child, *_below(child)]
    return found


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return ""


def _fork(run: Callable[[], None]) -> int:
    with warnings.catch_warnings():
        # CPython 3.12 warns of threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(0)
    return pid


def _lines(reader: int, due: float) -> Iterator[Any]:
    rest = b""
    while len(rest) < MAX_BYTES:
        ready, _, _ = select.select([reader], [], [], max(0.0, due - time.monotonic()))
        chunk = os.read(reader, CHUNK_BYTES) if ready else b""
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from map(json.loads, lines)
