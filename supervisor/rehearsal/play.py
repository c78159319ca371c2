"""Plays the scenes, one after the other."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence

from lastcall.supervisor.rehearsal.scenes import RECONNECT_AFTER, SCENES, Scene, SceneResult, Seen, judge
from lastcall.supervisor.rehearsal.stage import Stage, StageError, Tell, tell_nobody
from lastcall.worker.base.wire import EntrypointBegan, EntrypointFailed, EntrypointOver, ShutdownAsked

# Ours: one job would not show that the second is cut, and more take memory that a pipeline may not have.
JOBS = 2
# Seconds until they run. livekit-agents gives a job process 10 s to initialize (`initialize_process_timeout`
# in worker.py), and on a small machine starts one after the other.
JOBS_RUN_WITHIN = 25.0
# Seconds between offers during the stop. Ours: some fall into the fence, which takes milliseconds.
OFFER_EVERY = 0.1


def rehearse(
    target: str,
    arguments: Sequence[str] = (),
    *,
    workers: int,
    tell: Tell = tell_nobody,
) -> Iterator[SceneResult]:
    """Yield the verdict on each scene as it is over. Raises ConfigError when the target is wrong.

    A scene that could not be played is the last: what was in its way would be in the way of the others.
    `tell` is called with each wait, again and again.
    """
    for number, scene in enumerate(SCENES, 1):
        place = f"{scene.name} ({number} of {len(SCENES)}): "

        def tell_of_scene(what: str, due: float, place: str = place) -> None:
            tell(f"{place}{what}", due)

        verdict = play(scene, target, arguments, workers=workers, tell=tell_of_scene)
        yield verdict
        if not verdict.was_played:
            return


def play(
    scene: Scene,
    target: str,
    arguments: Sequence[str] = (),
    *,
    workers: int,
    tell: Tell = tell_nobody,
) -> SceneResult:
    """Play one scene. Raises ConfigError when the target is wrong."""
    began = time.monotonic()
    with Stage(
        target,
        arguments,
        grace=scene.grace,
        job_seconds=scene.job_seconds,
        work_seconds=scene.work_seconds,
        workers=workers,
        tell=tell,
    ) as stage:
        try:
            stage.wait_ready()
            stage.wait_jobs(JOBS, JOBS_RUN_WITHIN)
            seen = _stop(scene, stage)
        except StageError as error:
            seconds = time.monotonic() - began
            return SceneResult(
                scene=scene,
                seconds=seconds,
                problems=(str(error), *stage.errors()),
                was_played=False,
                output=stage.tail(),
            )
        problems, warnings = judge(scene, seen)
        return SceneResult(
            scene=scene,
            seconds=time.monotonic() - began,
            problems=tuple(problems),
            warnings=tuple(warnings),
            exit_code=seen.exit_code,
            output=stage.tail() if problems else "",
            receipt=seen.receipt,
        )


def _stop(scene: Scene, stage: Stage) -> Seen:
    sends = list(scene.sends)
    next_at = time.monotonic() + sends[0][1]
    offered_at = 0.0
    reconnects = scene.reconnects

    def between() -> None:
        """Send what is due, and go on offering jobs, as a server that has not heard yet does."""
        nonlocal next_at, offered_at, reconnects
        if sends and time.monotonic() >= next_at:
            to, _ = sends.pop(0)
            stage.signal(signal.SIGTERM, group=to == "group", everybody=to == "everybody")
            next_at = time.monotonic() + (sends[0][1] if sends else 0.0)
        if reconnects and not sends and time.monotonic() >= stage.asked_at + RECONNECT_AFTER:
            reconnects = False
            stage.reconnect()
        if time.monotonic() >= offered_at + OFFER_EVERY:
            offered_at = time.monotonic()
            stage.dispatch("too-late")

    code = stage.wait_end(scene.patience, between)
    over_at = time.monotonic()
    heard = stage.heard
    failures = (message.error for message in heard if isinstance(message, EntrypointFailed))
    return Seen(
        exit_code=code,
        seconds=over_at - stage.asked_at,
        ends=stage.ends(),
        begun=frozenset(message.job for message in heard if isinstance(message, EntrypointBegan)),
        over=frozenset(message.job for message in heard if isinstance(message, EntrypointOver)),
        hung_up=frozenset(
            message.job
            for message in heard
            if isinstance(message, ShutdownAsked) and message.has_handler and message.at >= stage.asked_at
        ),
        late=tuple(stage.accepted_late()),
        left=tuple(stage.processes()) if code is not None else (),
        receipt=stage.receipt(),
        failures=tuple(dict.fromkeys(failures)),
        joined=stage.joined(),
    )
