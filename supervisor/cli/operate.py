"""The verbs that talk to a running supervisor."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lastcall.supervisor.cli import plain_words
from lastcall.supervisor.cli.asking import job_words, slot_words, socket_of
from lastcall.supervisor.cli.plain_text import waits_for
from lastcall.supervisor.cli.plain_words import Argument, Option
from lastcall.supervisor.errors import NotRunning, Refused
from lastcall.supervisor.views import control_socket
from lastcall.worker.base.plurals import counted

if TYPE_CHECKING:
    import typer

# Seconds between two questions to the supervisor. Ours: for eyes, and for scripts that wait.
REFRESH_INTERVAL = 0.5
POLL_INTERVAL = 0.1
# Seconds after which a verb that waits says so again. Ours: a person looks up, and a log stays short.
SAY_AGAIN_EVERY = 10.0

Control = Annotated[str, Option(("--control",), "PATH", "Control socket of the supervisor.")]
Wait = Annotated[bool, Option(("--wait",), help="Return when it is done; non-zero if it failed.")]
HandOver = Annotated[
    bool, Option(("--handover",), help="Have the calls of old workers go on in new ones, where possible.")
]


def add_to(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    from lastcall.supervisor.cli import command_line

    for name, verb in VERBS.items():
        command_line.add(app, name, verb)


def knows(arguments: list[str]) -> bool:
    """Tell whether the arguments are those of one of these verbs, without words that `run` takes apart."""
    return arguments[:1] != [] and arguments[0] in VERBS and not {"--", "--args"}.intersection(arguments)


def read(arguments: list[str]) -> int:
    """Run one of the verbs and return its exit code, without the imports of other verbs.

    Raises UsageError, NotRunning and Refused.
    """
    verb = VERBS[arguments[0]]
    values = plain_words.read(verb, arguments[1:])
    if values is not None:
        verb(**values)
        return 0
    from lastcall.supervisor.cli import command_line

    app = command_line.new()
    command_line.add(app, arguments[0], verb)  # typer takes milliseconds for each
    return command_line.read(app, arguments, None)


def _status(
    control: Control = "auto",
    as_json: Annotated[bool, Option(("--json",), help="The whole document as JSON.")] = False,
    watch: Annotated[bool, Option(("--watch",), help="Go on showing it, until Ctrl-C.")] = False,
) -> None:
    """Show what a running supervisor does."""
    path = socket_of(control)
    if watch:
        _watch(path, as_json)
        return
    document = control_socket.ask(path, "status")
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        from rich.console import Console

        from lastcall.supervisor.cli.tables import status_table

        Console().print(status_table(document))


def _watch(path: Path, as_json: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from lastcall.supervisor.cli.tables import status_table

    console = Console()
    document = control_socket.ask(path, "status")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the cursor is to come back
    try:
        if as_json or not console.is_terminal:
            while True:
                print(json.dumps(document), flush=True)
                time.sleep(REFRESH_INTERVAL)
                document = control_socket.ask(path, "status")
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                # One row is left for the cursor: a picture of the full height would scroll at each change.
                live.update(status_table(document, height=console.height - 1), refresh=True)
                time.sleep(REFRESH_INTERVAL)
                document = control_socket.ask(path, "status")
    except KeyboardInterrupt:
        return
    except NotRunning:
        console.print("the supervisor has ended")


def _drain(
    control: Control = "auto",
    wait: Annotated[
        bool, Option(("--wait",), help="Return when it is over; the receipt says how it went.")
    ] = False,
) -> None:
    """Stop: as SIGTERM does."""
    path = socket_of(control)
    control_socket.ask(path, "drain")
    if not wait:
        return
    said, say_again_at = "", 0.0
    while True:
        try:
            document = control_socket.ask(path, "status")
        except NotRunning:
            print("stopped; the receipt says how it went")
            return
        jobs = sum(len(slot["jobs"]) for slot in document["slots"])
        text = f"{document['phase']}: {counted(jobs, 'job')}"
        if text != said or time.monotonic() >= say_again_at:
            said, say_again_at = text, time.monotonic() + SAY_AGAIN_EVERY
            print(f"{text}, {document['grace_left_s'] or 0:.0f} s left", flush=True)
        time.sleep(POLL_INTERVAL)


def _hold(control: Control = "auto") -> None:
    """Accept no new jobs until released; running ones go on."""
    control_socket.ask(socket_of(control), "hold")


def _release(control: Control = "auto") -> None:
    """End a hold."""
    control_socket.ask(socket_of(control), "release")


def _reload(control: Control = "auto", wait: Wait = False, handover: HandOver = False) -> None:
    """Roll to the code and configuration that are there now.

    A new worker is started beside each old one, which drains only when the new one has registered and is
    warm. One that does not become ready is taken down, and the old one keeps serving.
    """
    _operate(socket_of(control), wait, "reload", **({"handover": True} if handover else {}))


def _recycle(
    slot: Annotated[int, Argument("SLOT", "The number of the slot.", completion=slot_words)],
    control: Control = "auto",
    wait: Wait = False,
    handover: HandOver = False,
) -> None:
    """Replace the worker of one slot, without a gap."""
    more = {"handover": True} if handover else {}
    _operate(socket_of(control), wait, "recycle", slot=slot, **more)


def _handover(
    job: Annotated[
        str,
        Argument("JOB", "The id of the job, as in lastcall status --json.", completion=job_words),
    ],
    control: Control = "auto",
    wait: Wait = False,
) -> None:
    """Have a call go on in another job, with its state.

    The agent has to keep its state by lastcall.call. The caller stays in the room, and the two agents never
    speak at a time. If nobody takes the call it stays where it is.
    """
    _operate(socket_of(control), wait, "handover", job=job)


def _scale(
    workers: Annotated[int, Argument("N", help="How many workers there shall be.")],
    control: Control = "auto",
    wait: Wait = False,
) -> None:
    """Have N workers: start more, or drain the least busy."""
    _operate(socket_of(control), wait, "scale", workers=workers)


def _dump(
    slot: Annotated[int | None, Argument("SLOT", "Only this slot.", completion=slot_words)] = None,
    control: Control = "auto",
) -> None:
    """Have workers write where their main thread is."""
    answer = control_socket.ask(socket_of(control), "dump", **({} if slot is None else {"slot": slot}))
    print("written to standard error by slot " + ", ".join(map(str, answer["slots"])))


def _operate(path: Path, wait: bool, verb: str, **arguments: Any) -> None:
    operation = control_socket.ask(path, verb, **arguments)
    if not wait:
        print(f"{verb} has begun, operation {operation['id']}; lastcall status shows it")
        return
    said, say_again_at = -1, 0.0
    while operation["state"] == "running":
        if operation["done"] != said or time.monotonic() >= say_again_at:
            is_new, said = operation["done"] != said, operation["done"]
            say_again_at = time.monotonic() + SAY_AGAIN_EVERY
            waits = "" if is_new else waits_for(control_socket.ask(path, "status"))
            print(f"{verb}: {said} of {operation['of']} done{waits and f'; waits for {waits}'}", flush=True)
        time.sleep(POLL_INTERVAL)
        operation = control_socket.ask(path, "operation", id=operation["id"])
    if waiting := operation.get("at_next_restart"):
        print(f"{verb}: takes effect at the next restart: {', '.join(waiting)}", flush=True)
    if operation["state"] == "failed":
        raise Refused(f"{verb} failed: {operation['reason']}")
    print(f"{verb}: {operation['done']} of {operation['of']} done", flush=True)


VERBS: dict[str, Callable[..., None]] = {
    "status": _status,
    "drain": _drain,
    "hold": _hold,
    "release": _release,
    "reload": _reload,
    "recycle": _recycle,
    "handover": _handover,
    "scale": _scale,
    "dump": _dump,
}
