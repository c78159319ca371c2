"""Plays the scenes, one after the other."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

from lastcall.supervisor.rehearsal.scenes import SCENES, Scene, Seen, Verdict, judge
from lastcall.supervisor.rehearsal.stage import BEGINS, Stage, StageError

JOBS = 2
JOBS_UP = 25.0
OFFER_EVERY = 0.1
FAILED = "entrypoint failed in the rehearsal"
OVER = "entrypoint is over in the rehearsal"
SHUTDOWN = "shutdown was asked for in the rehearsal"


def rehearse(target: str, *, workers: int) -> Iterator[Verdict]:
    """Yield the verdict on each scene as it is over. Raises ConfigError when the target is wrong.

    A scene that could not be played is the last: what was in its way would be in the way of the others.
    """
    for scene in SCENES:
        verdict = play(scene, target, workers=workers)
        yield verdict
        if not verdict.was_played:
            return


def play(scene: Scene, target: str, *, workers: int) -> Verdict:
    """Play one scene. Raises ConfigError when the target is wrong."""
    began = time.monotonic()
    settings = {"mock_room": True, "hold": scene.hold}
    with Stage(target, grace=scene.grace, settings=settings, workers=workers) as stage:
        try:
            stage.wait_ready()
            stage.wait_jobs(JOBS, JOBS_UP)
            seen = _stop(scene, stage)
        except StageError as error:
            seconds = time.monotonic() - began
            return Verdict(
                scene=scene,
                seconds=seconds,
                problems=(str(error), *stage.errors()),
                was_played=False,
                output=stage.tail(),
            )
        problems, warnings = judge(scene, seen)
        return Verdict(
            scene=scene,
            seconds=time.monotonic() - began,
            problems=tuple(problems),
            warnings=tuple(warnings),
            exit_code=seen.exit_code,
            output=stage.tail() if problems else "",
        )


def _stop(scene: Scene, stage: Stage) -> Seen:
    sends = list(scene.sends)
    next_at = time.monotonic() + sends[0][1]
    offered_at = 0.0

    def between() -> None:
        """Send what is due, and go on offering jobs, as a server that has not heard yet does."""
        nonlocal next_at, offered_at
        if sends and time.monotonic() >= next_at:
            to, _ = sends.pop(0)
            stage.signal(signal.SIGTERM, group=to == "group", everybody=to == "everybody")
            next_at = time.monotonic() + (sends[0][1] if sends else 0.0)
        if time.monotonic() >= offered_at + OFFER_EVERY:
            offered_at = time.monotonic()
            stage.dispatch("too-late")

    code = stage.wait_end(scene.patience, between)
    over_at = time.monotonic()
    said = list(stage.log())

    def jobs(message: str) -> frozenset[str]:
        return frozenset(str(line.get("held_job")) for line in said if line.get("message") == message)

    failures = (str(line.get("error", "")) for line in said if line.get("message") == FAILED)
    return Seen(
        exit_code=code,
        seconds=over_at - stage.asked_at,
        ends=stage.ends(),
        begun=jobs(BEGINS),
        over=jobs(OVER),
        hung_up=frozenset(
            str(line.get("held_job"))
            for line in said
            if line.get("message") == SHUTDOWN
            and line.get("has_handler")
            and float(line.get("held_at", 0.0)) >= stage.asked_at
        ),
        late=tuple(stage.accepted_late()),
        left=tuple(stage.processes()) if code is not None else (),
        receipt=stage.receipt(),
        failures=tuple(dict.fromkeys(failures)),
    )
