"""Fork the forkserver from the worker, so that one import of livekit-agents serves both.

Problem: multiprocessing starts its forkserver as a new interpreter, which imports once more what the worker
has imported. That takes 1.3 to 1.9 s of processor time, by the version of livekit-agents.

    worker                                        child
    imports IMPORTED, has one thread, forks ────► closes what it inherited, waits
    loads the target, runs
    multiprocessing starts its forkserver
    sends the command, and what exec passes on ─► takes it over, says so, runs the command

The command is the one that multiprocessing has for a new interpreter, and the child runs it in an empty
`__main__`. So the wire, the status pipes and the resource tracker are multiprocessing's on each version.

A new interpreter would see its environment before it imports anything. So each variable that was read in the
import is noted. The certificates of TLS contexts that the import makes are loaded only after the fork, by
each process for itself: OpenSSL reads the environment for them (SSL_CERT_FILE). Modules that are imported for
their effects on the environment, and the modules of the agent, are imported by the command, after the
environment has been taken over.

Where the fork would not be the same, multiprocessing starts a new interpreter, as it would without this
module. That is so if the import has left a thread or a socket. It is so, too, if something has changed since
the fork that the import has read or that exec passes on. A second forkserver, after the end of the first, is
a new interpreter. One line in the log says why.

The resource tracker of multiprocessing is forked too. It is started before the agent is loaded, and reads
nothing but names of resources, so the fork runs the command at once.
"""

from __future__ import annotations

import faulthandler
import fcntl
import gc
import importlib
import json
import logging
import multiprocessing.util
import os
import signal
import socket
import ssl
import stat
import struct
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lastcall.worker.base import garbage, randomness
from lastcall.worker.base.memory import first_to_die, oom_adjustment
from lastcall.worker.base.process import FORKSERVER, TRACKER, set_name
from lastcall.worker.base.stopping import SHIELDED

log = logging.getLogger("lastcall.worker")

# Imported before the fork: the part that every job process has, `arriving` for those that go on with a call,
# and nothing of the agent. The command imports `livekit.agents.ipc._preload`, because that loads models of
# 244 MB or none, as the agent's environment says.
IMPORTED = (
    "livekit.agents",
    "lastcall.worker.job.setup",
    "lastcall.worker.job.arriving",
    "lastcall.worker.inworld.plugin.attached",
)
# Imported before reads of the environment are noted: it copies the whole environment, for CGI programs
# (prometheus_client imports it and is none), and each variable would count as read.
READS_ALL = "wsgiref.handlers"
# Read by OpenSSL where a TLS context loads the certificates of the system
# (SSL_CTX_set_default_verify_paths(3)).
CERTIFICATES = {"SSL_CERT_FILE", "SSL_CERT_DIR"}
# Stands among the names of variables for a copy of all of them.
WHOLE = "*"
# In the command of a forkserver, in multiprocessing/forkserver.py of CPython 3.11 to 3.14.
COMMAND = "from multiprocessing.forkserver import main"
# The same of a resource tracker, in multiprocessing/resource_tracker.py.
TRACKER_COMMAND = "from multiprocessing.resource_tracker import main"
# Variables that the interpreter and native libraries read by themselves: CPython's command line page,
# ld.so(8), mallopt(3), tzset(3), locale(7), openssl-env(7), and the manuals of OpenMP, OpenBLAS and MKL.
READ_NATIVELY = ("PYTHON", "LD_", "MALLOC_", "TZ", "LANG", "LC_", "OPENSSL_", "OMP_", "OPENBLAS_", "MKL_")
# Lines of /proc/PID/status (proc_pid_status(5)) that exec passes on. They are ids, rights, the ignored
# signals, and the processors and memory nodes that the process may use.
PASSED_ON = {
    *("Umask", "Uid", "Gid", "Groups", "NSpgid", "NSsid", "SigIgn", "Cpus_allowed", "Mems_allowed"),
    *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"),
}
# Seconds for the child to take over. Ours: it does nothing else, and a few milliseconds are usual.
TAKE_OVER_WITHIN = 5.0
# Seconds for native threads to be gone that end in a fork, as those of OpenBLAS do (pthread_atfork(3)). Ours:
# a thread that has been joined may stand in /proc for some microseconds.
THREADS_END_WITHIN = 0.2
# Major numbers of devices that a fork may share: memory, and terminals (admin-guide/devices.txt of Linux). A
# graphics processor is none of them.
PLAIN_DEVICES = {1, 4, 5, *range(136, 144)}
LENGTH = struct.Struct("!I")
TAKEN_OVER = b"\0"
# Bytes of the answer at most; one that is not TAKEN_OVER is the text of an error. Ours: a line.
ANSWER_BYTES = 1024


class Unlike(Exception):
    """Raised where a forked forkserver would not be what a new interpreter is; the text says why."""


# -- the fork -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Imports:
    """The traces of imports: descriptors, the variables that they read, and TLS contexts without defaults.

    `unseeded` and `bit_generators` are the generators of random numbers that the imports have made. `why`
    says why a fork would be unlike; empty if the imports do not hinder one.
    """

    opened: set[int] = field(default_factory=set)
    reads: set[str] = field(default_factory=set)
    contexts: list[ssl.SSLContext] = field(default_factory=list)
    unseeded: randomness.Unseeded = field(default_factory=randomness.Unseeded)
    # Those of NumPy, which the image alone looks for.
    bit_generators: list[Any] = field(default_factory=list)
    why: str = ""

    def add(self, more: Imports) -> None:
        """Add the traces of more imports in the same process."""
        self.opened |= more.opened
        self.reads |= more.reads
        self.contexts += more.contexts
        self.unseeded.update(more.unseeded)
        self.why = self.why or more.why


def fork(imports: Imports | None = None) -> None:
    """Import IMPORTED and fork the forkserver; have multiprocessing use it, unless that would be unlike.

    For a process with one thread that is to become a worker. `imports` are those of the image from which the
    process was forked. In the child the function raises SystemExit at the end of the forkserver, so that exit
    handlers of what it has imported run, as in a new interpreter.
    """
    start_interpreter = getattr(multiprocessing.util, "spawnv_passfds", None)
    waiting: _Waiting | None = None
    why = ""
    if imports is None:
        # This process has no call yet. Else the kernel would take the calls of others for what it imports.
        with first_to_die():
            imports = Imports() if start_interpreter is None else import_all(IMPORTED)
    try:
        if start_interpreter is not None:
            waiting = _fork(imports)
    except Unlike as error:
        why = str(error)
    finally:
        _load_defaults(imports.contexts)
    if start_interpreter is None:
        return

    def spawnv_passfds(path: bytes, arguments: Sequence[Any], descriptors: Sequence[int]) -> int:
        nonlocal waiting, why
        command = _command_of(arguments)
        if COMMAND in command[0]:
            child, waiting = waiting, None
            reason, why = why, "the forkserver has ended"
            if child is not None:
                try:
                    return child.become(path, command, descriptors)
                except Unlike as error:
                    child.end()
                    reason = str(error)
            log.info("the forkserver imports for itself", extra={"reason": reason})
        elif TRACKER_COMMAND in command[0]:
            # OSError: there is no process to be had, or no /proc.
            with suppress(OSError):
                if len(os.listdir("/proc/self/task")) == 1:
                    return _fork_tracker(command, descriptors)
        pid: int = start_interpreter(path, arguments, descriptors)
        return pid

    multiprocessing.util.spawnv_passfds = spawnv_passfds  # type: ignore[assignment]  # no public hook


def _command_of(arguments: Sequence[Any]) -> list[str]:
    """Return the command of `python -c`, and the words that follow it, `sys.argv` in newer CPython 3.14."""
    words = [str(word) for word in arguments]
    return words[words.index("-c") + 1 :] if "-c" in words else [""]


def import_all(modules: Iterable[str]) -> Imports:
    """Import the modules, and note what that leaves. To be called before there is a second thread."""
    found = Imports()
    importlib.import_module(READS_ALL)
    before = open_descriptors()
    with (
        _defaults_loaded_later(found.contexts),
        _reads_noted() as found.reads,
        randomness.noted(found.unseeded),
    ):
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception as error:
                # The worker imports it again, and says there what is missing.
                found.why = f"an import failed: {error!r}"
                return found
    found.opened = open_descriptors() - before
    odd = [fd for fd in sorted(found.opened) if not _is_file(fd)]
    if odd:
        found.why = f"an import has opened {os.readlink(f'/proc/self/fd/{odd[0]}')}"
    if threading.active_count() > 1:
        found.why = "an import has started a thread"
    return found


def flush() -> None:
    """Write what the process has kept of its output, which each fork would write once more."""
    for stream in (sys.stdout, sys.stderr):
        # The stream may be None or closed, and its disk may be full.
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _fork_tracker(command: list[str], descriptors: Sequence[int]) -> int:
    """Fork a process that runs the command of a resource tracker; return its pid. Raises OSError.

    A new interpreter takes 0.1 s of processor time, a third of a start from an image. The process has to have
    one thread. Its caller, multiprocessing, has blocked SIGINT and SIGTERM, as for a new interpreter.
    """
    flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a thread may have come meanwhile
        pid = os.fork()
    if pid != 0:
        return pid
    code = 1
    try:
        set_name(TRACKER)
        _reset_signals()
        for fd in open_descriptors() - {0, 1, 2, *map(int, descriptors)}:
            os.close(fd)
        _run(command)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # no exit handler of what the worker has imported


def _fork(imports: Imports) -> _Waiting:
    if imports.why:
        raise Unlike(imports.why)
    flush()
    try:
        passes_on = passed_on()
        near, far = socket.socketpair()
        # Collections of the worker, of the forkserver and of jobs leave out what is there now, and so do not
        # write into pages that the processes share.
        gc.freeze()
        with warnings.catch_warnings():
            # CPython 3.12 warns of threads, those that end in the fork included. They are looked at below.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = -1
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
            try:
                pid = os.fork()
            finally:
                if pid != 0:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    except OSError as error:
        raise Unlike(f"no fork: {error}") from error
    if pid == 0:
        near.close()
        _wait(far, imports)
        raise SystemExit(0)
    far.close()
    child = _Waiting(pid, near, {name: os.environ.get(name) for name in imports.reads}, passes_on)
    if not is_single_threaded():
        child.end()
        raise Unlike("an import has started a thread")
    return child


def is_single_threaded() -> bool:
    """Tell whether the process has one thread, native ones included that do not end in a fork.

    To be called after a fork. Waits up to THREADS_END_WITHIN for a thread that is just ending.
    """
    until = time.monotonic() + THREADS_END_WITHIN
    while len(os.listdir("/proc/self/task")) > 1:
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


class _Waiting:
    """The child, until it is the forkserver, with what it was forked with."""

    def __init__(
        self, pid: int, sock: socket.socket, reads: dict[str, str | None], passes_on: dict[str, str]
    ) -> None:
        self._pid = pid
        self._sock = sock
        self._reads = reads | {name: os.environ[name] for name in os.environ if is_native(name)}
        self._passed_on = passes_on

    def become(self, path: bytes, command: list[str], descriptors: Sequence[int]) -> int:
        """Have the child run the command, with these descriptors at their numbers; return its pid.

        Raises Unlike if it would not do what a new interpreter does, and where it has ended or hangs.
        """
        try:
            self._compare(path)
            # Not by its name: the directory may have been removed, or may be out of reach by now.
            here = os.open(".", os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise Unlike(f"the process can't be looked at: {error}") from error
        environment = dict(os.environ)
        mask = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
        numbers = [int(number) for number in descriptors]
        request = json.dumps([command, environment, mask, numbers]).encode()
        try:
            self._sock.settimeout(TAKE_OVER_WITHIN)
            socket.send_fds(self._sock, [LENGTH.pack(len(request))], [here, *numbers])
            self._sock.sendall(request)
            answer = self._sock.recv(ANSWER_BYTES)
        except OSError as error:
            raise Unlike(f"the child that was to be the forkserver is gone or hangs: {error}") from error
        finally:
            os.close(here)
        if answer != TAKEN_OVER:
            why = answer.decode(errors="replace") or "it has ended"
            raise Unlike(f"the child that was to be the forkserver could not take over: {why}")
        self._sock.close()
        return self._pid

    def _compare(self, path: bytes) -> None:
        if os.fsdecode(path) != sys.executable:
            raise Unlike("multiprocessing.set_executable() was called")
        changed = [name for name, value in self._reads.items() if os.environ.get(name) != value]
        changed += [name for name in os.environ if is_native(name) and name not in self._reads]
        if changed:
            raise Unlike(f"{changed[0]} in the environment has changed since the imports that read it")
        now = passed_on()
        for name, value in self._passed_on.items():
            if now.get(name) != value:
                raise Unlike(f"{name} of the process has changed since the fork")

    def end(self) -> None:
        """Kill the child and reap it."""
        self._sock.close()
        # Code of the agent that waits for any child may have reaped it.
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


# -- the child ----------------------------------------------------------------------------------------------


def _wait(sock: socket.socket, imports: Imports) -> None:
    """Wait for the request and do it. At end of file the worker has gone, and this process ends."""
    set_name(FORKSERVER)
    _reset_signals()
    for fd in open_descriptors() - imports.opened - {0, 1, 2, sock.fileno()}:
        os.close(fd)
    header, received, *_ = socket.recv_fds(sock, LENGTH.size, 16)
    request = b""
    length = LENGTH.unpack(header)[0] if header else 0
    while header and len(request) < length:
        part = sock.recv(length - len(request))
        if not part:
            break
        request += part
    if not header or len(request) < length:
        os._exit(0)
    command, environment, mask, numbers = json.loads(request)
    # Above the numbers that the command expects: `place` closes what is there.
    worker = socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1))
    sock.close()
    try:
        here, *passed = received
        os.fchdir(here)
        os.close(here)
        place(passed, numbers)
        os.environ.clear()
        os.environ.update(environment)
        _load_defaults(imports.contexts)
        _seed_jobs_anew(imports)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        garbage.collect_again()
        worker.sendall(TAKEN_OVER)
    except Exception as error:
        # The worker says why, and starts a new interpreter.
        with suppress(OSError):
            worker.sendall(repr(error).encode()[:ANSWER_BYTES])
        os._exit(1)
    worker.close()
    _run(command)


def _run(command: list[str]) -> None:
    """Run a command of multiprocessing as `python -c` would, with the words that follow it."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = ["-c", *command[1:]]
    exec(command[0], main.__dict__)


def _seed_jobs_anew(imports: Imports) -> None:
    """Give the generators another state in each job; not in what a job forks, which may have seeded them.

    Calls that draw the same numbers would, say, give their files the same names.
    """
    forkserver = os.getpid()

    def after_in_child() -> None:
        if os.getppid() == forkserver:
            randomness.seed_anew(imports.unseeded, imports.bit_generators)

    os.register_at_fork(after_in_child=after_in_child)


def _reset_signals() -> None:
    """Do what exec does: signals that have a handler get the default action, ignored ones stay ignored."""
    faulthandler.unregister(signal.SIGUSR2)
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        # A new interpreter has this one handler.
        if callable(handler) and handler is not signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)


def place(received: Sequence[int], numbers: Sequence[int]) -> None:
    """Give each descriptor its number in this process, and close it at the old one."""
    free = max(numbers) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, free) for fd in received]
    for fd in received:
        os.close(fd)
    for fd, number in zip(moved, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)


# -- what is looked at --------------------------------------------------------------------------------------


@contextmanager
def _reads_noted() -> Iterator[set[str]]:
    """Note the name of each variable that Python code reads in the block."""
    reads: set[str] = set()
    plain: Any = type(os.environ)

    class Noted(plain):  # type: ignore[misc]  # the class has no public name
        __slots__ = ()

        def __getitem__(self, name: str) -> Any:
            reads.add(name)
            return super().__getitem__(name)

        def __iter__(self) -> Any:
            reads.add(WHOLE)
            return super().__iter__()

    # The object stays: modules may have it from `from os import environ`.
    os.environ.__class__ = Noted
    try:
        yield reads
    finally:
        os.environ.__class__ = plain


@contextmanager
def _defaults_loaded_later(contexts: list[ssl.SSLContext]) -> Iterator[None]:
    """Have no TLS context load the certificates of the system in the block; collect those that were to."""

    def collect(context: ssl.SSLContext) -> None:
        contexts.append(context)

    ssl.SSLContext.set_default_verify_paths = collect  # type: ignore[assignment]  # for this block
    try:
        yield
    finally:
        del ssl.SSLContext.set_default_verify_paths


def load_certificates(imports: Imports, changed: set[str]) -> None:
    """Load the certificates of the system into the TLS contexts of the imports, once for all forks.

    Each fork loads them for itself if the target changes a variable of CERTIFICATES, whose names are in
    `changed`. So it does if the system has no certificates: livekit-agents 1.8 sets a variable then, after
    the fork (utils/http_context.py). A forkserver whose variables have changed all the same imports for
    itself.
    """
    paths = ssl.get_default_verify_paths()
    if (paths.cafile or paths.capath) and not CERTIFICATES & changed:
        _load_defaults(imports.contexts)
        imports.reads |= CERTIFICATES


def _load_defaults(contexts: list[ssl.SSLContext]) -> None:
    while contexts:
        contexts.pop().set_default_verify_paths()


def is_native(name: str) -> bool:
    return name.startswith(READ_NATIVELY)


def passed_on() -> dict[str, str]:
    """Return what exec would pass on, by name, of the thread that asks. Raises OSError without /proc."""
    found = {"priority": str(os.getpriority(os.PRIO_PROCESS, 0)), "oom_score_adj": str(oom_adjustment())}
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in PASSED_ON:
            found[name] = value
    for line in Path("/proc/thread-self/limits").read_text().splitlines()[1:]:
        # `Max open files            1024                 524288               files`
        found[line[:25].rstrip()] = line[25:]
    return found


def open_descriptors() -> set[int]:
    """Return the numbers of the open descriptors; not that of the directory that lists them."""
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


def _is_file(fd: int) -> bool:
    """Tell whether a descriptor is a file, a directory, or a device such as /dev/urandom or a terminal."""
    found = os.fstat(fd)
    mode = found.st_mode
    is_plain_device = stat.S_ISCHR(mode) and os.major(found.st_rdev) in PLAIN_DEVICES
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or is_plain_device
