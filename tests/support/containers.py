"""podman and runc with a storage for the tests alone, and an image built from the shipped Dockerfile.

`python -m tests.support.containers` builds the image. scripts/fixtures does that before the tests: the build
installs every dependency, which takes a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.left_out import CACHE

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "scripts" / "deploy"
AGENT = ROOT / "tests" / "agents" / "calls.py"
FILES = ("pyproject.toml", "README.md", "LICENSE")
STORE = CACHE / "containers"
# crun refuses hybrid cgroups, and the default limits need a capability that a sandbox may not have.
CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
log_driver = "k8s-file"
pids_limit = 0
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
# Satisfies FROM python:3.13-slim without a registry.
PYTHON = """
FROM localhost/base:t
RUN rm -f /usr/lib/python3*/EXTERNALLY-MANAGED && python3 -m venv /usr/local \\
    && ln -sf python3 /usr/local/bin/python
"""


def _digest() -> str:
    """Return the name of everything that gets into the image."""
    sources = [ROOT / name for name in ("lastcall", "supervisor", "worker", "scripts")]
    files = [path for source in sources for path in source.rglob("*") if path.is_file()]
    found = hashlib.sha256()
    for path in sorted([*files, *(ROOT / name for name in FILES), AGENT, CACHE / "trixie" / ".stamp"]):
        if "__pycache__" not in path.parts:
            found.update(os.path.relpath(path, ROOT).encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Podman:
    """One podman, its working directory, and the containers that a test has started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        conf = directory / "containers.conf"
        conf.write_text(CONF)
        self._environment = {**os.environ, "CONTAINERS_CONF": str(conf)}
        self._started: list[str] = []
        self.image = ""

    def run(self, *arguments: str, check: bool = True, timeout: float = 120.0) -> Any:
        """Run podman; in a scratch directory, because an out-of-memory kill leaves a file there."""
        command = ["podman", "--root", str(STORE / "root"), "--runroot", str(STORE / "run")]
        command += ["--tmpdir", str(STORE / "tmp"), *arguments]
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def build(self) -> None:
        """Build the shipped Dockerfile for the tests' agent, unless there is an image of the same files."""
        digest = _digest()
        self.image = f"localhost/lastcall-test:{digest}"
        STORE.mkdir(exist_ok=True)
        # An image of yesterday has the dependencies of yesterday.
        self.run("image", "prune", "-a", "-f", "--filter", "until=24h")
        if not self.run("image", "exists", self.image, check=False).returncode:
            return
        if self.run("image", "exists", "localhost/python:3.13-slim", check=False).returncode:
            self._import_python()
        context = self.directory / "context"
        context.mkdir()
        shutil.copy(DEPLOY / "Dockerfile", context)
        shutil.copy(DEPLOY / ".dockerignore", context)
        shutil.copy(AGENT, context / "agent.py")
        (context / ".env").write_text("SECRET=1\n")
        source = self.directory / "source"
        for name in ("lastcall", "scripts"):  # links are followed: the copy has files in their place
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        for name in FILES:
            shutil.copy(ROOT / name, source)
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"),
                *("-w", str(context), str(source)),
            ],
            check=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        (wheel,) = context.glob("*.whl")
        # The digest makes a layer that was built with another wheel another layer.
        (context / "requirements.txt").write_text(f"# {digest}\n./{wheel.name}\n")
        # The machine's own certificates and pip settings, for as long as the build takes.
        own = [
            path for path in ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf") if Path(path).exists()
        ]
        volumes = [word for path in own for word in ("-v", f"{path}:{path}:ro")]
        self.run(
            *("build", "-q", "--layers", "--pull=never", "--format", "docker", "--network", "host"),
            *(*volumes, "-t", self.image, str(context)),
            timeout=400,
        )

    def _import_python(self) -> None:
        archive = self.directory / "base.tar"
        system = CACHE / "trixie"
        left_out = ["--exclude=./var/cache/apt", "--exclude=./opt/lastcall"]
        subprocess.run(
            ["tar", "-C", str(system), *left_out, "-cf", str(archive), "."], check=True, timeout=120
        )
        self.run("import", "-q", "-c", 'CMD ["python3"]', str(archive), "localhost/base:t")
        archive.unlink()
        file = self.directory / "Containerfile"
        file.write_text(PYTHON)
        empty = self.directory / "empty"
        empty.mkdir()
        self.run(
            *("build", "-q", "--pull=never", "--network", "host"),
            *("-t", "localhost/python:3.13-slim", "-f", str(file), str(empty)),
        )

    def start(self, name: str, *arguments: str, options: tuple[str, ...] = ()) -> Container:
        """Start a container as an operator should: non-root by the image, read-only, without capabilities."""
        name = f"{name}-{os.getpid()}"
        self._started.append(name)
        tight = ("--read-only", "--tmpfs", "/tmp", "--cap-drop=all", "--security-opt=no-new-privileges")
        common = ("--network", "host", "-e", "LASTCALL_HTTP=off", "--name", name)
        self.run("run", "-d", *tight, *common, *options, self.image, *arguments)
        return Container(self, name)

    def close(self) -> None:
        """Remove every container that was started."""
        for name in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.run("rm", "-f", "-t", "0", name, check=False)
        self._started.clear()


class Container:
    """One container."""

    def __init__(self, podman: Podman, name: str) -> None:
        self.podman = podman
        self.name = name

    def run(self, verb: str, *arguments: str, check: bool = True, timeout: float = 60.0) -> Any:
        return self.podman.run(verb, *arguments, self.name, check=check, timeout=timeout)

    def exec(self, *command: str) -> str:
        return str(self.podman.run("exec", self.name, *command).stdout)

    def state(self, field: str) -> str:
        return str(self.run("inspect", "--format", "{{.State." + field + "}}").stdout.strip())

    def logs(self) -> str:
        done = self.run("logs", check=False)
        return f"{done.stdout}{done.stderr}"

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the supervisor's log lines of one event."""
        lines = [json.loads(line) for line in self.logs().split("\n")[:-1] if line.startswith("{")]
        return [line for line in lines if line.get("event") == event]

    def receipt(self) -> dict[str, Any]:
        (line,) = self.events("receipt")
        document: dict[str, Any] = line["receipt"]
        return document

    def health(self) -> int:
        """Run the image's health check once; 0 is healthy."""
        return int(self.podman.run("healthcheck", "run", self.name, check=False).returncode)

    async def until(self, condition: Callable[[], object], timeout: float = 60.0) -> None:
        """Look again and again until the condition holds, while the test's own loop goes on."""
        deadline = time.monotonic() + timeout
        while not await asyncio.to_thread(condition):
            if time.monotonic() > deadline:
                raise AssertionError(f"not so within {timeout} s\n{self.logs()}")
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        Podman(Path(made)).build()
