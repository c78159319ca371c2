"""A real supervisor, its workers, and a local LiveKit server, started and taken down by one test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

import psutil

from lastcall.worker.base import variables
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.local.livekit_server import Dispatched, DispatchServer, Event
from tests.support.terminal import Terminal

HERE = Path(__file__).parent.parent
AGENT = str(HERE / "agents" / "calls.py")
SAMPLE = str(HERE.parent / "lastcall" / "worker" / "local" / "sample.py")  # the demo's agent
LASTCALL = [sys.executable, "-m", "lastcall"]
TOKEN = "LASTCALL_WORKER_TEST_TOKEN"  # lastcall warns of no variable with this prefix
START = 40.0
LOOK_EVERY = 0.02


class StartRun(Protocol):
    """The `run` fixture: starts one `lastcall` process that ends with the test. The arguments are `Run`'s."""

    async def __call__(
        self,
        *arguments: str,
        livekit: bool = True,
        environment: dict[str, str] | None = None,
        command: list[str] | None = None,
        stdout: int | BinaryIO | None = None,
        new_session: bool = True,
        prefix: Iterable[str] = (),
        cwd: Path | None = None,
        terminal: Terminal | None = None,
        rooms: bool = False,
    ) -> Run: ...


class JsonLines:
    """The JSON objects in a file that grows, each of which is parsed once; a test looks every 10 ms."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0  # bytes
        self._entries: list[dict[str, Any]] = []

    def entries(self) -> list[dict[str, Any]]:
        """Return all; a line that is still being written is none."""
        with open(self._path, "rb") as file:
            file.seek(self._read)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(end)
        lines = whole.decode(errors="replace").split("\n")
        self._entries += [json.loads(line) for line in lines if line.startswith("{")]
        return list(self._entries)


class Run:
    """One `lastcall` process. The arguments are its command line.

    `livekit` starts a local LiveKit server beside the process. With `rooms` jobs can join rooms of that
    server. No variable of the tester's LiveKit or Inworld account reaches the process.

    `late` are the ends of the last waits of this process, each with the seconds by which it was late.
    """

    late: ClassVar[deque[tuple[float, float]]] = deque(maxlen=50_000)

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        livekit: bool = True,
        environment: dict[str, str] | None = None,
        command: list[str] | None = None,
        stdout: int | BinaryIO | None = None,
        new_session: bool = True,
        prefix: Iterable[str] = (),
        cwd: Path | None = None,
        terminal: Terminal | None = None,
        rooms: bool = False,
    ) -> None:
        self.directory = directory
        self.token = secrets.token_hex(8)
        self.out = directory / "out"
        self.err = directory / "err"
        self.receipt_file = directory / "receipt.json"
        self.job_log = directory / "jobs"
        self.control = directory / "c.sock"
        self.server = DispatchServer() if livekit else None
        self._log = JsonLines(self.err)
        self._notes = JsonLines(self.job_log)
        self.signalled_at = 0.0
        self.tmp = Path(tempfile.mkdtemp(prefix="lc-"))  # short: there are limits to a socket's path
        self._arguments = list(arguments)
        self._environment = environment or {}
        self._command = command
        self._stdout = stdout
        self._new_session = new_session
        self._prefix = list(prefix)
        self._cwd = cwd
        self._terminal = terminal
        self._rooms = rooms
        self.process: subprocess.Popen[bytes]

    async def __aenter__(self) -> Run:
        self.job_log.touch()
        foreign = ("LIVEKIT_API_", "LIVEKIT_URL", "INWORLD_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        environment |= {"JOB_LOG": str(self.job_log), TOKEN: self.token, "TMPDIR": str(self.tmp)}
        if self.server is not None:
            await self.server.__aenter__()
            environment |= self.server.environment
            if self._rooms:  # as a rehearsal does it
                settings = WorkerSettings(local_url=self.server.url)
                environment[variables.REHEARSAL] = settings.to_json()
        environment |= self._environment
        command = self._command or [*self._prefix, *LASTCALL, *self._options(), *self._tail()]
        if self._terminal is not None:
            command = [*self._terminal.leash, *command]
        slave = None if self._terminal is None else self._terminal.slave
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=slave or subprocess.DEVNULL,
                stdout=slave or self._stdout or out,
                stderr=slave or err,
                start_new_session=self._new_session,
                cwd=self._cwd,
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self.left():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if self.server is not None:
            await self.server.__aexit__()
        shutil.rmtree(self.tmp)

    def _options(self) -> list[str]:
        if self._arguments[:1] != ["run"]:
            return self._arguments
        options = [
            "run",
            "--http",
            "off",
            "--control",
            str(self.control),
            "--receipt",
            str(self.receipt_file),
        ]
        at = self._arguments.index("--") if "--" in self._arguments else len(self._arguments)
        return [*options, *self._arguments[1:at]]

    def _tail(self) -> list[str]:
        if self._arguments[:1] != ["run"] or "--" not in self._arguments:
            return []
        return self._arguments[self._arguments.index("--") :]

    # -- what a test does -----------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def livekit(self) -> DispatchServer:
        assert self.server is not None
        return self.server

    async def ready(self, workers: int = 1) -> None:
        """Wait until so many workers are registered and available."""
        await self.until(lambda: len(self.livekit.available()) == workers, START)

    async def dispatch(self, room: str = "room", **spec: Any) -> Dispatched:
        result = await self.livekit.dispatch(room, metadata=json.dumps(spec))
        assert result.outcome == "assigned", (result, self.logs())
        return result

    async def job_says(self, job_id: str, what: str, timeout: float = 30.0) -> dict[str, Any]:
        """Wait for a line of a job's own log."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [n for n in self.notes() if n["job"] == job_id and n["what"] == what]
            return bool(found)

        await self.until(look, timeout)
        return found[0]

    def let_go(self) -> None:
        """Have every job that holds come to its end."""
        self.job_log.with_name(self.job_log.name + ".go").touch()

    def hold_on(self) -> None:
        """Have the jobs that begin to hold from now on wait for another `let_go`."""
        self.job_log.with_name(self.job_log.name + ".go").unlink()

    def slow_down(self) -> Path:
        """Have the job processes that start from now on take for ever to, while the returned file exists."""
        slow = self.job_log.with_name(self.job_log.name + ".slow")
        slow.touch()
        return slow

    def break_prewarm(self) -> None:
        """Have the job processes that start from now on fail to."""
        self.job_log.with_name(self.job_log.name + ".raise").touch()

    def kill(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal the supervisor alone."""
        self._mark()
        os.kill(self.pid, number)

    def kill_group(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal the supervisor's process group, and that of each of its workers' sessions."""
        self._mark()
        for group in {os.getpgid(p.pid) for p in self.family()}:
            os.killpg(group, number)

    def kill_all(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal every process of the tree, as a stop of a whole cgroup does."""
        self._mark()
        for process in self.family():
            try:
                os.kill(process.pid, number)
            except ProcessLookupError:
                continue

    def _mark(self) -> None:
        self.signalled_at = self.signalled_at or time.monotonic()

    async def exit(self, timeout: float = 30.0) -> int:
        """Wait for the end and return the exit code."""
        try:
            await self.until(lambda: self.process.poll() is not None, timeout)
        except TimeoutError:
            raise AssertionError(f"still running after {timeout} s\n{self.logs()}") from None
        assert self.process.returncode is not None
        if self.receipt_file.exists():
            print(self.receipt_file.read_text())  # shown when the test fails
        print(self.logs())
        return self.process.returncode

    async def until(self, condition: Callable[[], object], timeout: float = 20.0) -> None:
        """Look again and again until the condition holds. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while not condition():
            self._read_terminal()
            began = time.monotonic()
            if began > deadline:
                raise TimeoutError(f"not so within {timeout} s\n{self.logs()}")
            await asyncio.sleep(LOOK_EVERY)
            ended = time.monotonic()
            self.late.append((ended, ended - began - LOOK_EVERY))

    def _read_terminal(self) -> bytes:
        """Take what is there: a program that nobody reads from comes to a halt."""
        return b"" if self._terminal is None else self._terminal.read()

    # -- what a test looks at -------------------------------------------------------------------------

    def notes(self) -> list[dict[str, Any]]:
        """Return the jobs' own log."""
        return self._notes.entries()

    def events(self, kind: str) -> list[Event]:
        return [event for event in self.livekit.events if event.kind == kind]

    def receipt(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.receipt_file.read_text())
        return document

    def fates(self) -> dict[str, str]:
        return {job["id"]: job["fate"] for job in self.receipt()["jobs"]}

    def log(self, event: str) -> list[dict[str, Any]]:
        """Return the supervisor's own log lines of one event; a line that is still being written is none."""
        return [entry for entry in self._log.entries() if entry.get("event") == event]

    def said(self, message: str) -> list[dict[str, Any]]:
        """Return the log lines of workers and jobs with this message; one that is being written is none."""
        lines = [json.loads(line) for line in self.out.read_text().split("\n")[:-1] if line.startswith("{")]
        return [line for line in lines if line.get("message") == message]

    def logs(self) -> str:
        if self._terminal is not None:
            return f"--- terminal\n{self._read_terminal()[-12000:].decode(errors='replace')}"
        return f"--- out\n{self.out.read_text()[-4000:]}\n--- err\n{self.err.read_text()[-8000:]}"

    def workers(self) -> list[psutil.Process]:
        """Return the living worker processes, children of the supervisor."""
        children = psutil.Process(self.pid).children()
        # Left by a worker that was killed, and the image with a fork that is none yet.
        others = ("forkserver", "tracker", "lastcall-image")
        return [p for p in children if "lastcall.worker" in _command(p) and name_of(p) not in others]

    def family(self) -> list[psutil.Process]:
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]

    def left(self) -> list[psutil.Process]:
        """Return every living process of this run, wherever it went."""
        found = []
        mark = f"{TOKEN}={self.token}\0".encode()
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                # A process may have ended, or be another user's. A zombie has no environment.
                with contextlib.suppress(OSError, psutil.Error):
                    if mark in Path("/proc", name, "environ").read_bytes():
                        found.append(psutil.Process(int(name)))
        return found

    async def nothing_left(self, timeout: float = 0.5) -> None:
        """Assert that no process of the run lives; the kernel may take a moment to clear what was killed.

        Nor may a socket or a directory of the framework's be left, other than what livekit-agents makes for
        each job and a job that is killed leaves.
        """
        try:
            await self.until(lambda: not self.left(), timeout)
        except TimeoutError:
            raise AssertionError([(p.pid, _command(p)) for p in self.left()]) from None
        files = [
            p
            for p in self.tmp.rglob("*")
            if p.is_socket() or p.name.startswith(("pymp-", "lastcall-", "last-"))
        ]
        assert not files

    def accepted_late(self) -> list[Event]:
        """Return the offers that were answered with yes after the first FULL that followed the signal."""
        fulls = [e for e in self.events("full") if e.at >= self.signalled_at]
        if not fulls:
            return [e for e in self.events("accepted") if e.at > self.signalled_at + 0.1]
        by_worker = {full.worker_id: full.at for full in reversed(fulls)}
        return [
            e for e in self.events("accepted") if e.worker_id in by_worker and e.at > by_worker[e.worker_id]
        ]

    async def clean(self, *jobs: Dispatched) -> None:
        """Assert a stop without fault: every job ended by itself and was reported so, nothing is left."""
        assert self.process.returncode == 0, self.logs()
        receipt = self.receipt()
        assert (receipt["outcome"], receipt["exit_code"], receipt["left"]) == ("clean", 0, 0), receipt
        ended = {note["job"] for note in self.notes() if note["what"] == "ended"}
        assert ended >= {job.job_id for job in jobs}, self.logs()
        for job in jobs:
            record = self.livekit.jobs[job.job_id]
            assert (record.status, record.forgotten) == ("JS_SUCCESS", False), (record, self.logs())
        assert set(self.fates().values()) <= {"finished"}, receipt
        assert self.accepted_late() == []
        await self.nothing_left()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def name_of(process: psutil.Process) -> str:
    """Return the name of a process; empty for one that has ended."""
    try:
        return process.name()
    except psutil.Error:
        return ""


def lives(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
