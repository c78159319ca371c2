"""The scenes of a rehearsal as a table, and what each must look like in the end. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.plurals import counted

# Seconds that each job of a scene goes on after the stop began. Ours: longer than a stop takes to reach
# everything.
JOB_SECONDS = 2.5
# Seconds of work after each call in the scene that has some. Ours: more than the 10 s after which
# livekit-agents kills a job that the server has terminated (`shutdown_process_timeout`).
WORK_SECONDS = 12.0
# Seconds from the begin of a stop to a reconnect. Ours: the fence is over, and entrypoints have joined.
RECONNECT_AFTER = 1.0
# Seconds that each job of that scene goes on. livekit-agents alone cancels a job 15 s after the reconnect.
RECONNECTED_JOB_SECONDS = 20.0
# The grace of that scene. Of 60 s calls have 37 s (`worker.base.budget`).
RECONNECTED_GRACE = 60.0
# Seconds after grace until a stop is no longer waited for. Ours: five times the lateness that is allowed.
GIVE_UP_AFTER = 10.0
# Seconds by which a whole stop may be late. Ours: what a busy machine is late.
LATE_BY_AT_MOST = 2.0

To = Literal["pid", "group", "everybody"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One way to be stopped. `sends`: the processes that get SIGTERM, and the seconds since the last SIGTERM.

    `reconnects`: the agents lose their connection during the stop and come back. `work_seconds`: for a
    shutdown callback of each job.
    """

    name: str
    says: str
    sends: tuple[tuple[To, float], ...]
    grace: float = 40.0
    job_seconds: float = JOB_SECONDS
    reconnects: bool = False
    work_seconds: float = 0.0

    @property
    def needs_room(self) -> bool:
        """Whether the scene shows nothing of an agent that joins no room."""
        return self.reconnects or self.work_seconds > 0

    @property
    def is_cut_short(self) -> bool:
        """Whether the jobs are meant to outlast grace."""
        return self.job_seconds > self.grace

    @property
    def patience(self) -> float:
        """Seconds after which a stop that is not over will not be waited for."""
        return self.grace + GIVE_UP_AFTER


SCENES = (
    Scene(name="pid", says="docker stop, Kubernetes, KillMode=mixed", sends=(("pid", 0.0),)),
    Scene(name="group", says="kill -TERM -PGID, dumb-init, supervisord", sends=(("group", 0.0),)),
    Scene(name="everybody", says="systemd's default KillMode, Heroku", sends=(("everybody", 0.0),)),
    Scene(name="twice", says="a retry while it drains", sends=(("pid", 0.0), ("everybody", 0.3))),
    Scene(
        name="reconnect",
        says="the agent's connection breaks while it drains",
        sends=(("pid", 0.0),),
        grace=RECONNECTED_GRACE,
        job_seconds=RECONNECTED_JOB_SECONDS,
        reconnects=True,
    ),
    Scene(
        name="work",
        says="a transcript that takes its time after the call",
        sends=(("pid", 0.0),),
        work_seconds=WORK_SECONDS,
    ),
    Scene(name="deadline", says="a call longer than grace", sends=(("pid", 0.0),), grace=6.0, job_seconds=60),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The observations of one scene.

    `ends`: of each job, as the server was told. `begun` and `over`: whose entrypoint was, held to its time's
    end. `hung_up`: jobs that a signal handler of the agent's own shut down. `joined`: how many agents have
    joined their rooms.
    """

    exit_code: int | None
    seconds: float
    ends: Mapping[str, str]
    begun: frozenset[str] = frozenset()
    over: frozenset[str] = frozenset()
    hung_up: frozenset[str] = frozenset()
    late: tuple[str, ...] = ()
    left: tuple[int, ...] = ()
    receipt: Mapping[str, Any] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    joined: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneResult:
    """The verdict on a scene: its problems, and warnings that are no fault of a stop."""

    scene: Scene
    seconds: float
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    exit_code: int | None = None
    was_played: bool = True
    output: str = ""
    receipt: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return not self.problems


def judge(scene: Scene, seen: Seen) -> tuple[list[str], list[str]]:
    """Return problems and warnings, each one line."""
    problems = []
    code = Exit.FORCED if scene.is_cut_short else Exit.CLEAN
    if seen.exit_code is None:
        problems.append(f"the stop was not over after {scene.patience:.0f} s")
    elif seen.exit_code != code:
        outcome = seen.receipt.get("outcome", "none")
        problems.append(f"exit code {seen.exit_code}, expected {code} (receipt: {outcome})")
    if seen.exit_code is not None and seen.seconds > scene.grace + LATE_BY_AT_MOST:
        problems.append(f"the stop took {seen.seconds:.1f} s with a grace of {scene.grace:g} s")
    told = ((job, _what_happened(scene, seen, job, end)) for job, end in seen.ends.items())
    problems += [f"job {job}: {what}" for job, what in told if what]
    problems += [f"job {job}: accepted after the stop had begun" for job in seen.late]
    if seen.left:
        problems.append(f"{counted(len(seen.left), 'process')} left: {', '.join(map(str, seen.left))}")
    warnings = [
        f"the entrypoint failed in the local room, no fault of a stop: {text}" for text in seen.failures
    ]
    if scene.needs_room and seen.joined < len(seen.ends):
        warnings.append(
            f"{len(seen.ends) - seen.joined} of {counted(len(seen.ends), 'agent')} had not joined a room, and"
            " the scene shows nothing of that"
        )
    warnings += [
        f"job {each['id']}: the call ended well, but {_how_its_process_ended(each['process'])}"
        for each in seen.receipt.get("jobs", ())
        if each.get("process")
    ]
    return problems, warnings


def _how_its_process_ended(process: str) -> str:
    if process == "killed":
        return "a thread or an exit handler kept its process, which was killed"
    return f"its process did not: {process}"


def _what_happened(scene: Scene, seen: Seen, job: str, end: str) -> str:
    """Return what is wrong with the end of a job; empty when nothing is."""
    if end == "JS_RUNNING":
        return "its end was never reported to the server"
    if job in seen.hung_up:
        return "a SIGTERM handler of the agent's own shut it down: the call was cut"
    if end == "JS_SUCCESS":
        # One that was meant to be cut may be reported so too: before 1.5 a polite end counts as a good one.
        cut = {each["id"] for each in seen.receipt.get("jobs", ()) if each["fate"] == "cut"}
        is_early = job in seen.begun - seen.over - cut
        return "its process ended before its time, by a sys.exit or os._exit of its own?" if is_early else ""
    if scene.is_cut_short:
        return ""
    return f"reported as {end}, expected JS_SUCCESS: {_why_not(seen, job)}"


def _why_not(seen: Seen, job: str) -> str:
    """Return the reason as far as it is known, from the entrypoint and the fate in the receipt."""
    fate = {each["id"]: each["fate"] for each in seen.receipt.get("jobs", ())}.get(job)
    is_over = job in seen.over
    if fate == "failed":
        return f"its process ended with an error {'after' if is_over else 'during'} the entrypoint"
    if fate == "lost":
        return "its worker died"
    if not is_over:
        return "it was cut"
    if fate == "cut":
        return "it was cut after the entrypoint; which of the steps that follow did not end is not known"
    return f"its entrypoint was over; why it failed is not known (receipt: {fate or 'none'})"
