"""How a worker is started: its command, environment and descriptors.

    child's number   what
    0                /dev/null
    1, 2             pipes that the supervisor reads
    3                the worker's end of the control socketpair
    4, 5             read ends of 1 and 2, for when the supervisor is gone
    6                the lifeline, if there is a companion

An opaque worker gets the first two rows only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lastcall.supervisor.errors import SpawnError
from lastcall.supervisor.processes.child import Child, high, pipe, spawn
from lastcall.supervisor.processes.descendants import image_mark_of, mark_of
from lastcall.supervisor.processes.image import CHANNEL_FD, Image
from lastcall.supervisor.processes.output_reader import OutputReader
from lastcall.supervisor.processes.reaper import ExitStatus, Reaper
from lastcall.supervisor.processes.socket_directory import make as make_scratch
from lastcall.worker.base import target_form, variables
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.records import dataclass
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.base.stopping import SHIELDED

CONTROL_FD = 3
OUTPUT_FDS = (4, 5)
LIFELINE_FD = 6
# SGR codes of a terminal (ECMA-48): cyan, yellow, magenta, green, blue. Red is left to errors.
COLOURS = (36, 33, 35, 32, 34)
# systemd means these for the supervisor alone (sd_notify(3), sd_listen_fds(3)): a worker that inherited one
# would answer in the name of the supervisor.
NOT_INHERITED = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)


@dataclass(slots=True, kw_only=True)
class Launched:
    """A started worker, and the supervisor's ends of socket and pipes. An opaque one has no `control`."""

    child: Child
    control: socket.socket | None
    relays: tuple[OutputReader, OutputReader]
    mark: str
    scratch: str

    def close(self) -> None:
        """Close the supervisor's ends, and remove the directory in which the worker kept its sockets."""
        for relay in self.relays:
            relay.close()
        self.clear()

    def clear(self) -> None:
        """Remove the directory of a worker that has ended: a worker that was killed could not do so."""
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """Starts workers that are all alike."""

    target: str
    arguments: Sequence[str]
    command: Sequence[str]
    supervisor_id: str
    environment: Mapping[str, str]
    settings: WorkerSettings
    reaper: Reaper
    prefixes: bool
    # The end of a pipe that workers hold for as long as they live; the Inworld broker has the other end.
    lifeline: int | None
    write_output: Callable[[bytes], None]
    write_errors: Callable[[bytes], None]
    # The process that workers are forked from, if they are not to be started by exec.
    image: Image | None = None

    @property
    def is_opaque(self) -> bool:
        return bool(self.command)

    def end_image(self) -> None:
        """Have no image any more: no worker of this program is to be started."""
        if self.image is not None:
            self.image.close()

    @property
    def starts_within(self) -> float:
        """Return the seconds that a start may take until there is a process, which may wait for an image."""
        return 0.0 if self.image is None else self.image.starts_within

    async def start(
        self,
        slot: int,
        generation: int,
        on_exit: Callable[[ExitStatus], None],
        *,
        changed: Condition,
        is_wanted: Callable[[], bool],
        is_candidate: bool = False,
    ) -> Launched | None:
        """Start one worker: forked from the image, or by exec. Raises SpawnError.

        A candidate is not started where the kernel has killed its image for memory, or the scout: the imports
        of the candidate would need as much, and the kernel would take the calls for that.

        Returns None when the worker is not wanted any more. That can be so only while an image is asked, and
        `changed` is notified then.
        """
        try:
            if self.image is None:
                return await self._start(slot, generation, on_exit, changed, is_wanted)
            async with self.image.turn(changed=changed, is_wanted=is_wanted):
                if is_candidate and self.image.lacks_memory:
                    why = "the kernel has killed its image, or the scout of that, for memory"
                    raise SpawnError(f"no memory for another worker: {why}")
                return await self._start(slot, generation, on_exit, changed, is_wanted)
        except OSError as error:
            raise SpawnError(f"no room for another worker: {error.strerror}") from error

    async def _start(
        self,
        slot: int,
        generation: int,
        on_exit: Callable[[ExitStatus], None],
        changed: Condition,
        is_wanted: Callable[[], bool],
    ) -> Launched | None:
        mark = mark_of(self.supervisor_id, slot, generation)
        settings = self.settings
        control = None
        scratch = ""
        # `failed` undoes all that the start has opened; the numbers of `theirs` are closed in any case.
        with contextlib.ExitStack() as theirs_closed, contextlib.ExitStack() as failed:

            def give(number: int, fd: int) -> None:
                theirs[number] = fd
                theirs_closed.callback(os.close, fd)

            def pipe_to(number: int) -> int:
                read, write = pipe()
                failed.callback(os.close, read)
                give(number, write)
                return read

            theirs: dict[int, int] = {}
            give(0, high(os.open(os.devnull, os.O_RDONLY)))
            out, err = pipe_to(1), pipe_to(2)
            if not self.is_opaque:
                scratch = make_scratch()
                failed.callback(shutil.rmtree, scratch, ignore_errors=True)
                control, far = socket.socketpair()
                failed.callback(control.close)
                give(CONTROL_FD, high(far.detach()))
                if self.lifeline is not None:
                    give(LIFELINE_FD, high(os.dup(self.lifeline)))
                settings = replace(
                    self.settings,
                    control_fd=CONTROL_FD,
                    output_fds=OUTPUT_FDS,
                    lifeline_fd=LIFELINE_FD if self.lifeline is not None else None,
                    slot=slot,
                    generation=generation,
                    scratch=scratch,
                )
            descriptors = (
                theirs if self.is_opaque else theirs | dict(zip(OUTPUT_FDS, (out, err), strict=True))
            )
            forked = None
            if self.image is not None:
                forked = await self.image.fork(
                    settings.to_json(), mark, descriptors, on_exit, changed=changed, is_wanted=is_wanted
                )
            if forked is not None:
                failed.callback(forked.end)
                child = forked.child
            elif is_wanted():
                environment = _environment(self.environment, mark)
                argv = self.command
                if not self.is_opaque:
                    environment |= _for_python(environment, settings)
                    argv = worker_command(self.target, self.arguments)
                child = spawn(
                    argv,
                    environment=environment,
                    descriptors=descriptors,
                    blocked=() if self.is_opaque else SHIELDED,
                    reaper=self.reaper,
                    on_exit=on_exit,
                )
            else:
                return None
            failed.pop_all()
        prefix = _prefix(slot, generation) if self.prefixes else b""
        relays = (OutputReader(out, self.write_output, prefix), OutputReader(err, self.write_errors, prefix))
        if forked is not None:
            forked.go()
        return Launched(child=child, control=control, relays=relays, mark=mark, scratch=scratch)


def worker_command(target: str, arguments: Sequence[str]) -> list[str]:
    """Return the command line of a worker, and of an image, whose forks keep the command line."""
    return [sys.executable, "-P", "-m", "lastcall.worker", *target_form.words(target, arguments)]


def image_environment(environment: Mapping[str, str], supervisor_id: str, number: int) -> dict[str, str]:
    """Return the environment of an image: that of its workers."""
    settings = WorkerSettings(control_fd=CHANNEL_FD, is_image=True)
    kept = _environment(environment, image_mark_of(supervisor_id, number))
    return kept | _for_python(kept, settings)


def _environment(environment: Mapping[str, str], mark: str) -> dict[str, str]:
    kept = {name: value for name, value in environment.items() if name not in NOT_INHERITED}
    return kept | {variables.MARK: mark}


def _for_python(environment: Mapping[str, str], settings: WorkerSettings) -> dict[str, str]:
    unbuffered = environment.get("PYTHONUNBUFFERED", "1")
    return {variables.WORKER: settings.to_json(), "PYTHONUNBUFFERED": unbuffered}


def _prefix(slot: int, generation: int) -> bytes:
    colour = COLOURS[slot % len(COLOURS)]
    return f"\x1b[{colour}m{slot}.{generation} |\x1b[0m ".encode()
