"""`lastcall rehearse`: what it finds in good and bad agents, and how it says it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from lastcall.supervisor.cli import drill_page
from lastcall.supervisor.rehearsal import drill_report, play
from lastcall.supervisor.rehearsal.scenes import SCENES, Scene, SceneResult, Seen, judge
from lastcall.supervisor.rehearsal.stage import Stage, StageError
from lastcall.worker.base.clock import now
from lastcall.worker.base.settings import Rehearsal
from lastcall.worker.base.wire import (
    MAX_LINE_BYTES,
    OF_REHEARSED_JOB,
    EntrypointBegan,
    EntrypointFailed,
    EntrypointOver,
    ShutdownAsked,
)
from lastcall.worker.job.rehearsed import RehearsedEntrypoint
from tests.support.harness import HERE, LASTCALL, SAMPLE
from tests.support.receipts import cut_stop

PID, DEADLINE = SCENES[0], SCENES[-1]
CI = HERE.parent / "examples" / "ci"
FRAGILE = str(HERE / "agents" / "fragile.py")


BUSY = """
from livekit.agents import AgentServer, JobContext
server = AgentServer(load_fnc=lambda: 1.0)

@server.rtc_session()
async def entrypoint(ctx: JobContext) -> None:
    pass
"""


def rehearse(
    *arguments: str, timeout: float = 360.0, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LASTCALL, "rehearse", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.long
@pytest.mark.timeout(380)
def test_a_good_agent_passes(tmp_path: Path) -> None:
    """The command of examples/ci passes every scene; JSON, JUnit and the page say the same."""
    shutil.copy(CI / "agent.py", tmp_path)
    steps = yaml.safe_load((CI / "rehearse.yml").read_text())["jobs"]["rehearse"]["steps"]
    (words,) = [step["run"].split() for step in steps if step.get("run", "").startswith("lastcall ")]
    done = rehearse(*words[2:], "--json", "--html", "r.html", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert (done.returncode, document["ok"]) == (0, True), done.stdout
    assert [scene["name"] for scene in document["scenes"]] == [scene.name for scene in SCENES]
    assert [scene["exit_code"] for scene in document["scenes"]] == [0, 0, 0, 0, 0, 0, 75]
    root = ElementTree.fromstring((tmp_path / words[-1]).read_text())
    assert (root.get("tests"), root.get("failures")) == ("7", "0")
    text = (tmp_path / "r.html").read_text()
    assert text.count("<svg") == len(SCENES) == text.count(": ok</h2>")


JOINS = """
import asyncio
from livekit.agents import AgentServer, JobContext
server = AgentServer()

@server.rtc_session()
async def entrypoint(ctx: JobContext) -> None:
    await ctx.connect()
    await ctx.wait_for_participant()
    await asyncio.sleep(600)
"""


@pytest.mark.long
def test_an_agent_in_its_room_passes(tmp_path: Path) -> None:
    """A worker of livekit-agents alone cuts these calls: the server terminates them while they go on.

    The connection breaks in the stop, as in one scene, and there is work after the call, as in another one.
    """
    agent = tmp_path / "agent.py"
    agent.write_text(JOINS)
    named = {scene.name: scene for scene in SCENES}
    scene = replace(named["reconnect"], work_seconds=named["work"].work_seconds, grace=90.0)
    verdict = play.play(scene, str(agent), workers=1)
    assert verdict.is_good and verdict.warnings == (), (verdict.problems, verdict.warnings, verdict.output)
    assert verdict.seconds > scene.job_seconds + scene.work_seconds


@pytest.mark.core
def test_an_agent_whose_jobs_die_of_sigterm_fails() -> None:
    """The stop that reaches every process cuts its jobs: each is named, the entrypoint's error is a note."""
    (scene,) = [scene for scene in SCENES if scene.name == "everybody"]
    verdict = play.play(scene, FRAGILE, workers=1)
    assert not verdict.is_good and verdict.was_played
    cut = [problem for problem in verdict.problems if "reported as JS_FAILED" in problem]
    assert len(cut) == 2, (verdict.problems, verdict.output)
    assert any("RuntimeError('no such room')" in warning for warning in verdict.warnings), verdict


@pytest.mark.core
def test_an_agent_that_is_full_for_its_own_load_passes(tmp_path: Path) -> None:
    """The load of the machine, here of a pipeline's, says nothing about a stop."""
    agent = tmp_path / "busy.py"
    agent.write_text(BUSY)
    verdict = play.play(PID, str(agent), workers=1)
    assert verdict.is_good, (verdict.problems, verdict.output)


@pytest.mark.parametrize(
    ("agent", "says"),
    [
        # It is told by the receipt, the exit code and the server that all is well.
        ("hangs_up.py", "a SIGTERM handler of the agent's own shut it down"),
        ("leaves.py", "its process ended before its time"),
    ],
)
def test_an_agent_that_ends_its_own_calls_fails(agent: str, says: str) -> None:
    """A call that the agent's own code ends at a SIGTERM is cut as well, however politely it is done."""
    (scene,) = [scene for scene in SCENES if scene.name == "everybody"]
    verdict = play.play(scene, str(HERE / "agents" / agent), workers=1)
    assert verdict.was_played and verdict.exit_code == 0, (verdict.problems, verdict.output)
    assert len(verdict.problems) == 2 and all(says in problem for problem in verdict.problems)


def test_nothing_of_a_scene_stays() -> None:
    """An interrupted rehearsal leaves no process, neither of the agent nor of the server."""
    with (
        pytest.raises(KeyboardInterrupt),
        Stage(SAMPLE, grace=30) as set_up,
    ):
        set_up.wait_ready()
        server = set_up._server
        assert len(set_up.processes()) > 1
        raise KeyboardInterrupt
    assert set_up.processes() == [] and server.poll() is not None
    assert not set_up.directory.exists()


def marked(mark: str) -> list[int]:
    """Return the living processes that have the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("verb", ["rehearse", "doctor"])
def test_a_signal_ends_it_and_takes_everything_along(verb: str, number: signal.Signals, code: int) -> None:
    """One Ctrl-C, or a pipeline's SIGTERM: the agent, its supervisor and the server are gone with it."""
    mark = f"TEST_REHEARSAL={os.urandom(8).hex()}"
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        [*LASTCALL, verb, SAMPLE],
        env={**os.environ, name: value},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 30
        while len(marked(mark)) < 4 and time.monotonic() < deadline:  # it, the server, supervisor, worker
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) == code
        assert marked(mark) == []
    finally:
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)


def test_an_agent_that_can_not_start_says_why(tmp_path: Path) -> None:
    """The one line of the error has the agent's exception, and comes soon."""
    agent = tmp_path / "agent.py"
    agent.write_text("import os\nos.environ['SOME_KEY_OF_MINE']\n")
    with (
        pytest.raises(StageError, match=r"69 before it was ready.*KeyError: 'SOME_KEY_OF_MINE'"),
        Stage(str(agent), grace=30) as set_up,
    ):
        set_up.wait_ready()


def has_begun(pid: int) -> bool:
    """Tell whether the first statement of lastcall has run: SIGINT is blocked, or a later import is there."""
    process = Path(f"/proc/{pid}")
    with contextlib.suppress(FileNotFoundError):
        (blocked,) = re.findall(r"^SigBlk:\s*(\w+)", (process / "status").read_text(), flags=re.M)
        bit = 1 << (signal.SIGINT - 1)
        return bool(int(blocked, 16) & bit) or "uvloop" in (process / "maps").read_text()
    return True


@pytest.mark.parametrize("after", [0.0, 0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("verb", ["rehearse", "doctor"])
def test_ctrl_c_while_it_starts(verb: str, after: float) -> None:
    """The first Ctrl-C ends the verb, however early it comes.

    The exit code is lastcall's, or the Ctrl-C kills the process before lastcall can choose one. Python
    itself, which runs before lastcall does, takes a Ctrl-C for exit code 1.
    """
    process = subprocess.Popen([*LASTCALL, verb, SAMPLE], stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 20
    while not has_begun(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (130, -signal.SIGINT)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nobody.py"], 78, "no file 'nobody.py'"),
        ([SAMPLE, "--workers", "0"], 2, "--workers: got 0"),
        ([SAMPLE, "--json", "--html", "-"], 2, "both --json and --html - write to standard output"),
        ([SAMPLE, "--junit", "/no/such/place/r.xml"], 2, "--junit: no directory '/no/such/place'"),
    ],
)
def test_mistakes(arguments: list[str], code: int, says: str) -> None:
    """A wrong target is 78 as everywhere, a wrong option 2; one line, and no scene after it."""
    done = rehearse(*arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    # A machine that is busy is told every 10 s that it waits for the worker, which imports before it looks.
    (line,) = [each for each in done.stderr.splitlines() if not each.endswith("yet at most")]
    assert says in line


def seen(**changes: Any) -> Seen:
    values: dict[str, Any] = {"exit_code": 0, "seconds": 3.0, "ends": {"a": "JS_SUCCESS", "b": "JS_SUCCESS"}}
    return Seen(**(values | changes))


@pytest.mark.parametrize(
    ("scene", "what", "problem"),
    [
        (PID, {"exit_code": 75, "receipt": {"outcome": "cut"}}, "exit code 75, expected 0 (receipt: cut)"),
        (PID, {"exit_code": None}, "the stop was not over after 50 s"),
        (PID, {"seconds": 42.5}, "the stop took 42.5 s with a grace of 40 s"),
        (PID, {"ends": {"a": "JS_FAILED"}}, "job a: reported as JS_FAILED, expected JS_SUCCESS: it was cut"),
        (
            PID,
            {"ends": {"a": "JS_FAILED"}, "over": frozenset({"a"})},
            "expected JS_SUCCESS: its entrypoint was over; why it failed is not known (receipt: none)",
        ),
        (
            PID,
            {
                "ends": {"a": "JS_FAILED"},
                "over": frozenset({"a"}),
                "receipt": {"jobs": [{"id": "a", "fate": "cut"}]},
            },
            "it was cut after the entrypoint; which of the steps that follow did not end is not known",
        ),
        (
            PID,
            {"ends": {"a": "JS_FAILED"}, "receipt": {"jobs": [{"id": "a", "fate": "lost"}]}},
            "expected JS_SUCCESS: its worker died",
        ),
        (
            PID,
            {"ends": {"a": "JS_FAILED"}, "receipt": {"jobs": [{"id": "a", "fate": "failed"}]}},
            "expected JS_SUCCESS: its process ended with an error during the entrypoint",
        ),
        (
            PID,
            {
                "ends": {"a": "JS_FAILED"},
                "over": frozenset({"a"}),
                "receipt": {"jobs": [{"id": "a", "fate": "failed"}]},
            },
            "expected JS_SUCCESS: its process ended with an error after the entrypoint",
        ),
        (PID, {"ends": {"a": "JS_RUNNING"}}, "job a: its end was never reported to the server"),
        (PID, {"late": ("a",)}, "job a: accepted after the stop had begun"),
        (PID, {"left": (7, 8)}, "2 processes left: 7, 8"),
        (
            DEADLINE,
            {"exit_code": 75, "ends": {"a": "JS_RUNNING"}},
            "job a: its end was never reported to the server",
        ),
        (DEADLINE, {"ends": {"a": "JS_FAILED"}}, "exit code 0, expected 75"),
    ],
)
def test_what_is_a_problem(scene: Scene, what: dict[str, Any], problem: str) -> None:
    """One line for each thing that went wrong, and nothing else."""
    problems, warnings = judge(scene, seen(**what))
    assert len(problems) == 1 and problem in problems[0]
    assert warnings == []


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
@pytest.mark.parametrize("joined", [0, 1, 2])
def test_a_scene_that_needs_rooms(scene: Scene, joined: int) -> None:
    """An agent that joins no room is no fault, and is told where the scene shows nothing of it."""
    code = 75 if scene.is_cut_short else 0
    problems, warnings = judge(scene, seen(joined=joined, exit_code=code))
    needs = scene.name in ("reconnect", "work")
    assert problems == [] and len(warnings) == (needs and joined < 2), warnings


@pytest.mark.parametrize(
    ("process", "says"),
    [
        ("killed", "a thread or an exit handler kept its process, which was killed"),
        ("exit code 3", "its process did not: exit code 3"),
    ],
)
def test_process_that_outlives_its_call_is_a_warning(process: str, says: str) -> None:
    """The call was not cut, which is what a rehearsal looks at; the agent's author should still know."""
    job = {"id": "a", "fate": "finished", "process": process}
    problems, warnings = judge(PID, seen(receipt={"jobs": [job]}))
    assert (problems, warnings) == ([], [f"job a: the call ended well, but {says}"])


async def test_a_rehearsed_job_tells_how_it_goes(tmp_path: Path) -> None:
    """Begun, asked to shut down, failed, over: each is heard as a value, and the job ends once."""
    ended: list[str] = []

    def end(*, reason: str) -> None:
        ended.append(reason)

    class Context:
        def __init__(self) -> None:
            self.job = self
            self.id = "AJ_1"
            self.shutdown: Callable[..., None] = end

    async def user(context: Context) -> None:
        context.shutdown(reason="nobody is there")
        raise ValueError("no such room")

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hearing:
        hearing.bind(str(tmp_path / "s"))
        hearing.settimeout(5)
        before = now()
        rehearsal = Rehearsal(job_seconds=0.05, stop=str(tmp_path), socket=str(tmp_path / "s"))
        await RehearsedEntrypoint(user, rehearsal)(Context())
        heard = [OF_REHEARSED_JOB.decode(hearing.recv(MAX_LINE_BYTES)) for _ in range(4)]
    asked = heard.pop(1)
    assert isinstance(asked, ShutdownAsked) and asked.job == "AJ_1" and before <= asked.at <= now()
    error = EntrypointFailed(job="AJ_1", error="ValueError('no such room')")
    assert heard == [EntrypointBegan(job="AJ_1"), error, EntrypointOver(job="AJ_1")]
    assert ended == ["the rehearsal is over"]


async def test_a_rehearsed_job_outlives_its_rehearsal(tmp_path: Path) -> None:
    """Where nobody hears, the job goes on to its end all the same."""
    ended: list[str] = []

    def end(*, reason: str) -> None:
        ended.append(reason)

    context = SimpleNamespace(job=SimpleNamespace(id="AJ_1"), shutdown=end)
    rehearsal = Rehearsal(job_seconds=0.01, stop=str(tmp_path), socket=str(tmp_path / "gone"))
    await RehearsedEntrypoint(lambda _: asyncio.sleep(60), rehearsal)(context)
    assert ended == ["the rehearsal is over"]


async def test_a_rehearsed_job_does_not_end_before_the_stop(tmp_path: Path) -> None:
    """The job's time begins with the stop, however long the other jobs of the scene take to come up."""
    ended: list[str] = []
    stop = tmp_path / "stop"

    def end(*, reason: str) -> None:
        assert stop.exists()
        ended.append(reason)

    async def user(_: object) -> None:
        return None

    context = SimpleNamespace(job=SimpleNamespace(id="AJ_1"), shutdown=end)
    rehearsal = Rehearsal(job_seconds=0.01, stop=str(stop), socket=str(tmp_path / "gone"))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(RehearsedEntrypoint(user, rehearsal)(context))
        await asyncio.sleep(0.2)
        stop.touch()
    assert ended == ["the rehearsal is over"]


def test_what_is_none() -> None:
    """Jobs that end well; in the deadline's scene, jobs that are cut in time and reported."""
    assert judge(PID, seen()) == ([], [])
    assert judge(DEADLINE, seen(exit_code=75, ends={"a": "JS_FAILED"}, seconds=6.5)) == ([], [])
    assert judge(DEADLINE, seen(exit_code=75, ends={"a": "JS_SUCCESS"})) == ([], [])
    cut = {"jobs": [{"id": "a", "fate": "cut"}]}
    begun = frozenset({"a"})
    assert judge(DEADLINE, seen(exit_code=75, ends={"a": "JS_SUCCESS"}, begun=begun, receipt=cut)) == ([], [])
    assert judge(PID, seen(begun=begun, over=begun)) == ([], [])
    problems, warnings = judge(PID, seen(failures=("ValueError('x')",)))
    assert problems == [] and "ValueError('x')" in warnings[0]


def test_junit_takes_whatever_workers_write() -> None:
    """Characters that XML can't hold do not break a pipeline's parser."""
    verdict = SceneResult(scene=PID, seconds=1.0, problems=("it was cut <&>",), output="a\x00b\x1b[31m\ufffe")
    root = ElementTree.fromstring(drill_report.junit("a.py", [verdict]))
    (failure,) = root.iter("failure")
    assert failure.get("message") == "it was cut <&>"
    assert "FAIL" in drill_report.line(verdict) and "it was cut" in drill_report.line(verdict)
    assert os.linesep not in drill_report.line(SceneResult(scene=PID, seconds=1.0, problems=()))


def test_a_scene_on_the_page() -> None:
    """The verdict and its problems, with a picture of the stop where the scene left a receipt of one."""
    played = SceneResult(scene=PID, seconds=1.0, problems=("it was cut",), receipt=cut_stop())
    section = drill_page.section(played)
    assert (section.title, section.is_good, section.notes) == ("pid: failed", False, ("it was cut",))
    assert section.timeline is not None and section.timeline.receipt.outcome == "cut"
    for receipt in ({}, {"outcome": "clean"}):
        without = SceneResult(scene=PID, seconds=1.0, problems=(), receipt=receipt)
        assert drill_page.section(without).timeline is None
