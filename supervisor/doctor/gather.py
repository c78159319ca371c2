"""Gathers the facts. Every look is bounded in time; a fact that can't be seen is None."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lastcall.supervisor.config.env_file import environment_of
from lastcall.supervisor.config.loading import load
from lastcall.supervisor.config.options import Config
from lastcall.supervisor.config.paths import runtime_directory
from lastcall.supervisor.config.user_files import words_of
from lastcall.supervisor.doctor.checks import is_container
from lastcall.supervisor.doctor.facts import Answer, Facts, Name, ShutdownTarget, Unit
from lastcall.supervisor.doctor.trial import look
from lastcall.supervisor.errors import ConfigError, NotRunning, Refused, UsageError
from lastcall.supervisor.rehearsal.stage import Tell, tell_nobody
from lastcall.supervisor.views import control_socket
from lastcall.worker.base.plurals import counted

try:
    from lastcall.supervisor.doctor.probe import TIMEOUT as ANSWER_TIMEOUT
    from lastcall.supervisor.doctor.probe import ask
except ImportError:
    ANSWER_TIMEOUT = 0.0

    # Without livekit-agents there is no probe; the check of livekit-agents says what to install.
    def ask(environment: Mapping[str, str]) -> Answer | None:
        """Stand in for the probe."""
        return None


# Seconds. Ours: systemctl answers at once, unless the bus is stuck.
SYSTEMCTL_TIMEOUT = 5.0
# Seconds. Ours: the import of livekit-agents takes some, on a slow disk many.
NAMES_TIMEOUT = 60.0
# unix(7): sun_path holds 108 bytes, and ends with a zero.
SOCKET_PATH_BYTES = 107
CGROUPS = Path("/sys/fs/cgroup")
# cgroup v1 writes "no limit" as the largest page-aligned number:
# https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
NO_LIMIT = 1 << 60
# As `systemctl show` prints them; systemd.kill(5) and systemd.service(5) say what they mean.
UNIT_PROPERTIES = (
    *("LoadState", "KillMode", "KillSignal", "TimeoutStopUSec", "Type", "NotifyAccess"),
    "OOMPolicy",
)
# systemd.special(7): the targets that end the machine.
SHUTDOWN_TARGETS = tuple(f"{name}.target" for name in ("poweroff", "reboot", "halt", "kexec", "soft-reboot"))


def gather(
    flags: Mapping[str, Any], *, config_file: str | None, unit: str | None, tell: Tell = tell_nobody
) -> Facts:
    """Look at everything; `flags` are those of `run`, `tell` is called with each wait.

    Raises UsageError for a bad flag.
    """
    error, config = "", Config()
    try:
        config = load(flags, os.environ, file=config_file)
        environment = {**os.environ, **environment_of(config.env_file)}
    except ConfigError as wrong:
        error, environment = str(wrong), dict(os.environ)
    if unit is not None and not re.fullmatch(r"[\w:.\\@-]+", unit):
        raise UsageError(f"--unit: got {unit!r}, expected the name of a systemd unit")
    running = _status(config)
    found = _unit(unit or _own_unit(_read("/proc/self/cgroup")))
    return Facts(
        config_error=error,
        target=config.target,
        grace=config.grace,
        shares=config.shares,
        workers=config.workers,
        http=config.http,
        pid=os.getpid(),
        init=_init(),
        init_children=tuple(_children(1)),
        in_container=_in_container(environment),
        environment=environment,
        unit=found,
        shutdown_targets=_shutdown_targets() if found else (),
        livekit_agents=_version("livekit-agents"),
        names=_names(tell) if _version("livekit-agents") else None,
        has_inworld_plugin=_version("livekit-plugins-inworld") is not None,
        has_inworld_key=bool(environment.get("INWORLD_API_KEY")) or _is_readable(config.inworld.api_key_file),
        memory_limit=_limit("memory.max", "memory/memory.limit_in_bytes"),
        dies_as_group=_dies_as_group(),
        job_memory_mb=config.jobs.memory_mb,
        processes_limit=_limit("pids.max", "pids/pids.max"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        trial=look(config.target, config.args, tell=tell) if config.target else None,
        livekit=_livekit(environment, tell),
        hands_over=config.handover.enabled,
        http_problem=_http_problem(config.http),
        place_problems=_place_problems(config),
        process_failures=tuple(_process_failures(running)),
        image_limits=tuple(_image_limits(running)),
    )


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _init() -> tuple[str, ...]:
    words = tuple(word for word in _read("/proc/1/cmdline").split("\0") if word)
    return words or tuple(_read("/proc/1/comm").split())


def _children(parent: int) -> Iterator[tuple[str, ...]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _read(entry / "stat").rpartition(")")[2].split()[1:2] == [str(parent)]:
            yield tuple(word for word in _read(entry / "cmdline").split("\0") if word)


def _in_container(environment: Mapping[str, str]) -> bool:
    cgroups = _read("/proc/self/cgroup") + _read("/proc/1/cgroup")
    return any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))) or is_container(
        environment, _init(), _read("/proc/1/environ"), cgroups
    )


def _own_unit(cgroups: str) -> str:
    """Return the innermost service of /proc/self/cgroup; a user's own manager is none."""
    names = re.findall(r"([^/\n]+\.service)", cgroups)
    return next((name for name in reversed(names) if not name.startswith("user@")), "")


def _unit(name: str) -> Unit | None:
    if not name:
        return None
    (properties,) = _show(UNIT_PROPERTIES, name) or ({},)
    return Unit(name=name, properties=properties) if properties else None


def _shutdown_targets() -> tuple[ShutdownTarget, ...]:
    return tuple(
        ShutdownTarget(
            name=each["Id"], timeout=each.get("JobTimeoutUSec", ""), action=each.get("JobTimeoutAction", "")
        )
        for each in _show(("Id", "LoadState", "JobTimeoutUSec", "JobTimeoutAction"), *SHUTDOWN_TARGETS)
        if each.get("LoadState") == "loaded"
    )


def _show(properties: Sequence[str], *names: str) -> list[dict[str, str]]:
    """Return the properties of each unit, as systemctl has them; nothing where there is no systemd to ask."""
    try:
        done = subprocess.run(
            ["systemctl", "show", f"--property={','.join(properties)}", "--", *names],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SYSTEMCTL_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    blocks = done.stdout.strip().split("\n\n") if done.stdout.strip() else []
    pairs = ([line.partition("=") for line in block.splitlines()] for block in blocks)
    return [{key: value for key, _, value in each} for each in pairs]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _livekit(environment: Mapping[str, str], tell: Tell) -> Answer | None:
    tell("waits for an answer of the LiveKit server", time.monotonic() + ANSWER_TIMEOUT)
    return ask(environment)


def _names(tell: Tell) -> tuple[Name, ...] | None:
    """Return the private names, looked for in a process that imports livekit-agents as a worker does."""
    tell("waits for a process that imports livekit-agents", time.monotonic() + NAMES_TIMEOUT)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "lastcall.worker.sdk"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=NAMES_TIMEOUT,
            check=True,
        )
        # The last line: a package may print while it is imported.
        return tuple(Name(**each) for each in json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return None


def _is_readable(path: str) -> bool:
    return bool(path) and os.access(path, os.R_OK)


def _limit(*names: str) -> int | None:
    """Return the lowest limit from the cgroup of this process up to the root, in either hierarchy."""
    return min((limit for limit in _values(*names) if limit < NO_LIMIT), default=None)


def _dies_as_group() -> bool | None:
    """Return whether memory.oom.group is set from the cgroup of this process up to the root."""
    values = list(_values("memory.oom.group"))
    return any(values) if values else None


def _values(*names: str) -> Iterator[int]:
    """Yield the numbers in files of this cgroup and of those above it, in either hierarchy."""
    own = [line.rpartition(":")[2].lstrip("/") for line in _read("/proc/self/cgroup").splitlines()]
    for name in names:
        controller, _, file = name.rpartition("/")
        for path in {"", *own}:
            place = CGROUPS / controller / path
            while place.is_relative_to(CGROUPS):
                with contextlib.suppress(ValueError):
                    yield int(_read(place / file))
                place = place.parent


def _http_problem(address: str) -> str:
    if address == "off":
        return ""
    host, _, port = address.rpartition(":")
    try:
        infos = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        for family, kind, protocol, _, where in infos:
            with socket.socket(family, kind, protocol) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(where)
    except (OSError, ValueError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE and _is_lastcall(address):
            return ""  # doctor runs beside a supervisor that has the port already
        return f"http {address} can't be used: {words_of(error)}"
    return ""


def _is_lastcall(address: str) -> bool:
    host, _, port = address.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))
    connection = http.client.HTTPConnection(host, int(port), timeout=2.0)
    try:
        connection.request("GET", "/metrics")
        return b"lastcall_slots" in connection.getresponse().read(1 << 20)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _status(config: Config) -> dict[str, Any]:
    """Return the status of the supervisor that has the control socket; empty if none runs."""
    with contextlib.suppress(NotRunning, Refused, OSError, ValueError):
        return control_socket.ask(control_socket.find(config.control), "status")
    return {}


def _process_failures(status: Mapping[str, Any]) -> Iterator[str]:
    for slot in status.get("slots", ()):
        if slot.get("process_failures"):  # an older supervisor does not say
            failed = counted(slot["process_failures"], "job process")
            yield f"{failed} of slot {slot['slot']} did not get ready, the last: {slot['process_failure']}"


def _image_limits(status: Mapping[str, Any]) -> Iterator[str]:
    image = status.get("image") or {}
    if image.get("reason"):
        yield f"workers start without it: {image['reason']}"
    for package, why in image.get("left_out", {}).items():
        yield f"it leaves {package} out: {why}"


def _place_problems(config: Config) -> tuple[str, ...]:
    try:
        return tuple(_unusable_places(config))
    except (OSError, ValueError) as error:  # a directory that may not be searched, a name that is too long
        return (f"control {config.control!r}, receipt {config.receipt!r}: {words_of(error)}",)


def _unusable_places(config: Config) -> list[str]:
    problems = []
    if config.control not in ("", "auto"):
        if os.path.exists(config.control) and not Path(config.control).is_socket():
            problems.append(f"control: {config.control} exists and is no socket")
        elif len(os.fsencode(config.control)) > SOCKET_PATH_BYTES:
            problems.append(f"control: {config.control} has more than {SOCKET_PATH_BYTES} bytes")
    if config.control == "auto":
        directory = runtime_directory()
        if directory.is_dir():
            info = directory.stat()
            if info.st_uid != os.getuid() or info.st_mode & 0o077:
                problems.append(f"control: {directory} is no directory of your own with mode 0700")
        elif not os.access(next(each for each in directory.parents if each.exists()), os.W_OK):
            problems.append(f"control: {directory} can't be made")
    for option, path in (("control", config.control), ("receipt", config.receipt)):
        if path not in ("", "auto") and not os.access(Path(path).absolute().parent, os.W_OK):
            problems.append(f"{option}: {Path(path).absolute().parent} can't be written")
    return problems
