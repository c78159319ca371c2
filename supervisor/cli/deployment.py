"""The verbs about where lastcall runs: `unit`, `doctor` and `rehearse`."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from lastcall.supervisor.cli import command_line, page_file
from lastcall.supervisor.cli.parameters import (
    Arguments,
    ConfigFile,
    Module,
    OptionalTarget,
    arguments_of,
    help_of,
    needed_target,
    target_of,
    with_run_options,
)
from lastcall.supervisor.cli.plain_text import show
from lastcall.supervisor.cli.progress import Progress
from lastcall.supervisor.config.loading import Loader
from lastcall.supervisor.config.options import Config
from lastcall.supervisor.config.paths import working_directory
from lastcall.supervisor.errors import UsageError
from lastcall.worker.base.target_form import tail, words
from lastcall.worker.base.variables import CONFIG

KINDS = ("systemd", "poweroff", "docker", "compose", "k8s")
IMAGES = ("docker", "compose", "k8s")  # run in an image, which has the files of the build's directory
# The users that DynamicUser makes: https://systemd.io/UIDS-GIDS/
DYNAMIC_IDS = range(61184, 65520)


def add_to(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    command_line.add(app, "unit", _unit)
    command_line.add(app, "doctor", _doctor)
    command_line.add(app, "rehearse", _rehearse)


def _unit(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="systemd, poweroff (its drop-in), docker, compose or k8s.",
            autocompletion=lambda: KINDS,
        ),
    ],
    target: OptionalTarget = None,
    module: Module = None,
    arguments: Arguments = None,
    grace: Annotated[float | None, typer.Option(metavar="SECONDS", help=help_of("grace"))] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", metavar="N", help=help_of("workers"))
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the service.  [lastcall]")] = None,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="In compose and k8s.  [NAME:latest]")
    ] = None,
    program: Annotated[
        str | None,
        typer.Option("--exec", metavar="PATH", help="For systemd: the lastcall to start.  [this one]"),
    ] = None,
) -> None:
    """Print files for a platform, with kill timers that fit the grace."""
    from lastcall.supervisor.deploy import docker, k8s, systemd
    from lastcall.supervisor.deploy.service import Service, Timers, seconds

    if kind not in KINDS:
        raise UsageError(f"{kind!r} is no kind of unit: expected {', '.join(KINDS)}")
    # The file of this directory, as `run` would find it here. Variables of this shell are none of the unit.
    named = {name: os.environ[name] for name in (CONFIG,) if os.environ.get(name)}
    loader = Loader({}, named, for_elsewhere=True)
    config = loader()
    target = target_of(target, module) or needed_target(config.target or None, None)
    own = arguments_of(arguments) or []
    if image is not None and kind not in ("compose", "k8s"):
        raise UsageError(f"--image: {kind} names no image; leave it out")
    if program is not None and kind != "systemd":
        raise UsageError(f"--exec: {kind} starts what is in the image; leave it out")
    if kind == "systemd" and name is not None:
        _check_unused(name)
    options = {"--grace": None if grace is None else seconds(grace) if grace < float("inf") else "inf"}
    options |= {"--workers": workers, "--name": name, "--image": image, "--exec": program}  # type: ignore[dict-item]
    given = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    if kind == "docker" and (os.path.isabs(target) or ".." in Path(target).parts):
        raise UsageError(f"{target!r} would not be in the image; expected a path below the build's directory")
    flags = {"grace": grace, "workers": workers, "control": None, "receipt": None, "http": None}
    in_file = {option for option, flag in flags.items() if flag is None and _is_set(config, option)}
    config_file = os.path.abspath(loader.path) if loader.path and config.given else ""
    place = _place_in_image(config_file) if config_file else ""
    is_missing = kind in IMAGES and bool(config_file) and not place
    if is_missing:
        in_file = set()
    service = Service(
        target=target,
        arguments=tuple(own),
        name=name or "lastcall",
        image=image or "",
        program=_program(program) if kind == "systemd" else "lastcall",
        directory=str(working_directory()),
        workers=config.workers if workers is None else workers,
        timers=Timers(grace=config.grace if grace is None else grace, shares=config.shares),
        start=config.start,
        config_file=config_file,
        config_variable=place if named or place != str(loader.path) else "",
        in_file=frozenset(in_file),
        control=config.control if "control" in in_file else "",
        printed_by=" ".join(
            [
                *(f"{name}={shlex.quote(value)}" for name, value in named.items()),
                shlex.join(["lastcall", "unit", kind, *words(target), *given, *tail(own)]),
            ]
        ),
    )
    render = {
        "systemd": systemd.unit,
        "poweroff": systemd.shutdown_drop_in,
        "docker": docker.dockerfile,
        "compose": docker.compose,
        "k8s": k8s.stream,
    }
    print(render[kind](service), end="")
    if is_missing:
        print(
            f"lastcall: the image does not have {config_file}: of its options only target, args, grace and"
            f" workers count there. Put it below {working_directory()} for the others.",
            file=sys.stderr,
        )
    if service.timers.warning:
        print(f"lastcall: {service.timers.warning}", file=sys.stderr)


def _place_in_image(file: str) -> str:
    """Return the path of a file from the build's directory; empty for a file outside, which no image has."""
    place = os.path.relpath(os.path.realpath(file), os.path.realpath(working_directory()))
    return "" if place.split(os.sep)[0] == os.pardir else place


def _is_set(config: Config, option: str) -> bool:
    """Tell whether a configuration sets an option to a value that has a meaning in a unit."""
    return option in config.given and getattr(config, option) not in ("", "auto")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have a signal end a verb that blocks, after what it started has been taken down.

    Not add_signal_handler: there is no loop here, and the signal is to interrupt what blocks. By default
    SIGTERM would leave a supervisor behind.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as error:
        raise typer.Exit(int(error.code or 0)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_unused(name: str) -> None:
    """Refuse a name that a system user or group has: DynamicUser would run the unit as that user.

    A running unit's own user is there too, under a number of the range that systemd gives to such users.
    """
    numbers: dict[str, int] = {}
    with contextlib.suppress(KeyError):
        numbers["user"] = pwd.getpwnam(name).pw_uid
    with contextlib.suppress(KeyError):
        numbers["group"] = grp.getgrnam(name).gr_gid
    for kind, number in numbers.items():
        if number not in DYNAMIC_IDS:
            raise UsageError(
                f"--name: got {name!r}, the name of a {kind} of this system, and the unit would run as that"
                f" {kind}; expected another name"
            )


def _program(given: str | None) -> str:
    """Return the absolute path of the lastcall that the unit starts."""
    if given is not None:
        if not os.path.isabs(given) or "\n" in given:
            raise UsageError(f"--exec: got {given!r}, expected the absolute path of a lastcall")
        return given
    beside = Path(sys.executable).parent / "lastcall"
    found = str(beside) if beside.is_file() else shutil.which("lastcall")
    if found is None:
        raise UsageError("--exec: no lastcall beside this Python or in PATH; give its absolute path")
    return os.path.abspath(found)


def _rehearse(
    target: OptionalTarget = None,
    module: Module = None,
    arguments: Arguments = None,
    workers: Annotated[int, typer.Option("--workers", "-w", metavar="N", help="Workers to stop.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
    junit: Annotated[str | None, typer.Option(metavar="FILE", help="Write JUnit XML as well.")] = None,
    html: page_file.PageFile = None,
) -> int:
    """Stop your agent as each platform would while jobs run.

    The exit code is 1 when a job was cut or anything is left.

    Jobs run in rooms of a local server, each with a caller, and are held open for the drill; nothing beyond
    this machine is reached as long as the agent takes LIVEKIT_URL from the environment.
    """
    from lastcall.supervisor.rehearsal import drill_report
    from lastcall.supervisor.rehearsal.play import rehearse

    target = needed_target(target, module)
    if not 1 <= workers <= 16:
        raise UsageError(f"--workers: got {workers}, expected 1 to 16")
    if as_json and html == page_file.STANDARD_OUTPUT:
        raise UsageError("both --json and --html - write to standard output; expected a file for the page")
    page_file.checked(junit, "--junit")
    page_file.checked(html)
    verdicts = []
    with _interruptible(), Progress(is_quiet=as_json) as progress:
        for verdict in rehearse(target, arguments_of(arguments) or (), workers=workers, tell=progress):
            verdicts.append(verdict)
            progress.clear()
            if not as_json and html != page_file.STANDARD_OUTPUT:
                show(drill_report.line(verdict), indent=10)
    if as_json:
        print(json.dumps(drill_report.document(target, verdicts), indent=2))
    if junit is not None:
        page_file.write(junit, drill_report.junit(target, verdicts), "--junit")
    if html is not None:
        from lastcall.supervisor.cli import drill_page
        from lastcall.supervisor.picture.page import page

        title = f"Rehearsal of {target}"
        page_file.write(html, page(title, [drill_page.section(verdict) for verdict in verdicts]))
    return 0 if all(verdict.is_good for verdict in verdicts) else 1


@with_run_options(without=frozenset({"log_format"}))
def _doctor(
    flags: dict[str, str | None],
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="A worker of it is started, looked at and stopped.")
    ] = None,
    module: Module = None,
    arguments: Arguments = None,
    config: ConfigFile = None,
    unit: Annotated[
        str | None, typer.Option(metavar="NAME", help="systemd unit to look at.  [the one doctor runs in]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> int:
    """Look for what would cut calls here, and say what to do about it.

    The exit code is 1 on a fail.
    """
    # All of it before a signal is an exception: one that comes in the middle of an import may be swallowed.
    from lastcall.supervisor.doctor import report
    from lastcall.supervisor.doctor.checks import examine
    from lastcall.supervisor.doctor.gather import gather

    given = {"target": target_of(target, module), "args": arguments_of(arguments), **flags}
    with _interruptible(), Progress(is_quiet=as_json) as progress:
        facts = gather(given, config_file=config, unit=unit, tell=progress)
        findings = examine(facts)
    names = facts.names or ()
    document = report.document(findings, names)
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        show("\n".join(map(report.line, findings)), indent=report.INDENT)
        if names:
            show(report.table(names), indent=report.INDENT)
    return 0 if document["ok"] else 1
