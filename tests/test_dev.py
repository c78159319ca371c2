"""`lastcall dev` on a terminal: a change is a reload, a running call finishes on the old code."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from lastcall.supervisor.app import App
from lastcall.supervisor.cli.beside import run_with
from lastcall.supervisor.cli.dev import check_livekit_url, remote_host
from lastcall.supervisor.cli.source_changes import Repeats, Sources, ignored_by_git, shown, target_directory
from lastcall.supervisor.errors import ConfigError
from lastcall.worker import imported
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.wire import OF_WORKER, Decoder, Imported, encode
from tests.support.harness import Run, StartRun
from tests.support.proxy import DEAD
from tests.support.terminal import Terminal

AGENT_TEXT = """
import asyncio, os, sys
from livekit.agents import JobContext, WorkerOptions, cli

VERSION = 1

def say(what: str) -> None:
    # In one piece: an unbuffered print writes each word by itself, and others write to the same pipe.
    os.write(1, f"call {VERSION} {what}\\n".encode())

async def entrypoint(ctx: JobContext) -> None:
    say("begins")
    while not os.path.exists("go"):
        await asyncio.sleep(0.02)
    say("ends")
    ctx.shutdown()

if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, load_threshold=float("inf"), num_idle_processes=1))
"""


async def start(run: StartRun, terminal: Terminal, directory: Path, *arguments: str) -> Run:
    control = str(directory / "c.sock")
    r: Run = await run(
        *("dev", "--control", control, *arguments),
        terminal=terminal,
        livekit=False,
        cwd=directory,
        environment=DEAD,
    )
    return r


async def test_a_change_is_a_reload(run: StartRun, terminal: Terminal, tmp_path: Path) -> None:
    """Edited while a call runs: the next call is on the new code, the first one ends on the old."""
    agent = tmp_path / "agent.py"
    agent.write_text(AGENT_TEXT)
    # Enough for the first call to outlive both reloads.
    r = await start(run, terminal, tmp_path, "--grace", "90", "agent.py")
    before = terminal.attributes
    await r.until(lambda: b"call 1 begins" in terminal.read(), 40)
    assert b"local dispatch server" in terminal.text
    agent.write_text(AGENT_TEXT.replace("VERSION = 1", "VERSION = 2"))
    await r.until(lambda: b"call 2 begins" in terminal.read(), 40)
    assert b"call 1 ends" not in terminal.text
    assert b"0.2 |" in terminal.text, "a worker's lines carry slot and generation"
    agent.write_text("def broken(:\n")
    await r.until(lambda: b"reload failed" in terminal.read(), 40)
    assert b"SyntaxError" in terminal.text
    (tmp_path / "go").touch()
    await r.until(lambda: b"call 1 ends" in terminal.read() and b"call 2 ends" in terminal.read(), 20)
    terminal.type(b"\x03")
    assert await r.exit() == 0, terminal.text
    assert terminal.attributes == before
    await r.nothing_left()


async def test_ctrl_c_twice_ends_at_once(run: StartRun, terminal: Terminal, tmp_path: Path) -> None:
    """The second Ctrl-C kills, because a developer does not wait."""
    (tmp_path / "agent.py").write_text(AGENT_TEXT)
    r = await start(run, terminal, tmp_path, "--grace", "600", "agent.py")
    await r.until(lambda: b"call 1 begins" in terminal.read(), 40)
    terminal.type(b"\x03")
    await r.until(lambda: b"stopping (SIGINT)" in terminal.read())
    await asyncio.sleep(0.4)  # two within 0.3 s are one
    terminal.type(b"\x03")
    assert await r.exit(10) == 75
    await r.nothing_left()


WRITING_AGENT = """
import json, os, time
from livekit.agents import JobContext, WorkerOptions, cli

async def entrypoint(ctx: JobContext) -> None:
    for name in ("transcript.json", "notes.md", "out.txt", "agent.log", "generated.py"):
        with open(name, "a") as file:
            file.write("# one more\\n")
    os.write(1, b"call\\n")  # whole: an unbuffered print writes the line's end by itself
    ctx.shutdown()

if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, load_threshold=float("inf"), num_idle_processes=1))
"""
JSON = {"LASTCALL_LOG_FORMAT": "json"}


async def start_without_terminal(run: StartRun, directory: Path, *arguments: str, **options: Any) -> Run:
    control = str(directory / "c.sock")
    command = ("dev", "--control", control, "--grace", "20", *arguments)
    r: Run = await run(*command, livekit=False, cwd=directory, **options)
    return r


def reloads(r: Run) -> list[str]:
    return [each["files"] for each in r.log("changed")]


@pytest.mark.timeout(300)  # four starts of a worker
async def test_files_that_the_agent_writes_do_not_reload_without_end(run: StartRun, tmp_path: Path) -> None:
    """Transcripts and logs are no sources; a Python file that each worker writes is dropped, in one line."""
    here = tmp_path / "agent"
    here.mkdir()
    (here / "agent.py").write_text(WRITING_AGENT)
    with open(here / "lines.txt", "wb") as lines:
        r = await start_without_terminal(run, here, "agent.py", environment=JSON, stdout=lines)
        dropped = "no longer watched: changes with each new worker; lastcall reload takes it in"
        await r.until(lambda: r.log(dropped), 200)
        assert reloads(r) == ["generated.py", "generated.py"]
        (here / "agent.py").write_text(f"{WRITING_AGENT}# edited\n")
        await r.until(lambda: calls(here) == 4, 80)
        (here / "agent.py").write_text(f"{WRITING_AGENT}# edited again\n")
        await r.until(lambda: len(reloads(r)) > 3)
        assert reloads(r) == ["generated.py", "generated.py", "agent.py", "agent.py"]
        assert len(r.log(dropped)) == 1
        r.kill()
        assert await r.exit() == 0
    await r.nothing_left()


def calls(directory: Path) -> int:
    """Return how many calls there were."""
    return (directory / "lines.txt").read_text().count("call\n")


# root without these two capabilities may read no more than modes allow (capabilities(7)).
AS_ANYBODY = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(AS_ANYBODY) and shutil.which("setpriv") is None, reason="root needs setpriv")
async def test_what_can_not_be_watched_and_what_is_asked_for(run: StartRun, tmp_path: Path) -> None:
    """A locked directory is told once; a name that is no text, an import and a pattern reload as well."""
    here, shared = tmp_path / "agent", tmp_path / "shared"
    for directory in (here, shared, here / "prompts", here / "locked"):
        directory.mkdir()
    (here / "locked").chmod(0)
    (here / "agent.py").write_text(f"import library\n{AGENT_TEXT}")
    (here / os.fsdecode(b"caf\xe9.py")).touch()
    (shared / "library.py").touch()
    r = await start_without_terminal(
        run, here, "--watch", "prompts/*.md", "--watch", "none/*", "agent.py",
        environment={**JSON, "PYTHONPATH": str(shared)}, prefix=AS_ANYBODY,
    )  # fmt: skip
    await r.until(lambda: "call 1 begins" in r.out.read_text(), 40)
    (here / "go").touch()
    (here / os.fsdecode(b"caf\xe9.py")).write_text("# new\n")
    (here / "prompts" / "greeting.md").write_text("Hello")
    seen = {r"caf\xe9.py", "prompts/greeting.md"}
    await r.until(lambda: {name for each in reloads(r) for name in each.split(", ")} == seen, 40)
    # The watch has looked since the import was told: an import is compared with its state in that look.
    (shared / "library.py").write_text("# new\n")
    seen.add(str(shared / "library.py"))
    await r.until(lambda: {name for each in reloads(r) for name in each.split(", ")} == seen, 40)
    await r.until(lambda: len(r.log("reload done")) == len(r.log("reload begins")) > 0, 60)
    assert [each["directory"] for each in r.log("directory can't be watched")] == ["locked"]
    assert sorted(each["watch"] for each in r.log("no file matches")) == ["none/*", "prompts/*.md"]
    r.kill()
    assert await r.exit() == 0
    (here / "locked").chmod(0o700)
    await r.nothing_left()


async def test_work_beside_that_fails_is_one_line() -> None:
    """The supervisor runs to its end, and an error of the supervisor comes through as it is."""
    lines: list[tuple[str, dict[str, Any]]] = []

    class FakeApp:
        log = SimpleNamespace(warning=lambda event, **values: lines.append((event, values)))

        async def run(self) -> Exit:
            await asyncio.sleep(0.01)
            if len(lines) == 2:
                raise ConfigError("wrong")
            return Exit.CLEAN

    async def broken() -> None:
        raise OSError("no screen")

    async def endless() -> None:
        await asyncio.sleep(600)

    app = cast(App, FakeApp())
    assert await run_with(app, {"the table": broken, "other": endless}) is Exit.CLEAN
    assert lines == [("goes on without", {"what": "the table", "reason": "OSError: no screen"})]
    with pytest.raises(ConfigError, match="wrong"):
        await run_with(app, {"the table": broken})


def test_what_git_ignores(tmp_path: Path) -> None:
    """Files of .gitignore are no reason for a reload; without a repository none is ignored."""
    assert ignored_by_git(tmp_path, {"a.log", "a.py"}) == set()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("*.log\n")
    assert ignored_by_git(tmp_path, {"a.log", "a.py"}) == {"a.log"}


def test_git_and_names_that_are_no_text(tmp_path: Path) -> None:
    """Names are bytes to git: one that is no UTF-8 is ignored or not, as any other."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_bytes(b"*.log\n")
    names = {os.fsdecode(b"caf\xe9.log"), os.fsdecode(b"caf\xe9.py"), "-new\nline.log"}
    assert ignored_by_git(tmp_path, names) == {os.fsdecode(b"caf\xe9.log"), "-new\nline.log"}


def test_names_for_people(tmp_path: Path) -> None:
    """No byte of a name reaches the terminal as anything but text."""
    assert shown(os.path.join(tmp_path, os.fsdecode(b"caf\xe9\x1b[2J.py")), tmp_path) == r"caf\xe9\x1b[2J.py"
    assert shown("/elsewhere/a.py", tmp_path) == "/elsewhere/a.py"


def changes_of(sources: Sources, directory: Path, write: Callable[[], object]) -> set[str]:
    """Return the names of the files that count as changed by what `write` does."""
    sources.keep(sources.look())
    write()
    return {os.path.relpath(path, directory) for path in sources.changed(sources.look())}


@pytest.mark.parametrize(
    ("name", "is_source"),
    [
        ("agent.py", True),
        ("tools/new.py", True),
        (".env", True),
        (".env.local", True),
        ("lastcall.toml", True),
        ("../shared/library.py", True),
        ("prompts/greeting.md", True),
        (os.fsdecode(b"caf\xe9.py"), True),
        ("readme.md", False),
        ("transcript.json", False),
        ("notes.txt", False),
        ("out.log", False),
        ("../other/library.py", False),
        ("node_modules/a/b.py", False),
        (".cache/a.py", False),
        ("environment/lib/a.py", False),
    ],
)
def test_what_is_a_source(tmp_path: Path, name: str, is_source: bool) -> None:
    """Python and env files of the target's directory, imported files, and what a pattern asks for."""
    here = tmp_path / "agent"
    for directory in (
        "tools",
        "prompts",
        "node_modules/a",
        ".cache",
        "environment/lib",
        "../shared",
        "../other",
    ):
        (here / directory).mkdir(parents=True)
    (here / "environment" / "pyvenv.cfg").touch()
    (tmp_path / "shared" / "library.py").touch()
    sources = Sources(here, here, named=["lastcall.toml"], patterns=["prompts/*.md"])
    sources.name([str(tmp_path / "shared" / "library.py")])
    changed = changes_of(sources, here, lambda: (here / name).write_text("new"))
    assert changed == ({name} if is_source else set())


def test_changes_of_sources(tmp_path: Path) -> None:
    """Written, removed, replaced by a dangling link; a file that is named later counts from then on."""
    agent = tmp_path / "agent.py"
    agent.write_text("1")
    sources = Sources(tmp_path, tmp_path, named=[], patterns=["[", "none/*"])
    assert sources.look().unmatched == ("[", "none/*")
    assert changes_of(sources, tmp_path, lambda: agent.write_text("22")) == {"agent.py"}
    assert changes_of(sources, tmp_path, lambda: None) == set()
    assert changes_of(sources, tmp_path, agent.unlink) == {"agent.py"}
    assert changes_of(sources, tmp_path, lambda: agent.symlink_to("nowhere")) == set()
    outside = tmp_path.parent / f"{tmp_path.name}-outside.py"
    outside.write_text("1")
    assert changes_of(sources, tmp_path, lambda: sources.name([str(outside)])) == set()
    assert changes_of(sources, tmp_path.parent, lambda: outside.write_text("22")) == {outside.name}
    sources.drop([str(outside)])
    assert changes_of(sources, tmp_path, lambda: outside.write_text("333")) == set()


def test_files_that_the_agent_writes() -> None:
    """A change in each of two new generations running drops a file; those of a person do not."""
    repeats = Repeats()
    assert repeats.repeated({"a", "b"}, generation=1, is_early=True) == set()
    assert repeats.repeated({"a"}, generation=2, is_early=False) == set()
    assert repeats.repeated({"a"}, generation=2, is_early=False) == set(), "once for each generation"
    assert repeats.repeated({"c"}, generation=3, is_early=True) == set()
    repeats.call_has_ended(2)
    assert repeats.repeated({"a", "b"}, generation=3, is_early=True) == {"a"}
    person = Repeats()
    for generation in range(1, 9):
        assert person.repeated({"a"}, generation=generation, is_early=generation % 3 > 0) == set()


def test_imported_files() -> None:
    """Without those that nobody edits; every portion fits into a message, whatever the names."""
    files = {"/agent/a.py", "/agent/a.pyc", f"{os.path.dirname(os.__file__)}/json.py", "agent.py"}
    files |= {"/environment/site-packages/x.py", os.path.abspath(imported.__file__)}
    modules = [ModuleType("module") for _ in files]
    for module, file in zip(modules, files, strict=True):
        module.__file__ = file
    assert imported.imported_files([*modules, None, ModuleType("built in")]) == ["/agent/a.py"]
    assert list(imported.portions([])) == []
    many = [os.fsdecode(b"/\xe9" * 2000) for _ in range(100)]
    portions = list(imported.portions(many))
    assert [file for portion in portions for file in portion] == many
    for portion in portions:
        (heard,) = Decoder(OF_WORKER).feed(encode(Imported(files=portion)))
        assert heard == Imported(files=portion)


def test_directory_of_a_target(tmp_path: Path) -> None:
    """Where Python puts the first entry of its path: behind a symlink the real one."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "agent.py").touch()
    (tmp_path / "link.py").symlink_to("real/agent.py")
    for target in ("real/agent.py", "real/agent.py:server", "link.py"):
        assert target_directory(target, tmp_path) == tmp_path / "real"
    assert target_directory("package.module:server", tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("ws://localhost:7880", False),
        ("ws://127.0.0.1:7880", False),
        ("wss://calls.example.com", True),
        ("wss://[calls", False),
    ],
)
def test_remote_project_is_pointed_out(url: str, warned: bool) -> None:
    """Real calls would come here."""
    assert bool(remote_host(url)) is warned
    if url.startswith("wss://["):
        with pytest.raises(ConfigError, match=r"^LIVEKIT_URL: got 'wss://\[calls', expected wss://HOST$"):
            check_livekit_url(url)
    else:
        check_livekit_url(url)
