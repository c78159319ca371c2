"""lastcall as users have it: an installed distribution, outside the checkout, beside others' modules."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support import installation
from tests.support.harness import AGENT, TOKEN, Run, StartRun
from tests.support.installation import ROOT, Installation, build, hatchling, wheel_of


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this checkout."""
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Install the wheel where its dependencies are."""
    return Installation(tmp_path_factory.mktemp("installed"), wheel)


def contents(wheel: Path) -> dict[str, str]:
    """Return the digest of each file in a wheel but for the metadata, by its name."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


# -- what is built -----------------------------------------------------------------------------------------


def test_the_wheel_holds_each_module_once(wheel: Path) -> None:
    """The wheel has the modules and templates of the package, `py.typed` and one script, and nothing else."""
    package = ROOT / "lastcall"
    sources = [
        *package.glob("*.py"),
        *(package / "supervisor").rglob("*.py"),
        *(package / "worker").rglob("*.py"),
    ]
    files = contents(wheel)
    version = importlib.metadata.version("lastcall")
    script = f"lastcall-{version}.data/scripts/lastcall-entrypoint"
    templates = (package / "supervisor" / "deploy" / "templates").rglob("*")
    sources += [path for path in templates if path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in sources}
    assert set(files) == expected | {"lastcall/py.typed", script}
    digests = [digest for name, digest in files.items() if name.endswith(".py")]
    assert len(digests) == len(set(digests)), "two modules with the same text"
    with zipfile.ZipFile(wheel) as archive:
        licence = archive.read(f"lastcall-{version}.dist-info/licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("kind", ["wheel", "wheel:editable"])
def test_one_import_name(tmp_path: Path, kind: str) -> None:
    """Installed from a wheel or editable, `lastcall` can be imported, and no other folder of the checkout."""
    made = build(ROOT, kind, tmp_path / "made")
    bare = Installation(tmp_path / "bare", made, dependencies=False)
    names = ("lastcall", "worker", "supervisor", "tests", "scripts", "docs")
    code = f"import importlib.util; print(*(n for n in {names} if importlib.util.find_spec(n)))"
    assert bare.execute(code, cwd=tmp_path) == "lastcall"
    where = bare.execute("import lastcall.worker; print(lastcall.worker.__file__)", cwd=tmp_path)
    home = ROOT if kind == "wheel:editable" else bare.site
    assert Path(where).samefile(home / "lastcall" / "worker" / "__init__.py")


def test_the_sdist_is_enough(wheel: Path, tmp_path: Path) -> None:
    """A wheel from the sdist is the wheel of the checkout, and the sdist has its tests and their data."""
    with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as archive:
        # An argument since 3.11.4; Debian 12 has 3.11.2, and Python from 3.12 to 3.13 warns without a filter.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.glob("lastcall-*")
    assert contents(build(unpacked, "wheel", tmp_path / "wheel")) == contents(wheel)
    for folder in ("tests", "scripts", "docs", "examples", "changes"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        missing = [path for path in files if not (unpacked / path.relative_to(ROOT)).is_file()]
        assert not missing
    assert (unpacked / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    # Python has the working directory first on its path, so these tests read and import the unpacked package.
    tests = ["tests/test_layers.py::test_every_module_has_a_floor", "tests/test_states.py"]
    dependencies = Installation(tmp_path / "environment")
    done = installation.run(
        dependencies.python, "-m", "pytest", "-p", "no:cacheprovider", *tests, cwd=unpacked
    )
    assert done.returncode == 0, done.stdout


def test_a_tree_without_links_is_not_built(tmp_path: Path) -> None:
    """A zip loses links and leaves files in their place: the build says so in one line, and what to do."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "lastcall", tree / "lastcall", symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "scripts/build_hook.py", "scripts/entrypoint"):
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    link = tree / "lastcall" / "worker"
    if link.is_symlink():
        link.unlink()
    else:  # in an unpacked sdist
        shutil.rmtree(link)
    (tree / "supervisor").mkdir()
    link.write_text("../worker")
    done = hatchling(tree, "build", "-t", "wheel", "-d", str(tmp_path / "made"))
    assert done.returncode != 0
    (line,) = (done.stdout + done.stderr).splitlines()
    assert "lastcall/worker is no directory" in line and "ln -sfn ../worker lastcall/worker" in line


# -- what is installed -------------------------------------------------------------------------------------


def test_the_commands(installed: Installation, tmp_path: Path) -> None:
    """`lastcall` and `python -m lastcall` are one command, and the entry point of images starts it."""
    expected = ", ".join(
        (
            f"lastcall {importlib.metadata.version('lastcall')}",
            f"livekit-agents {importlib.metadata.version('livekit-agents')}",
            f"python {platform.python_version()}",
        )
    )
    for command in ([str(installed.bin / "lastcall")], [str(installed.python), "-m", "lastcall"]):
        done = installation.run(*command, "--version", cwd=tmp_path)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, expected, "")
    path = {**os.environ, "PATH": f"{installed.bin}:{os.environ['PATH']}"}
    entry = [str(installed.bin / "lastcall-entrypoint"), "run", "--help"]
    done = subprocess.run(
        entry, env=path, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "") and "Usage: lastcall run" in done.stdout


def test_an_import_loads_nothing(installed: Installation, tmp_path: Path) -> None:
    """The package and its two halves load no module but themselves: they run before signals are blocked."""
    code = (
        "import sys; before = set(sys.modules); import lastcall, lastcall.supervisor, lastcall.worker;"
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = installed.execute(code, cwd=tmp_path).split()
    assert loaded == ["__future__", "lastcall", "lastcall.supervisor", "lastcall.worker"]


def test_the_public_names(installed: Installation, tmp_path: Path) -> None:
    """Each public name is listed, described by help() and importable; a wrong one is an AttributeError."""
    code = """
import lastcall
print(*lastcall.__all__, set(lastcall.__all__) <= set(dir(lastcall)))
from lastcall import __version__, closing, inworld
print(__version__, closing, inworld.TTS)
from lastcall import Call, Notice, call
print(Call, Notice, call)
try: lastcall.closer
except AttributeError as error: print(error)
help(lastcall)
"""
    said = installed.execute(code, cwd=tmp_path)
    names, functions, classes, wrong, described = said.split("\n", 4)
    assert names == (
        "Call Notice Resumed Resumption Withdrawn __version__ call closing inworld is_resumed resume_session"
        " True"
    )
    version = importlib.metadata.version("lastcall")
    assert functions.startswith(f"{version} <function closing") and functions.endswith(".tts.TTS'>")
    assert classes.startswith("<class 'lastcall.worker.job.call.Call'>")
    assert wrong == "module 'lastcall' has no attribute 'closer'"
    for each in (
        "call(ctx)",
        "await call.stopping",
        "closing(ctx",
        "aclose()",
        "4 seconds",
        "Raises RuntimeError",
        "inworld.TTS(",
        "Since 0.2.0",
    ):
        assert each in described


# -- beside other people's modules -------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["lastcall", "supervisor"])
async def test_supervisord_in_the_same_environment(
    run: StartRun, wheel: Path, tmp_path: Path, first: str
) -> None:
    """supervisord and lastcall work in one environment, in whatever order they were installed."""
    wheels = [wheel, wheel_of("supervisor", tmp_path)]
    both = Installation(tmp_path / "both", *(wheels if first == "lastcall" else reversed(wheels)))
    done = installation.run(both.bin / "supervisord", "-v", cwd=tmp_path)
    assert done.stdout.strip() == importlib.metadata.version("supervisor"), done.stderr
    where = both.execute("import supervisor; print(supervisor.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(both.site)
    r = await start(run, both, tmp_path, "--", "sleep", "600", livekit=False)
    await r.until(lambda: r.log("slot ready"))
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


async def start(
    run: StartRun, installed: Installation, directory: Path, *arguments: str, livekit: bool = True
) -> Run:
    """Start the installed `lastcall run` in a directory, which has to be outside the checkout."""
    environment = {
        "LASTCALL_HTTP": "off",
        "LASTCALL_CONTROL": str(directory / "c.sock"),
        "LASTCALL_RECEIPT": str(directory / "receipt.json"),
        "LASTCALL_GRACE": "30",
    }
    command = [str(installed.bin / "lastcall"), "run", *arguments]
    return await run(command=command, cwd=directory, livekit=livekit, environment=environment)


# The modules that the agent has beside it. The job notes where each of them, and lastcall, came from.
SESSION = """
import json
import os

import lastcall
import lastcall_config
import supervisor
import worker
from livekit.agents import JobContext, WorkerOptions


def note(ctx, **more):
    with open(os.environ["JOB_LOG"], "a") as log:
        log.write(json.dumps({"job": ctx.job.id, **more}) + "\\n")


class Database:
    def __init__(self, ctx):
        self.ctx = ctx

    async def aclose(self):
        note(self.ctx, what="closed")


async def entrypoint(ctx: JobContext):
    lastcall.closing(ctx, Database(ctx))
    modules = (lastcall, lastcall_config, supervisor, worker)
    note(ctx, what="modules", files={module.__name__: module.__file__ for module in modules})
    ctx.shutdown()


def half_busy():
    return 0.5


def make():
    return WorkerOptions(
        entrypoint_fnc=entrypoint, load_fnc=half_busy, load_threshold=float("inf"), num_idle_processes=1
    )
"""
MAIN = """
from {module} import make
from livekit.agents import cli

if __name__ == "__main__":
    cli.run_app(make())
"""
BESIDE = {"supervisor.py": "from lastcall_config import NAME\n", "lastcall_config.py": "NAME = 'ann'\n"}
AGENTS = {
    "a module": {"main.py": MAIN.format(module="worker"), "worker.py": SESSION},
    "a module, by another one": {
        "main.py": MAIN.format(module="core"),
        "core.py": "from worker import make\n",
        "worker.py": SESSION,
    },
    "a package, by another module": {
        "main.py": "import worker.session\n" + MAIN.format(module="core"),
        "core.py": "from worker.session import make\n",
        "worker/__init__.py": "",
        "worker/session.py": SESSION,
        # No package, so Python prefers the installed one.
        "lastcall/data.txt": "",
    },
}


def write(directory: Path, files: dict[str, str]) -> None:
    """Write files, and the folders that they are in."""
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True, parents=True)
        (directory / name).write_text(text)


@pytest.mark.parametrize("agent", AGENTS)
async def test_an_agent_with_modules_of_any_name(
    run: StartRun, installed: Installation, tmp_path: Path, agent: str
) -> None:
    """An agent imports its modules `worker` and `supervisor`, in its worker and in its job processes."""
    write(tmp_path, AGENTS[agent] | BESIDE)
    r = await start(run, installed, tmp_path, "main.py")
    await r.ready()
    job = await r.dispatch()
    files = (await r.job_says(job.job_id, "modules"))["files"]
    await r.job_says(job.job_id, "closed")
    assert Path(files.pop("lastcall")).is_relative_to(installed.site)
    assert set(files) == {"lastcall_config", "supervisor", "worker"}
    assert all(Path(file).is_relative_to(tmp_path) for file in files.values()), files
    r.kill()
    assert await r.exit() == 0
    assert json.loads((tmp_path / "receipt.json").read_text())["outcome"] == "clean"
    await r.nothing_left()


OWN_LASTCALL = {
    "a module": ({"lastcall.py": ""}, "lastcall.py"),
    "a package": ({"lastcall/__init__.py": ""}, "lastcall"),
    "a folder": ({"lastcall/data.txt": ""}, ""),
    "a checkout of lastcall": ({"lastcall/__init__.py": "", "lastcall/worker/target.py": ""}, ""),
}


@pytest.mark.parametrize("target", ["app.py", "app:server"])
@pytest.mark.parametrize("case", OWN_LASTCALL)
def test_which_own_lastcall_is_refused(
    installed: Installation, tmp_path: Path, case: str, target: str
) -> None:
    """A module or package `lastcall` of the agent is refused; a mere folder and a checkout are not."""
    files, refused = OWN_LASTCALL[case]
    write(tmp_path, {**files, "app.py": "server = 3\n"})
    code = (
        "import sys; sys.path.pop(0)\n"  # as under -P
        "from lastcall.worker import target\n"
        "from lastcall.worker.base.errors import TargetError\n"
        f"parsed = target.parse({target!r})\n"
        "hooks = dict.fromkeys(('record', 'classify', 'refuse_to_run'), lambda _: None)\n"
        "try: target.load(parsed, **hooks)\n"
        "except TargetError as error: print(error)"
    )
    said = installed.execute(code, cwd=tmp_path)
    assert ("own package" in said) == bool(refused)
    if refused:
        assert said.count("\n") == 0 and said.endswith(f"rename {refused!r}")


async def test_own_lastcall_ends_the_run(run: StartRun, installed: Installation, tmp_path: Path) -> None:
    """An agent with a module `lastcall` beside it ends the run: exit code 78, one line, no second try."""
    write(tmp_path, {"lastcall/__init__.py": "", "main.py": Path(AGENT).read_text()})
    r = await start(run, installed, tmp_path, "main.py", livekit=False)
    assert await r.exit() == 78
    (line,) = [line for line in r.err.read_text().splitlines() if not line.startswith("{")]
    assert line.startswith("lastcall: ") and "rename 'lastcall'" in line
    assert len(r.log("slot starting")) == 1
    await r.nothing_left()


# -- a stop while Python begins ----------------------------------------------------------------------------

MOMENTS = 50
# Milliseconds of the start that the moments are spread over, at least. On a machine that takes longer to the
# first statement they are spread over twice that time, so that they lie on both sides of the statement.
SPAN_MS = 100
# Processes that start at a time: as many as the smallest machine has cores.
AT_A_TIME = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting:
    """A process of lastcall, and how often a test awaits its end: each n-th time.

    The other times the test looks whether the kernel holds the signal back for the process. From there on the
    stop does not depend on the moment, and a worker imports livekit-agents before it ends, for seconds.
    """

    arguments: tuple[str, ...]
    ends_each: int


STARTING = {
    "lastcall run": Starting(arguments=("lastcall", "run", "--", "sleep", "600"), ends_each=5),
    "worker": Starting(arguments=("lastcall.worker", AGENT), ends_each=25),
    "Inworld broker": Starting(arguments=("lastcall.worker.inworld",), ends_each=10),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """The effect of a SIGTERM.

    `was_safe`: the process blocked or caught the signal when it was sent. `code`: the exit code, or None
    where the kernel holds the signal back.
    """

    was_safe: bool
    code: int | None
    errors: str


class Moments:
    """Starts one process of lastcall again and again, and sends each a SIGTERM at another moment."""

    def __init__(self, directory: Path, command: list[str]) -> None:
        self.directory = directory
        self.token = secrets.token_hex(8)
        self.command = command
        self._places = asyncio.Semaphore(AT_A_TIME)
        self._count = 0

    async def stop_at_first_statement(self) -> tuple[float, int]:
        """Send SIGTERM when it is blocked. Return the seconds from the start on, and the exit code."""
        async with self._places:
            began = time.monotonic()
            process, _ = self._start()
            try:
                await until(lambda: sigterm_in(process.pid, "SigBlk"))
                seconds = time.monotonic() - began
                process.terminate()
                await until(lambda: process.poll() is not None)
                return seconds, process.returncode
            finally:
                process.kill()
                process.wait()

    async def stop(self, moment: float, *, to_the_end: bool) -> Stopped:
        """Send SIGTERM so many seconds after the start, and see what becomes of it."""

        def is_held() -> bool:
            return not to_the_end and sigterm_in(process.pid, "SigBlk") and sigterm_in(process.pid, "ShdPnd")

        async with self._places:
            began = time.monotonic()
            process, errors = self._start()
            try:
                await asyncio.sleep(began + moment - time.monotonic())
                was_safe = sigterm_in(process.pid, "SigBlk", "SigCgt")
                process.terminate()
                await until(lambda: process.poll() is not None or is_held())
                return Stopped(was_safe=was_safe, code=process.returncode, errors=errors.read_text())
            finally:
                process.kill()
                process.wait()

    def left(self) -> list[psutil.Process]:
        """Return each process that one of the started processes has left."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(TOKEN) == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _start(self) -> tuple[subprocess.Popen[bytes], Path]:
        self._count += 1
        errors = self.directory / f"{self._count}.err"
        own = {
            TOKEN: self.token,
            "INWORLD_API_KEY": "key",
            "LASTCALL_HTTP": "off",
            "LASTCALL_CONTROL": str(self.directory / f"{self._count}.sock"),
        }
        # A server that is not there, and keys, without which a worker would be refused.
        own |= {"LIVEKIT_URL": "ws://127.0.0.1:9", "LIVEKIT_API_KEY": "key", "LIVEKIT_API_SECRET": "secret"}
        with errors.open("wb") as file:
            process = subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=os.environ | own,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
            )
        return process, errors


def sigterm_in(pid: int, *fields: str) -> bool:
    """Tell whether one of the signal sets of a process, as /proc/PID/status names them, has SIGTERM."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    sets = [int(line.split()[1], 16) for line in lines if line.startswith(fields)]
    return any(each >> (signal.SIGTERM - 1) & 1 for each in sets)


async def until(condition: Callable[[], object]) -> None:
    """Look again and again until the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", STARTING)
async def test_a_stop_while_python_begins(installed: Installation, name: str) -> None:
    """A SIGTERM before the first statement ends the process; from that statement on it is a clean stop."""
    starting = STARTING[name]
    with tempfile.TemporaryDirectory(prefix="lc-") as directory:  # short: there are limits to a socket's path
        moments = Moments(Path(directory), [str(installed.python), "-m", *starting.arguments])
        at_first = await asyncio.gather(*(moments.stop_at_first_statement() for _ in range(AT_A_TIME)))
        assert {code for _, code in at_first} == {0}
        step = max(SPAN_MS / 1000, *(2 * seconds for seconds, _ in at_first)) / MOMENTS
        results: list[Stopped] = []
        for _ in range(4):
            stops = (moments.stop(n * step, to_the_end=n % starting.ends_each == 0) for n in range(MOMENTS))
            results += await asyncio.gather(*stops)
            codes = {stopped.code for stopped in results}
            if -signal.SIGTERM in codes and codes & {0, None}:
                break
            step *= 2  # the machine is busier than it was at the first two
        await until(lambda: not moments.left())
    for n, stopped in enumerate(results):
        assert "Traceback" not in stopped.errors, (n, stopped)
        if stopped.code == -signal.SIGTERM:
            assert not stopped.was_safe and stopped.errors == "", (n, stopped)
        else:
            assert stopped.code in (0, None), (n, stopped)
    assert -signal.SIGTERM in codes and codes & {0, None}, "all moments on one side of the first statement"
