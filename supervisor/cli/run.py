"""The command line: what `lastcall --help` says, and nothing that does not work."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

from lastcall.supervisor.cli import plain_words
from lastcall.supervisor.cli.parameters import (
    Arguments,
    ConfigFile,
    Module,
    OptionalTarget,
    Watch,
    arguments_of,
    needed_target,
    target_of,
    with_arguments,
    with_run_options,
)
from lastcall.supervisor.cli.plain_words import Option
from lastcall.supervisor.config.loading import Loader
from lastcall.supervisor.config.paths import working_directory
from lastcall.supervisor.config.sources import FILE_NAMES
from lastcall.supervisor.errors import ConfigError, UsageError
from lastcall.supervisor.signals import Inbox
from lastcall.worker.base import variables
from lastcall.worker.base.target_form import FORMS

if TYPE_CHECKING:
    import typer

RUN_HELP = """Run workers under supervision.

TARGET is path.py, path.py:attr, module:attr or -m module; attr is an AgentServer, a WorkerOptions, or a
function that returns one. After --args come the program's own arguments. After -- any command is run as an
opaque worker: it gets SIGTERM, the deadline and the sweep.

SIGTERM (or SIGINT, or one Ctrl-C) stops: no new dispatch is accepted, running jobs end by themselves within
the grace, everything is closed, and a receipt says how it went. Repeats change nothing. Exit codes: 0 clean,
75 a job was cut or something forced, 69 gave up, 78 wrong configuration or target, 70 a fault of lastcall.
"""

# Defaults of `dev`. Ours: with a grace of 10 s a developer sees a drain, and does not wait for it.
DEV_DEFAULTS: dict[str, Any] = {
    "workers": 1,
    "grace": 10.0,
    "http": "127.0.0.1:0",
    "log_format": "console",
}


class _Session:
    """A verb gets the inbox and the command from here, and leaves `work` here to be run in the loop."""

    def __init__(self, inbox: Inbox | None, command: list[str]) -> None:
        self.inbox = inbox
        self.command = command
        self.work: Coroutine[Any, Any, int] | None = None


def _places_of_config(file: str | None) -> list[str]:
    """Return the files that a configuration is looked for in."""
    named = file or os.environ.get(variables.CONFIG)
    return [named] if named else list(FILE_NAMES)


@with_run_options()
def _run(
    session: _Session,
    flags: dict[str, str | None],
    target: OptionalTarget = None,
    module: Module = None,
    arguments: Arguments = None,
    config: ConfigFile = None,
) -> None:
    target = target_of(target, module)
    given = {"target": target, "args": arguments_of(arguments), "command": session.command or None, **flags}
    if target and session.command:
        raise UsageError(f"both a target ({target!r}) and a command after --; expected one of them")
    load = Loader(given, os.environ, file=config)
    loaded = load()
    if loaded.target and loaded.command:
        raise ConfigError("both target and command are configured; expected one of them")
    if not loaded.target and not loaded.command:
        raise UsageError(
            f"nothing to run: expected TARGET ({FORMS}), as in: lastcall run agent.py; or -- CMD ARG…"
        )
    from lastcall.supervisor.app import App
    from lastcall.supervisor.environment import surroundings

    assert session.inbox is not None
    session.work = App(loaded, session.inbox, surroundings(), reread=load).run()


@with_run_options(
    without=frozenset({"workers", "receipt", "log_format"}),
    defaults={**DEV_DEFAULTS, "http": "a free port"},
)
def _dev(
    session: _Session,
    flags: dict[str, str | None],
    target: OptionalTarget = None,
    module: Module = None,
    arguments: Arguments = None,
    env_file: Annotated[
        str | None, Option((), "FILE", "KEY=value lines for the worker, read at each reload.")
    ] = None,
    watch: Watch = None,
    config: ConfigFile = None,
) -> None:
    """Develop: one worker, replaced whenever a source file changes.

    Sources are the Python files that the agent imports, .py and .env* below the directory of the target,
    and the configuration; --watch adds others. A running call finishes on the old code. Without LIVEKIT_URL
    a local LiveKit server is used, which sends each new worker one call in a local room. Ctrl-C drains
    briefly, a second one kills.
    """
    from lastcall.supervisor.cli.dev import dev

    given = {
        "target": needed_target(target, module),
        "args": arguments_of(arguments),
        "env_file": env_file,
        **flags,
    }

    load = Loader(given, os.environ, file=config, defaults=DEV_DEFAULTS)
    assert session.inbox is not None
    session.work = dev(
        session.inbox,
        load,
        directory=working_directory(),
        config_files=_places_of_config(config),
        patterns=[pattern for pattern in watch or [] if pattern],
    )


def _demo(
    session: _Session,
    seconds: Annotated[
        float | None, Option((), "SECONDS", "Stop by itself after that time with a worker.")
    ] = None,
    workers: Annotated[int, Option(("--workers", "-w"), "N", "Workers to run.")] = 2,
    rate: Annotated[float, Option((), "N", "Dispatches a second.")] = 1.0,
) -> None:
    """Show it: local servers, a sample agent, calls flowing. Ctrl-C shows the whole stop.

    The agent takes calls whatever the load of the machine is; a stock one would take none at a high load.
    """
    from lastcall.supervisor.cli.demo import demo

    assert session.inbox is not None
    for option, value, below in (
        ("--workers", workers, math.inf),
        ("--rate", rate, 1000.0),
        ("--seconds", 1.0 if seconds is None else seconds, math.inf),
    ):
        if not 0 < value < below:
            limit = "" if below == math.inf else f" and less than {below:g}"
            raise UsageError(f"{option}: got {value:g}, expected more than 0{limit}")
    session.work = demo(session.inbox, workers=workers, rate=rate, seconds=seconds)


# The verbs that supervise, and the help of the one whose docstring is not for its users.
VERBS: dict[str, Callable[..., None]] = {"run": _run, "dev": _dev, "demo": _demo}


def whole() -> typer.Typer:
    """Return the command line with every verb."""
    from lastcall.supervisor.cli import command_line, deployment, operate, receipts

    app = command_line.new()
    for name, verb in VERBS.items():
        command_line.add(app, name, verb, help=RUN_HELP if verb is _run else None)
    for verbs in (deployment, receipts, operate):
        verbs.add_to(app)
    return app


def read(arguments: list[str], inbox: Inbox | None) -> int | Coroutine[Any, Any, int]:
    """Run one verb and return its exit code, or, for one that supervises, what is to be awaited for it.

    Raises UsageError, ConfigError and NotRunning.
    """
    command: list[str] = []
    arguments = with_arguments(arguments)
    if "--" in arguments:
        # Taken apart here, because click would join both sides and take flags of the command for its flags.
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1 :]
        if not command:
            raise UsageError("no command after --; expected -- CMD ARG…")
    asked_for_nothing = not arguments
    if asked_for_nothing:
        arguments = ["--help"]
    session = _Session(inbox, command)
    verb = VERBS.get(arguments[0])
    values = None if verb is None else plain_words.read(verb, arguments[1:])
    if verb is not None and values is not None:
        verb(session=session, **values)
        code = 0
    else:
        from lastcall.supervisor.cli import command_line

        code = command_line.read(whole(), arguments, session)
    if session.work is not None:
        return session.work
    return 2 if asked_for_nothing else code
