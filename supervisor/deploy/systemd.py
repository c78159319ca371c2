"""The systemd unit, for 252 and newer, and its drop-ins for newer ones.

Left out on purpose: Delegate (there are no cgroups of our own to make), MemoryDenyWriteExecute (ONNX and cffi
write code), ProcSubset=pid (the load is read from /proc), MemoryMax and CPUQuota (the machine's business).
"""

from __future__ import annotations

import posixpath

from lastcall.supervisor.deploy.service import HIDDEN, HOMES, Service, is_below, seconds
from lastcall.supervisor.errors import UsageError

RELOAD = "10-notify-reload.conf"
RESTART = "20-restart-steps.conf"


def unit(service: Service) -> str:
    """Return the unit file. Raises UsageError for a program or target that the unit could not see."""
    for path in (service.program, service.target_file or service.directory):
        if is_below(path, HIDDEN):
            raise UsageError(
                f"{path} is in a directory for temporary files, which the unit's PrivateTmp hides; move it"
            )
    name, timers = service.name, service.timers
    command = " ".join(
        quote(word)
        for word in (
            service.program,
            "run",
            service.target_file + _attribute(service) if service.target_file else service.target,
            *("--workers", str(service.workers)),
            *("--grace", seconds(timers.grace)),
            *("--control", f"/run/{name}/control.sock"),
            *("--receipt", f"/var/lib/{name}/receipt.json"),
        )
    )
    directory = posixpath.dirname(service.target_file) or service.directory
    return f"""{service.header}\
# Secrets: KEY=value lines in /etc/lastcall/{name}.env, mode 0600, read by systemd itself.
# Look at it: lastcall status --control /run/{name}/control.sock

[Unit]
Description=LiveKit agent workers under lastcall ({plain(service.target)})
Wants=network-online.target
After=network-online.target
# Restart as long as it takes: lastcall backs off by itself, and exit code 78 is the one that won't mend.
StartLimitIntervalSec=0

[Service]
# Started means registered with the LiveKit server; reload is SIGHUP.
Type=notify
NotifyAccess=main
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
WorkingDirectory={plain(directory)}
EnvironmentFile=-/etc/lastcall/{name}.env
Environment=HOME=/var/lib/{name} PYTHONUNBUFFERED=1

# grace + {timers.margin} s. SIGTERM goes to the supervisor alone, SIGKILL to whatever is left at the end.
TimeoutStopSec={timers.kill_after}
TimeoutStartSec={service.start_timeout}
KillMode=mixed
KillSignal=SIGTERM
SendSIGKILL=yes
WatchdogSec=30
Restart=always
RestartSec=2
RestartPreventExitStatus=78
# One job over its limit must not take the others along.
OOMPolicy=continue

LimitNOFILE=65536
TasksMax=16384
DynamicUser=yes
RuntimeDirectory={name}
StateDirectory={name}
CacheDirectory={name}
UMask=0077

NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome={_protect_home(service)}
PrivateTmp=yes
# Take this one away for a GPU.
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
ProtectProc=invisible
# AF_NETLINK: WebRTC lists the network interfaces.
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def reload_drop_in(service: Service) -> str:
    """Return the drop-in for systemd 253 and newer: `systemctl reload` returns when the reload is done."""
    return f"""\
# systemd 253 and newer; older ones would take the type for simple and not wait for the start.
# Install as /etc/systemd/system/{service.name}.service.d/{RELOAD}
[Service]
Type=notify-reload
ExecReload=
"""


def restart_drop_in(service: Service) -> str:
    """Return the drop-in for systemd 254 and newer: restarts come slower the more there were."""
    return f"""\
# systemd 254 and newer; older ones do not know these keys.
# Install as /etc/systemd/system/{service.name}.service.d/{RESTART}
[Service]
RestartSteps=5
RestartMaxDelaySec=60
"""


def quote(word: str) -> str:
    """Write one argument of a command line as systemd reads it back."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$").replace("%", "%%")
    return f'"{escaped}"' if not word or set(word) & set(" \t\"'\\;") else escaped


def plain(text: str) -> str:
    """Write a value that is no command line: only the specifiers need care."""
    return text.replace("%", "%%")


def _attribute(service: Service) -> str:
    _, colon, attribute = service.target.partition(":")
    return colon + attribute


def _protect_home(service: Service) -> str:
    paths = (service.program, service.target_file, service.directory)
    return "read-only" if any(is_below(path, HOMES) for path in paths if path) else "yes"
