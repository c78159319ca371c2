"""A supervisor with the user's agent and a local LiveKit server, started for one scene and taken down.

Both are processes. The stage drives them by signals, the control socket, pipes and files, and hears from jobs
over a datagram socket. Each wait has a deadline, and however a scene ends, no process of it stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lastcall.supervisor.errors import ConfigError, NotRunning, SupervisorError
from lastcall.supervisor.processes import socket_directory
from lastcall.supervisor.views import control_socket
from lastcall.worker.base import target_form, variables
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.plurals import counted
from lastcall.worker.base.settings import Rehearsal, WorkerSettings
from lastcall.worker.base.wire import MAX_LINE_BYTES, OF_REHEARSED_JOB, EntrypointBegan, RehearsedJobSays

# Seconds. Ours: it takes about one, and much longer on a machine that is busy with other builds.
SERVER_STARTS_WITHIN = 20.0
# Seconds. Ours: agents load models at their start, and nobody waits in front of a pipeline.
WORKERS_READY_WITHIN = 90.0
LOOK_EVERY = 0.02
# Seconds that entrypoints of running jobs may take to begin. Ours: before 1.8 a job process imports
# livekit-agents first, which took more than 5 s on a machine with much else to do.
ENTRYPOINTS_BEGIN_WITHIN = 30.0
# Where a log line of lastcall, or of livekit-agents, says what is wrong.
KEYS_THAT_SAY_WHY = ("event", "message", "reason", "exc_info", "traceback")


# Takes what is waited for, and the time until which the wait lasts at most, by time.monotonic().
Tell = Callable[[str, float], None]


def tell_nobody(_what: str, _due: float) -> None:
    """Say nothing of a wait."""


class StageError(SupervisorError):
    """Raised when a scene can't be played at all; the text says what was in the way."""


class Stage:
    """One supervisor and one LiveKit server; use as a context manager."""

    def __init__(
        self,
        target: str,
        arguments: Sequence[str] = (),
        *,
        grace: float,
        job_seconds: float = 0.0,
        work_seconds: float = 0.0,
        workers: int = 1,
        tell: Tell = tell_nobody,
    ) -> None:
        self.target = target
        self.arguments = arguments
        self.events: list[dict[str, Any]] = []
        self.heard: list[RehearsedJobSays] = []
        self._grace = grace
        self._job_seconds = job_seconds
        self._work_seconds = work_seconds
        self._workers = workers
        self._tell = tell
        self._token = secrets.token_hex(8)
        self._stack = contextlib.ExitStack()
        self._rest = b""
        self._asked_at = 0.0

    def _bind(self, path: Path) -> None:
        """Give the socket a name. Raises ConfigError where no socket can have it, as below a long TMPDIR."""
        try:
            self._jobs.bind(str(path))
        except OSError as error:
            raise ConfigError(
                f"TMPDIR: no socket can be made in {str(path.parent)!r}: {error.strerror or error};"
                " set TMPDIR to a short path that can be written"
            ) from error

    def __enter__(self) -> Stage:
        if wrong := socket_directory.problem():
            raise ConfigError(wrong)
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lastcall-")))
            self._stop = self.directory / "stop"
            self._jobs = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            self._jobs.setblocking(False)
            if self._job_seconds:  # otherwise no job has anything to say
                self._bind(self.directory / "jobs")
            environment = self._start_server(stack)
            self._start_supervisor(stack, environment)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start_server(self, stack: contextlib.ExitStack) -> dict[str, str]:
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-m", "lastcall.worker.local.driven"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        stack.callback(_end, self._server)
        assert self._server.stdout is not None
        os.set_blocking(self._server.stdout.fileno(), False)
        self._until(
            lambda: self.events,
            SERVER_STARTS_WITHIN,
            "the local dispatch server did not start",
            what="the local LiveKit server",
        )
        environment: dict[str, str] = self.events.pop(0)["environment"]
        return environment

    def _start_supervisor(self, stack: contextlib.ExitStack, livekit: Mapping[str, str]) -> None:
        # Neither the user's options nor an env_file of theirs: a rehearsal reaches nothing beyond loopback.
        config = self.directory / "lastcall.toml"
        # A worker that fails to start would fail again: it is not tried for long.
        config.write_text("[restart]\nintensity = 2\nbackoff = [0.1, 0.2]\n")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(variables.PREFIX)}
        environment |= livekit
        environment |= {
            variables.REHEARSAL_TOKEN: self._token,
            variables.REHEARSAL: self._worker_settings(livekit["LIVEKIT_URL"]).to_json(),
        }
        command = [sys.executable, "-P", "-m", "lastcall", "run", "--http", "off"]
        command += ["--config", str(config), "--log-format", "json"]
        command += ["--workers", str(self._workers), "--grace", str(self._grace)]
        command += [
            "--control",
            str(self.directory / "control"),
            "--receipt",
            str(self.directory / "receipt"),
        ]
        command += target_form.words(self.target, self.arguments)
        with open(self.directory / "log", "wb") as log:
            self._supervisor = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        stack.callback(self._take_down)

    def _worker_settings(self, local_url: str) -> WorkerSettings:
        rehearsal = None
        if self._job_seconds:
            rehearsal = Rehearsal(
                job_seconds=self._job_seconds,
                work_seconds=self._work_seconds,
                stop=str(self._stop),
                socket=str(self.directory / "jobs"),
            )
        return WorkerSettings(local_url=local_url, rehearsal=rehearsal)

    def _take_down(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._supervisor.kill()
        self._supervisor.wait(10)

    # -- what a scene does ----------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Wait until every worker is registered here. Raises StageError, ConfigError for a wrong target."""
        deadline = time.monotonic() + WORKERS_READY_WITHIN
        while len(self.seen("registered")) < self._workers:
            self._tell("waits for the agent to register", deadline)
            self._pump(LOOK_EVERY)
            if self._supervisor.poll() is not None:
                self._explain_end()
            if time.monotonic() > deadline:
                raise StageError(f"no worker registered within {WORKERS_READY_WITHIN:.0f} s")
        self._until(
            self._accepts,
            WORKERS_READY_WITHIN,
            "no worker accepts jobs although all have registered",
            what="the agent to accept jobs",
        )

    def dispatch(self, room: str) -> None:
        """Offer one job; how it went is seen in the events."""
        self._tell_server(room=room, agent_name=self.seen("registered")[0]["detail"]["agent_name"])

    def reconnect(self) -> None:
        """Have every agent that is in its room reconnect from the start."""
        self._tell_server(reconnect=True)

    def joined(self) -> int:
        """Return how many agents have joined their rooms."""
        return len({e["detail"]["room"] for e in self.seen("joined") if e["detail"]["is_agent"]})

    def _tell_server(self, **command: Any) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(command).encode() + b"\n")
        self._server.stdin.flush()

    def wait_jobs(self, count: int, timeout: float) -> None:
        """Dispatch until so many jobs run. Raises StageError when the agent does not take them.

        A job is reported as running when its process is given it, which is before its entrypoint begins.
        """
        deadline = time.monotonic() + timeout
        number = 0
        while len(self.running()) < count:
            outstanding = number - len([e for e in self.events if e["kind"].startswith("dispatch_")])
            if len(self.seen("assigned")) < count and not outstanding:
                number += 1
                self.dispatch(f"rehearsal-{number}")
            self._tell(f"waits for {counted(count, 'job')} to run", deadline)
            self._pump(0.2)
            if time.monotonic() > deadline:
                ended = {e["kind"].removeprefix("dispatch_") for e in self.events if "dispatch_" in e["kind"]}
                raise StageError(
                    f"only {len(self.running())} of {counted(count, 'job')} ran within {timeout:.0f} s"
                    f" (dispatches: {', '.join(sorted(ended)) or 'unanswered'}): its request_fnc refuses, or"
                    " its job processes do not come up"
                )

        due = time.monotonic() + ENTRYPOINTS_BEGIN_WITHIN
        while self._begun() < count and time.monotonic() < due:
            self._tell(f"waits for {counted(count, 'entrypoint')} to begin", due)
            self._pump(LOOK_EVERY)

    def signal(self, number: signal.Signals, *, group: bool = False, everybody: bool = False) -> None:
        """Send a signal to the supervisor, its process group, or every process there is."""
        self._asked_at = self._asked_at or time.monotonic()
        self._stop.touch()
        if group:
            os.killpg(self._supervisor.pid, number)
            return
        for pid in self.processes() if everybody else [self._supervisor.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait_end(self, timeout: float, between: Callable[[], None]) -> int | None:
        """Wait for the supervisor's end, calling `between` now and then; return its exit code, if any."""
        deadline = time.monotonic() + timeout
        while self._supervisor.poll() is None:
            if time.monotonic() > deadline:
                return None
            between()
            self._tell("waits for the end of the stop", deadline)
            self._pump(0.05)
        self._pump(0.1)
        return self._supervisor.returncode

    # -- what a scene looks at ------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self._supervisor.pid

    @property
    def asked_at(self) -> float:
        return self._asked_at

    def seen(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def running(self) -> set[str]:
        """Return the jobs that the server has been told to be running, ended ones included."""
        return {e["job_id"] for e in self.seen("job") if e["detail"]["status"] == "JS_RUNNING"}

    def ends(self) -> dict[str, str]:
        """Return how each assigned job ended, as the server was told. JS_RUNNING says that it was not told.

        A server forgets the job of an agent that has left its room, and takes no word of its end.
        """
        ends = {event["job_id"]: "JS_RUNNING" for event in self.seen("assigned")}
        forgotten = {event["job_id"] for event in self.seen("terminated")}
        ends.update(
            (e["job_id"], e["detail"]["status"])
            for e in self.seen("job")
            if e["detail"]["known"] or e["job_id"] in forgotten
        )
        return ends

    def accepted_late(self) -> list[str]:
        """Return the jobs that a worker said yes to after it had told the server that it takes none."""
        late = []
        for event in self.seen("accepted"):
            fulls = [e["at"] for e in self.seen("full") if e["worker_id"] == event["worker_id"]]
            told = min((at for at in fulls if at >= self._asked_at), default=self._asked_at + 1.0)
            if event["at"] > told:
                late.append(event["job_id"])
        return late

    def receipt(self) -> dict[str, Any]:
        """Return the receipt; empty when there is none."""
        try:
            document: dict[str, Any] = json.loads((self.directory / "receipt").read_text())
        except (OSError, ValueError):
            return {}
        return document

    def log(self) -> Iterator[dict[str, Any]]:
        """Yield the lines that are JSON of what supervisor and workers wrote."""
        for line in (self.directory / "log").read_text(errors="replace").splitlines():
            if line.startswith("{"):
                with contextlib.suppress(ValueError):
                    yield json.loads(line)

    def errors(self) -> list[str]:
        """Return the last error that a worker has logged, with the exception's own line; or nothing."""
        found = [line for line in self.log() if str(line.get("level", "")).lower() == "error"]
        texts = [
            ": ".join(str(text).strip().splitlines()[-1] for text in map(line.get, KEYS_THAT_SAY_WHY) if text)
            for line in found[-1:]
        ]
        return [f"its last error: {text}" for text in texts]

    def tail(self) -> str:
        """Return the end of what they wrote, for people."""
        return (self.directory / "log").read_text(errors="replace")[-4000:]

    def processes(self) -> list[int]:
        """Return every living process of this stage, wherever it went."""
        mark = f"{variables.REHEARSAL_TOKEN}={self._token}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def _begun(self) -> int:
        return sum(isinstance(message, EntrypointBegan) for message in self.heard)

    # -- waiting --------------------------------------------------------------------------------------

    def _until(self, condition: Callable[[], object], timeout: float, otherwise: str, *, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            self._tell(f"waits for {what}", deadline)
            self._pump(LOOK_EVERY)
            if time.monotonic() > deadline:
                raise StageError(otherwise)

    def _pump(self, seconds: float) -> None:
        """Read what the server and the jobs have said, waiting so long at most."""
        assert self._server.stdout is not None
        server, jobs = self._server.stdout.fileno(), self._jobs.fileno()
        due = time.monotonic() + seconds
        while readable := select.select([server, jobs], [], [], max(0.0, due - time.monotonic()))[0]:
            if server in readable:
                self._read_server(server)
            if jobs in readable:
                message = OF_REHEARSED_JOB.decode(self._jobs.recv(MAX_LINE_BYTES))
                self.heard += [] if message is None else [message]

    def _read_server(self, fd: int) -> None:
        data = os.read(fd, 1 << 16)
        if not data:
            raise StageError("the local dispatch server has ended; its own message is above")
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.events += [json.loads(line) for line in lines]

    def _accepts(self) -> bool:
        try:
            document = control_socket.ask(self.directory / "control", "status")
        except NotRunning:
            return False
        return all(slot["state"] == "ready" for slot in document["slots"])

    def _explain_end(self) -> None:
        receipt = self.receipt()
        last = (self.directory / "log").read_text(errors="replace").strip().splitlines()[-1:]
        text = receipt.get("fault") or receipt.get("reason") or "".join(last).removeprefix("lastcall: ")
        if self._supervisor.returncode == Exit.CONFIG:
            raise ConfigError(text)
        raise StageError(
            f"the supervisor ended with {self._supervisor.returncode} before it was ready: {text}"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)
    process.stdout.close()
