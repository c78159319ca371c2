"""A booted systemd in a namespace container, with this checkout installed, for one test module.

Everything is made inside a new mount namespace, so that no mount outlives the container. The container has
the network of the host, so that it reaches the test's LiveKit server on 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tests.support.left_out import CACHE

ROOT = Path(__file__).parent.parent.parent
LASTCALL = "/opt/lastcall/bin/lastcall"
BOOT = 60.0  # seconds; a few are usual, and other tests run beside it
NUMBERS = itertools.count()
NAMESPACES = ("-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w")

# $1 lower root, $2 checkout, $3 name, $4 cgroup, $5 an empty directory
SCRIPT = """
set -eu
mount -t tmpfs -o size=2g,mode=755 tmpfs "$5"
mkdir "$5/up" "$5/work" "$5/m"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$5/up,workdir=$5/work" "$5/m"
m="$5/m"
for site in "$m"/opt/lastcall/lib/python3*/site-packages; do
    rm -rf "$site/lastcall"
    # With the times of the files: byte code that is there for this Python need not be made again. A file that
    # Python has not finished writing has a number at its end.
    tar -C "$2" -chf - --owner=0 --group=0 --exclude='*.pyc.*' lastcall | tar -C "$site" -xf -
    chroot "$m" /opt/lastcall/bin/python -m compileall -q "${site#"$m"}/lastcall"
done
mkdir -p "$m/srv"
cp -r "$2/tests/agents" "$2/tests/support/authority.pem" "$m/srv"
rm -f "$m"/etc/systemd/system/*.wants/*
: >"$m/etc/machine-id"
cat >"$m/etc/systemd/system/t.target" <<END
[Unit]
Requires=basic.target dbus.socket
After=basic.target dbus.socket
AllowIsolate=yes
END
# The container is given copies of the host's device nodes; one that is broken there must not be in the way.
[ -c /dev/full ] || mount --bind "$1/dev/full" /dev/full
echo $$ >"$4/cgroup.procs"
exec env SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn --register=no --keep-unit --quiet \\
    --link-journal=no --resolv-conf=off --timezone=off -D "$m" -M "$3" --console=pipe --boot -- \\
    systemd.unit=t.target systemd.firstboot=off
"""


class Machine:
    """One booted system of a suite; use as a context manager."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.name = f"lc-{suite}-{os.getpid()}-{next(NUMBERS)}"
        unified = Path("/sys/fs/cgroup/unified")
        self.cgroup = (unified if unified.is_dir() else Path("/sys/fs/cgroup")) / self.name
        self.init = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = tempfile.mkdtemp(prefix="machine-")
        self._console: IO[bytes] = open(os.path.join(self._directory, "console"), "wb")  # noqa: SIM115

    def __enter__(self) -> Machine:
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _boot(self) -> None:
        inner = os.path.join(self._directory, "d")
        os.mkdir(inner)
        self.cgroup.mkdir()
        arguments = (CACHE / self.suite, ROOT, self.name, self.cgroup, inner)
        self._process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", SCRIPT, "sh", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=self._console,
            start_new_session=True,
        )
        pid = self._process.pid
        deadline = time.monotonic() + BOOT
        while time.monotonic() < deadline and self._process.poll() is None:
            # The script's own commands are children too: the container's is the one that is called systemd.
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                        self.init = int(child)
            if self.init and self.run("systemctl", "is-system-running", check=False).stdout.strip() in (
                "running",
                "degraded",
            ):
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.suite} did not boot:\n{self.console()}")

    def close(self) -> None:
        """Power off, or kill; then nothing of it is left, mounts included."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                if self.init:
                    os.kill(self.init, signal.SIGRTMIN + 3)  # systemd's "halt now"
                    process.wait(15)
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    if self.init:
                        os.kill(self.init, signal.SIGKILL)
                process.kill()
                process.wait(10)
            self._process = None
        self._console.close()
        for directory, _, _ in os.walk(self.cgroup, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)

    def console(self) -> str:
        return Path(self._directory, "console").read_text(errors="replace")[-4000:]

    def wait(self, timeout: float) -> None:
        """Wait for the end of a machine that was told to power off."""
        assert self._process is not None
        self._process.wait(timeout)

    # -- inside ---------------------------------------------------------------------------------------

    def run(
        self, *command: str, check: bool = True, stdin: str | None = None, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine."""
        namespaces = ["nsenter", "-t", str(self.init), *NAMESPACES]
        done = subprocess.run(
            [*namespaces, "--", "env", "-i", "PATH=/usr/sbin:/usr/bin", *command],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def write(self, path: str, text: str, mode: str = "644") -> None:
        self.run("mkdir", "-p", os.path.dirname(path))
        self.run("sh", "-c", f"cat >'{path}' && chmod {mode} '{path}'", stdin=text)

    def read(self, path: str) -> str:
        done = self.run("cat", path, check=False)
        return done.stdout if done.returncode == 0 else ""


class Unit:
    """A service of the machine, made from what `lastcall unit systemd` prints there."""

    def __init__(self, machine: Machine, name: str, target: str, *options: str, **settings: str) -> None:
        self.machine = machine
        self.name = name
        printed = machine.run(
            *(LASTCALL, "unit", "systemd", target, "--name", name, "--exec", LASTCALL, *options)
        )
        machine.write(f"/etc/systemd/system/{name}.service", printed.stdout)
        if settings:
            lines = "".join(f"{key}={value}\n" for key, value in settings.items())
            self.drop_in("test.conf", f"[Service]\n{lines}")

    @classmethod
    def installed(cls, machine: Machine, name: str) -> Unit:
        """Return a service that the machine has already."""
        unit = cls.__new__(cls)
        unit.machine, unit.name = machine, name
        return unit

    def drop_in(self, file: str, text: str) -> None:
        self.machine.write(f"/etc/systemd/system/{self.name}.service.d/{file}", text)

    def environment(self, values: dict[str, str]) -> None:
        lines = "".join(f'{key}="{value}"\n' for key, value in values.items())
        self.machine.write(f"/etc/lastcall/{self.name}.env", lines, "600")
        self.machine.run("systemctl", "daemon-reload")

    def systemctl(self, verb: str, *options: str, check: bool = True, timeout: float = 90.0) -> Any:
        return self.machine.run(
            "systemctl", verb, *options, f"{self.name}.service", check=check, timeout=timeout
        )

    def show(self, name: str) -> str:
        done = self.systemctl("show", "--value", "-p", name)
        return str(done.stdout.strip())

    def pids(self) -> set[int]:
        """Return the pids in the unit's cgroup, as the machine counts them."""
        text = self.machine.read(f"/sys/fs/cgroup{self.show('ControlGroup')}/cgroup.procs")
        return {int(word) for word in text.split()}

    def receipt(self) -> str:
        return self.machine.read(f"/var/lib/{self.name}/receipt.json")

    def journal(self) -> str:
        done = self.machine.run("journalctl", "-u", self.name, "-o", "cat", "-n", "60", check=False)
        return f"{done.stdout}{self.systemctl('status', check=False).stdout}"

    async def until(self, condition: Callable[[], object], timeout: float = 30.0) -> None:
        """Look again and again until the condition holds, while the test's own loop goes on."""
        deadline = time.monotonic() + timeout
        while not await asyncio.to_thread(condition):
            if time.monotonic() > deadline:
                raise AssertionError(f"not so within {timeout} s\n{self.journal()}")
            await asyncio.sleep(0.05)
