"""The systemd unit, for 252 and newer, and its drop-ins for newer ones.

Left out on purpose: Delegate (lastcall makes no cgroups), MemoryDenyWriteExecute (ONNX and cffi
write code), ProcSubset=pid (the load is read from /proc), MemoryMax and CPUQuota (the machine's business).
"""

from __future__ import annotations

import posixpath

from lastcall.supervisor.deploy.service import (
    HIDDEN_BY_PRIVATE_TMP,
    HIDDEN_BY_PROTECT_HOME,
    REST_OF_SHUTDOWN,
    Service,
    is_below,
    seconds,
)
from lastcall.supervisor.deploy.template import render
from lastcall.supervisor.errors import UsageError
from lastcall.worker.base import target_form

# The file names of the drop-ins; their numbers say the order in which systemd reads them.
RELOAD = "10-notify-reload.conf"
RESTART = "20-restart-steps.conf"
# The same for the targets of a shutdown. poweroff.target stands for all.
SHUTDOWN = "poweroff.target.d/10-lastcall.conf"
# A port can be had by one service of a machine only, and machines run several. A variable, and not --http,
# because EnvironmentFile wins over it.
HTTP_OFF = """\
# Probes and metrics need a port for each service of the machine: LASTCALL_HTTP=127.0.0.1:8080 in that file.
Environment=LASTCALL_HTTP=off
"""


def unit(service: Service) -> str:
    """Return the unit file. Raises UsageError for a program or target that the unit could not see."""
    for path in filter(
        None, (service.program, service.target_file or service.directory, service.config_file)
    ):
        if is_below(path, HIDDEN_BY_PRIVATE_TMP):
            raise UsageError(
                f"{path} is in a directory for temporary files, which the unit's PrivateTmp hides; move it"
            )
    name, timers = service.name, service.timers
    target = service.target_file + _attribute(service) if service.target_file else service.target
    options = {
        "workers": str(service.workers),
        "grace": seconds(timers.grace),
        "control": f"/run/{name}/control.sock",
        "receipt": f"/var/lib/{name}/receipt.json",
    }
    words = [service.program, "run", *target_form.words(target)]
    words += [
        w
        for option, value in options.items()
        if option not in service.in_file
        for w in (f"--{option}", value)
    ]
    words += ["--config", service.config_file] if service.config_file else []
    program, *rest = [*words, *target_form.tail(service.arguments)]
    # In the path of the program systemd replaces no variables, and two dollar signs stay two.
    command = " ".join([quote(program).replace("$$", "$"), *map(quote, rest)])
    # Paths in a configuration file are from the directory of the start, which is the one of this command.
    beside_target = "" if service.config_file else posixpath.dirname(service.target_file)
    directory = beside_target or service.directory
    return render(
        "lastcall.service",
        service,
        target=plain(service.target),
        command=command,
        control=plain(service.control or options["control"]),
        directory=plain(directory),
        http="" if "http" in service.in_file else HTTP_OFF,
        start_timeout=str(service.start_timeout),
        protect_home=_protect_home(service),
    )


def reload_drop_in(service: Service) -> str:
    """Return the drop-in for systemd 253 and newer: `systemctl reload` returns when the reload is done."""
    return render(f"lastcall.service.d/{RELOAD}", service)


def restart_drop_in(service: Service) -> str:
    """Return the drop-in for systemd 254 and newer: restarts come slower the more there were."""
    return render(f"lastcall.service.d/{RESTART}", service)


def shutdown_drop_in(service: Service) -> str:
    """Return the drop-in for the targets of a shutdown: the machine waits as long as a stop may take."""
    return render(
        SHUTDOWN,
        service,
        shutdown_after=str(service.timers.shutdown_after),
        rest_of_shutdown=str(REST_OF_SHUTDOWN),
    )


def quote(word: str) -> str:
    """Write one argument of a command line as systemd reads it back."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$").replace("%", "%%")
    return f'"{escaped}"' if not word or set(word) & set(" \t\"'\\;") else escaped


def plain(text: str) -> str:
    """Write a value that is no command line: only the specifiers need care."""
    return text.replace("%", "%%")


def _attribute(service: Service) -> str:
    attribute = service.form.attribute
    return f":{attribute}" if attribute else ""


def _protect_home(service: Service) -> str:
    paths = (service.program, service.target_file, service.directory, service.config_file)
    return "read-only" if any(is_below(path, HIDDEN_BY_PROTECT_HOME) for path in paths if path) else "yes"
