"""Every option of `lastcall run`, each written down once.

The command line, its help, the checks of a value, the names of environment variables, the page
docs/configuration.md are all made from the definitions here. To add an option, add
a field with a description; a `Flag` puts the option on the command line too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from lastcall.supervisor.config.section import Field, Section
from lastcall.supervisor.config.values import (
    Backoff,
    HttpAddress,
    HttpUrl,
    Seconds,
    SecondsOrZero,
    TargetText,
    WebSocketUrl,
    WritableFile,
)
from lastcall.worker.base.budget import DEFAULT_GRACE, Shares, installed_entrypoint_wait
from lastcall.worker.base.records import dataclass
from lastcall.worker.base.settings import DEFAULT_FINISH, HandoverSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """How the command line spells an option.

    `metavar` stands for the value in the help, `short` is a one-letter spelling, and `auto` says what the
    default value `auto` means.
    """

    metavar: str
    short: str = ""
    auto: str = ""


class Stop(Section):
    """Reserved shares of grace, in seconds."""

    fence: Annotated[Seconds, Field(description="For the worker to confirm that it takes no new jobs.")] = 2
    close: Annotated[Seconds, Field(description="Jobs have all but its last 2 s.")] = 20
    terminate: Annotated[Seconds, Field(description="For what is left after close.")] = 5
    kill: Annotated[Seconds, Field(description="For SIGKILL to the worker and all below it.")] = 5
    companion: Annotated[
        Seconds,
        Field(description="To close the Inworld pool, after the last worker; only if there is one."),
    ] = 5

    @property
    def shares(self) -> Shares:
        """The shares of one worker's stop; `Config.shares` adds the share of the Inworld pool."""
        return Shares(
            fence=self.fence,
            close=self.close,
            terminate=self.terminate,
            kill=self.kill,
            entrypoint_wait=installed_entrypoint_wait(),
        )


class Start(Section):
    """Starts of workers, in seconds."""

    timeout: Annotated[Seconds, Field(description="Until registered with the LiveKit server.")] = 120
    stagger: Annotated[
        SecondsOrZero,
        Field(description="Between the starts of livekit workers; opaque ones start at once."),
    ] = 0.5
    image: Annotated[
        bool,
        Field(description="Fork livekit workers from one process that has imported livekit-agents."),
    ] = True


class Restart(Section):
    """Restarts of a slot that fails."""

    intensity: Annotated[int, Field(ge=0, le=1000, description="Failures in period that are borne.")] = 5
    period: Annotated[Seconds, Field(description="Seconds.")] = 60
    backoff: Annotated[
        Backoff, Field(description="First step after an immediate first retry, and the cap; seconds.")
    ] = (0.5, 30)


class Stall(Section):
    """Workers whose event loop is stuck."""

    beat: Annotated[Seconds, Field(description="Seconds between two signs of life of a worker.")] = 1
    misses: Annotated[
        int,
        Field(ge=2, le=1000, description="After so many missed beats a worker is stalled, and replaced."),
    ] = 5
    grace: Annotated[SecondsOrZero, Field(description="Seconds for the jobs of a stalled worker.")] = 30


class Reload(Section):
    """Replacements while everything runs."""

    max_surge: Annotated[
        int,
        Field(ge=1, le=1000, description="Workers that are started beside the old ones at a time."),
    ] = 1
    settle: Annotated[
        SecondsOrZero,
        Field(description="Seconds that an opaque worker has to stay up to count as one that works."),
    ] = 1


class Recycle(Section):
    """Replaced as in a reload, never in the middle of a job; 0 is off."""

    max_age: Annotated[
        SecondsOrZero,
        Field(description="Seconds, less up to a tenth, so that not all workers are due at once."),
    ] = 0
    max_jobs: Annotated[int, Field(ge=0, description="Begun by one worker.")] = 0
    max_rss_mb: Annotated[
        int, Field(ge=0, description="Megabytes of the worker itself, without what it shares with others.")
    ] = 0


class JobLimits(Section):
    """Limits of one worker's jobs."""

    max_running: Annotated[
        int, Field(ge=0, description="Accepted by one worker at a time; 0 is no limit.")
    ] = 0
    memory_mb: Annotated[
        int,
        Field(
            ge=0,
            le=1 << 30,
            description="Private memory of a job: asked to end at 80 %, killed at it; 0 is no limit.",
        ),
    ] = 0
    finish: Annotated[
        Seconds,
        Field(description="Seconds for work after a call, once the agent has left; a stop gives it grace."),
    ] = DEFAULT_FINISH


class Handover(Section):
    """Calls that go on in another job; agents have to keep their state for that."""

    enabled: Annotated[bool, Field(description="On hosts of LiveKit Cloud only where it is set to true.")] = (
        True
    )
    wait: Annotated[SecondsOrZero, Field(description="Seconds for an agent to be no longer busy.")] = 5
    patience: Annotated[
        Seconds, Field(description="Seconds from the dispatch until a successor is in the room.")
    ] = 5
    limit: Annotated[
        int, Field(ge=0, le=1000, description="Handovers of one call, so that none wanders.")
    ] = 3

    @property
    def settings(self) -> HandoverSettings:
        """The options as a worker gets them."""
        return HandoverSettings(
            enabled=self.enabled,
            on_cloud=self.enabled and "enabled" in self.given,
            wait=self.wait,
            patience=self.patience,
            limit=self.limit,
        )


class Inworld(Section):
    """The pool of Inworld connections that all jobs of the machine share."""

    enabled: bool = False
    api_key_file: Annotated[str, Field(description="Else INWORLD_API_KEY.")] = ""
    max_connections: Annotated[int, Field(ge=1, le=1000)] = 20
    max_contexts: Annotated[int, Field(ge=1, le=1000, description="On one connection.")] = 5
    idle_connection_timeout: Annotated[
        Seconds, Field(description="Seconds until a connection that nothing uses is closed.")
    ] = 300
    acquire_timeout: Annotated[Seconds, Field(description="Seconds that an utterance waits for a place.")] = (
        30
    )
    ws_url: WebSocketUrl = "wss://api.inworld.ai/"
    base_url: HttpUrl = "https://api.inworld.ai/"


class Config(Section):
    """Every option of `lastcall run`."""

    target: Annotated[TargetText, Field(description="path.py, path.py:attr, module:attr or -m module.")] = ""
    args: Annotated[  # each configuration gets a copy of the list
        list[str], Field(description="For the program of the target itself, after `start`.")
    ] = []  # noqa: RUF012
    command: Annotated[
        list[str], Field(description='An opaque worker in place of a target, as in ["node", "agent.js"].')
    ] = []  # noqa: RUF012
    workers: Annotated[
        int, Field(ge=1, le=1000, description="Workers to keep up."), Flag(metavar="N", short="-w")
    ] = 1
    grace: Annotated[Seconds, Field(description="What a whole stop may take."), Flag(metavar="SECONDS")] = (
        DEFAULT_GRACE
    )
    http: Annotated[
        HttpAddress,
        Field(description="For /livez /readyz /status /metrics, or off."),
        Flag(metavar="HOST:PORT"),
    ] = "127.0.0.1:8080"
    control: Annotated[
        str,
        Field(description="Control socket."),
        Flag(metavar="PATH", auto="in a directory of the user's own"),
    ] = "auto"
    receipt: Annotated[
        WritableFile,
        Field(description="Where to write the receipt, besides the log."),
        Flag(metavar="FILE"),
    ] = ""
    log_format: Annotated[
        Literal["auto", "json", "console"],
        Field(description="auto, json or console."),
        Flag(metavar="FORMAT"),
    ] = "auto"
    env_file: Annotated[
        str,
        Field(description="KEY=value lines, added to the workers' environment; read at start and reload."),
    ] = ""
    stop: Stop = Stop()
    start: Start = Start()
    restart: Restart = Restart()
    stall: Stall = Stall()
    reload: Reload = Reload()
    recycle: Recycle = Recycle()
    jobs: JobLimits = JobLimits()
    handover: Handover = Handover()
    inworld: Inworld = Inworld()

    @property
    def shares(self) -> Shares:
        """The reserved shares of a whole stop."""
        return replace(self.stop.shares, companion=self.stop.companion if self.inworld.enabled else 0.0)

    @property
    def is_opaque(self) -> bool:
        """Whether workers run a command, and not a target in a worker of lastcall."""
        return bool(self.command)


def flags() -> dict[str, Flag]:
    """Return the options that the command line of `run` takes, by name."""
    return {
        name: each
        for name, option in Config.options.items()
        for each in option.metadata
        if isinstance(each, Flag)
    }
