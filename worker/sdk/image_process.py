"""The image: a process that has imported what every worker imports, and forks workers when it is asked to.

Problem: each worker imports livekit-agents and what livekit-agents preloads. That takes 1.5 s and more of
processor time, and each worker has a copy in memory.

    supervisor                         image                            worker
    starts it ───────────────────────► imports, looks at itself
                                       says that it is ready
    asks for a worker ───────────────► forks twice ───────────────────► has its mark, session, descriptors
    owns its pid and pidfd  ◄───────────────────────────────────────── announces itself, waits
    gives GO  ────────────────────────────────────────────────────────► forks its forkserver, loads the target

The first fork ends at once, so the kernel gives the worker to the supervisor, the subreaper. Each worker is
otherwise like one that was started by exec: `serve` returns in it, and the worker goes on where it would have
begun to import.

Nothing of the agent is imported here. The image has the environment of the workers of one program, so its
imports read there what those of a worker would read.

Of the processes of a control group that is out of memory the kernel kills the image first, because its loss
costs no call. Else the kernel would take a job for the imports of an image that is made anew.

The image takes no signal but SIGKILL. It ends with the supervisor: the kernel kills it then, and where its
parent has ended before it could ask for that, it reads end of file.
"""

from __future__ import annotations

import fcntl
import gc
import multiprocessing.process
import os
import select
import socket
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import NoReturn

from lastcall.worker.base import randomness
from lastcall.worker.base.errors import Incompatible
from lastcall.worker.base.image_wire import (
    ADOPTED_WITHIN,
    GO,
    GO_FD,
    GO_WITHIN,
    MAX_BYTES,
    MAX_DESCRIPTORS,
    Answer,
    Request,
)
from lastcall.worker.base.memory import adjust_oom, oom_adjustment
from lastcall.worker.base.process import IMAGE, end_with_parent, name, rewrite_variable, set_name
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.base.variables import MARK
from lastcall.worker.sdk import preflight, scout
from lastcall.worker.sdk.forkserver import (
    CERTIFICATES,
    IMPORTED,
    Imports,
    flush,
    import_all,
    is_single_threaded,
    load_certificates,
    place,
)

# Imported after IMPORTED: the rest of a worker, and the warm-up that livekit-agents has in its forkserver
# (worker.py). 1.8 has a module for that; 1.5 imports `av` there, and 1.3 imports it anyway.
WORKER_MODULES = (
    "lastcall.worker.host",
    "lastcall.worker.job.rehearsed",
    "lastcall.worker.job.room_watch",
    "lastcall.worker.sdk.agent_server",
    "lastcall.worker.sdk.child_processes",
    "lastcall.worker.shield",
    "livekit.agents.cli.log",
)
WARM_UP = ("livekit.agents.ipc._preload", "av")
# Seconds between two looks whether the first fork has ended. Ours: it ends within a millisecond.
LOOK_AGAIN_AFTER = 0.0005


def serve(
    settings: WorkerSettings, run_target: Callable[[], None], is_own: Callable[[str, str], bool]
) -> tuple[WorkerSettings, Imports]:
    """Import, and fork a worker for each request. Return in each worker, with its settings.

    `run_target` and `is_own` are for `scout.look`. The image itself ends here.
    """
    assert settings.control_fd is not None
    supervisor = os.getppid()
    end_with_parent()
    channel = _move_up(settings.control_fd)
    own_name = name()
    set_name(IMAGE)
    imports = _import()
    packages, left_out, was_killed = 0, dict[str, str](), False
    if not imports.why:
        # The scout takes no time of the first start where there is another processor.
        found = scout.look(run_target, is_own, meanwhile=lambda: imports.add(_warm_up()))
        imports.why = imports.why or found.clash
    if not imports.why:
        more, left_out = scout.import_packages(found)
        packages, was_killed = len(found.packages) - len(left_out), found.was_killed
        imports.add(more)
        load_certificates(imports, found.changed)
    if imports.why:
        _say(channel, Answer(ready=imports.why))
        os._exit(0)
    imports.bit_generators = randomness.generators_of_numpy()
    gc.freeze()
    flush()
    _say(channel, Answer(ready="", packages=packages, left_out=left_out, scout_was_killed=was_killed))
    while True:
        packet, received = _next(channel)
        if not packet:
            os._exit(0)
        request = Request.decode(packet)
        if len(received) < len(request.numbers):  # the kernel drops those that have no room here
            _say(channel, Answer(number=request.number, error="no room for the descriptors"))
        elif (between := _fork(channel, request)) is not None:
            try:
                adjust_oom(oom_adjustment(supervisor))  # as exec would have passed it on
                _become(channel, request, received, parent=between, supervisor=supervisor)
            except (OSError, ValueError) as error:
                with suppress(OSError):
                    channel.send(Answer(number=request.number, error=f"no worker: {error}").encode())
                os._exit(1)
            set_name(own_name)
            randomness.seed_anew(imports.unseeded, imports.bit_generators)
            return WorkerSettings.from_json(request.settings), imports
        for fd in received:
            os.close(fd)


def _move_up(fd: int) -> socket.socket:
    """Return the channel at a number above those of a worker, and fill these: an import may open files."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, MAX_DESCRIPTORS * 4)
    os.close(fd)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for number in range(3, GO_FD + 1):
        if number != null:
            os.dup2(null, number, inheritable=False)
    if null > GO_FD:
        os.close(null)
    return socket.socket(fileno=high)


def _say(channel: socket.socket, answer: Answer) -> None:
    """Send a packet; end where the supervisor has gone."""
    try:
        channel.send(answer.encode())
    except OSError:
        os._exit(0)


def _next(channel: socket.socket) -> tuple[bytes, list[int]]:
    """Return the next packet and its descriptors; an empty packet at the end of the supervisor."""
    try:
        packet, received, *_ = socket.recv_fds(channel, MAX_BYTES, MAX_DESCRIPTORS)
    except OSError:
        return b"", []
    return packet, received


def _import() -> Imports:
    """Import what a worker has; tell whether a fork would be like a worker that has imported by itself."""
    imports = import_all(IMPORTED)
    if imports.why:
        return imports
    try:
        preflight.check()
    except Incompatible as error:  # the worker says so, and names what is missing
        imports.why = str(error)
        return imports
    imports.why = preflight.untried()
    if imports.why:
        return imports
    imports.add(import_all(WORKER_MODULES))
    return imports


def _warm_up() -> Imports:
    """Import the warm-up, and tell whether forks of this process are safe."""
    imports = import_all([module for module in WARM_UP if _is_there(module)])
    imports.reads -= CERTIFICATES  # it keeps nothing of them: each TLS context that is made later reads them
    if not imports.why and not _forks_alone():
        imports.why = "an import has started a thread"
    return imports


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def _forks_alone() -> bool:
    """Fork once, in vain: some native threads end in the first fork (pthread_atfork(3))."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return is_single_threaded()


# -- a fork -------------------------------------------------------------------------------------------------


def _fork(channel: socket.socket, request: Request) -> int | None:
    """Fork a worker, whose parent is the subreaper: return in the worker the pid of the fork between.

    Returns None in the image.
    """
    with warnings.catch_warnings():
        # CPython 3.12 warns of threads; there are none.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            between = os.fork()
        except OSError as error:
            _say(channel, Answer(number=request.number, error=f"no fork: {error}"))
            return None
        if between == 0:
            return _fork_again(channel, request)
    os.waitpid(between, 0)
    return None


def _fork_again(channel: socket.socket, request: Request) -> int:
    """Fork the worker, and end; return in the worker. The worker has its mark from its first instant on."""
    try:
        rewrite_variable(MARK, request.mark)
        between = os.getpid()
        if os.fork() != 0:
            os._exit(0)
        return between
    except OSError as error:
        _say(channel, Answer(number=request.number, error=f"no fork: {error}"))
        os._exit(1)


def _become(
    channel: socket.socket, request: Request, received: list[int], *, parent: int, supervisor: int
) -> None:
    """Become what a process is that was started as a worker. Returns once the supervisor owns it."""
    os.setsid()
    # Each interpreter makes one by itself. Two workers with the same one could use each other's managers.
    multiprocessing.process.current_process().authkey = os.urandom(32)
    place(received, request.numbers)
    for number in range(3, GO_FD + 1):
        if number in request.numbers:
            os.set_inheritable(number, False)
        else:
            os.close(number)  # what has filled it
    until = time.monotonic() + ADOPTED_WITHIN
    while os.getppid() == parent:
        if time.monotonic() > until:
            _end()
        time.sleep(LOOK_AGAIN_AFTER)
    if os.getppid() != supervisor:
        _end()
    pid = os.getpid()
    pidfd = os.pidfd_open(pid)
    try:
        socket.send_fds(channel, [Answer(number=request.number, pid=pid).encode()], [pidfd])
    except OSError:
        _end()
    os.close(pidfd)
    channel.close()
    ready, _, _ = select.select([GO_FD], [], [], GO_WITHIN)
    if not ready or os.read(GO_FD, len(GO)) != GO:
        _end()
    os.close(GO_FD)


def _end() -> NoReturn:
    """End without a trace: nobody wants this worker."""
    os._exit(0)
