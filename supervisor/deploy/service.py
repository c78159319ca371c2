"""The service that every artefact describes: one value, and the timers that all of them are derived from.

    signal                                                  end of grace     the platform's SIGKILL
    |-- preStop -->|-- grace (fence, drain, …, sweep) ------------>|-- margin -->|
                   SIGTERM reaches the supervisor

Only Kubernetes has a preStop, and counts it. Nothing here reads the machine; the verb does.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from dataclasses import dataclass, field

from lastcall.supervisor.config import calls
from lastcall.supervisor.config.options import Start, Stop
from lastcall.supervisor.errors import UsageError
from lastcall.worker.base import target_form
from lastcall.worker.base.budget import DEFAULT_GRACE, Shares

# Seconds from the end of grace to the platform's SIGKILL. Ours: for a supervisor that gets little processor.
KILL_MARGIN = 30

# Seconds. JobTimeoutSec of poweroff.target and reboot.target in systemd 252 and 257.
SHUTDOWN_LIMIT = 1800
# Seconds of a shutdown for the units that stop after lastcall. Ours: DefaultTimeoutStopSec is 90 s, and the
# network may be three units one behind the other.
REST_OF_SHUTDOWN = 300

# RFC 1123 labels, as Kubernetes wants names. 53 characters: a ReplicaSet's and a pod's suffix fit into 63.
NAME_PATTERN = re.compile(r"[a-z0-9]([-a-z0-9]{0,51}[a-z0-9])?")
IMAGE_PATTERN = re.compile(r"[A-Za-z0-9][\w.\-/:@]*")
# systemd.exec(5), PrivateTmp and ProtectHome.
HIDDEN_BY_PRIVATE_TMP = ("/tmp", "/var/tmp")
HIDDEN_BY_PROTECT_HOME = ("/home", "/root", "/run/user")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timers:
    """Seconds. Every kill timer that lastcall prints is one of these properties."""

    grace: float = DEFAULT_GRACE
    pre_stop: int = 0
    margin: int = KILL_MARGIN
    shares: Shares = field(default_factory=lambda: Stop().shares)

    @property
    def kill_after(self) -> int:
        """From SIGTERM to the platform's SIGKILL."""
        return math.ceil(self.grace) + self.margin

    @property
    def pod_kill_after(self) -> int:
        """The same on Kubernetes, whose clock starts before preStop."""
        return self.pre_stop + self.kill_after

    @property
    def calls(self) -> str:
        """A line that says how long calls have."""
        return calls.given(self.grace, self.shares)

    @property
    def shutdown_after(self) -> int:
        """From the command to the end of a machine's shutdown by force; never less than without lastcall."""
        return max(SHUTDOWN_LIMIT, self.kill_after + REST_OF_SHUTDOWN)

    @property
    def warning(self) -> str:
        """A line when grace is too short for jobs that are cut to end well; else empty."""
        return calls.warning(self.grace, self.shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A target and where it runs. Raises UsageError for a value that no platform would take."""

    target: str
    arguments: tuple[str, ...] = ()
    name: str = "lastcall"
    image: str = ""
    program: str = "/usr/local/bin/lastcall"
    directory: str = "/"
    workers: int = 1
    timers: Timers = field(default_factory=Timers)
    start: Start = field(default_factory=Start)
    # The configuration file of the directory in which the artefact is printed, and the options that the file
    # sets. They are left to the file: an artefact that repeats them would hide every later change of it.
    config_file: str = ""
    # The value of LASTCALL_CONFIG in an image that holds the file under a name which is not looked for.
    config_variable: str = ""
    in_file: frozenset[str] = frozenset()
    control: str = ""
    # The command that prints the artefact; its first line, so that a file says where it came from.
    printed_by: str = ""

    def __post_init__(self) -> None:
        try:
            target_form.parse(self.target)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if any(set(word) & set("\n\r\0") for word in self.arguments):
            raise UsageError(f"--args: got {list(self.arguments)!r}, expected words without line breaks")
        if not NAME_PATTERN.fullmatch(self.name):
            raise UsageError(
                f"--name: got {self.name!r}, expected a-z, 0-9 and -, at most 53, as Kubernetes wants names"
            )
        if self.image and not IMAGE_PATTERN.fullmatch(self.image):
            raise UsageError(f"--image: got {self.image!r}, expected an image reference, as in agent:1.4")
        # The path stands in comments, which a line break in it would end.
        if not self.config_file.isprintable():
            raise UsageError(
                f"configuration file: got {self.config_file!r}, expected a printable path; rename it"
            )
        if self.workers < 1:
            raise UsageError(f"--workers: got {self.workers}, expected 1 or more")
        if not 0 < self.timers.grace <= 10_000_000:
            raise UsageError(f"--grace: got {self.timers.grace:g}, expected more than 0 and at most 10000000")

    @property
    def image_or_default(self) -> str:
        return self.image or f"{self.name}:latest"

    @property
    def form(self) -> target_form.TargetForm:
        """The parts of the target; whether there is such a file or module is asked where it runs."""
        return target_form.parse(self.target)

    @property
    def quoted_words(self) -> str:
        """The target and the arguments of the program as items of a JSON list."""
        return ", ".join(map(quoted, target_form.words(self.target, self.arguments)))

    @property
    def target_file(self) -> str:
        """The absolute path of the target's file, or nothing for a module."""
        file = self.form.file
        return posixpath.normpath(posixpath.join(self.directory, file)) if file else ""

    @property
    def start_timeout(self) -> int:
        """Seconds until every worker has registered, or has been given up."""
        return math.ceil(self.start.timeout + self.start.stagger * (self.workers - 1)) + KILL_MARGIN

    @property
    def header(self) -> str:
        """The first comment lines of every artefact."""
        lines = [f"# {self.printed_by}"] if self.printed_by else []
        if self.config_file:
            lines.append(f"# Print it again when {self.config_file} changes: the timers are made from it.")
        if self.timers.warning:
            lines.append(f"# Note: {self.timers.warning}.")
        lines.append(f"# A grace of {seconds(self.timers.grace)} s: {self.timers.calls}.")
        return "".join(line + "\n" for line in lines)


def quoted(text: str) -> str:
    """Write text as a string of JSON that YAML reads in the same way.

    YAML does not join the two escapes of a character beyond U+FFFF; such a character stands as it is.
    """
    return json.dumps(text, ensure_ascii=not text.isprintable())


def is_below(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)


def seconds(value: float) -> str:
    """Write a number of seconds as an option takes it, never as 3.6e+03."""
    return str(int(value)) if value == int(value) else str(value)
