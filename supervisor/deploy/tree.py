"""The files that the project ships under scripts/deploy, each with the text that it has to have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lastcall.supervisor.deploy import docker, k8s, systemd
from lastcall.supervisor.deploy.service import Service, Timers, seconds

PROGRAM = "/opt/agent/.venv/bin/lastcall"
TARGET = "/opt/agent/agent.py"
# Cloud autoscalers give a node 10 minutes: the base fits into that, the overlay asks for more.
POD_GRACE = 540.0
# These stand beside them and have no timers to agree on.
BY_HAND = frozenset({"alerts.yaml", "grafana.json"})


def shipped() -> Mapping[str, str]:
    """Return the text of each shipped file by its path."""
    host = Service(
        target=TARGET,
        program=PROGRAM,
        printed_by=f"lastcall unit systemd {TARGET} --exec {PROGRAM}",
    )
    shutdown = replace(host, printed_by=f"lastcall unit poweroff {TARGET}")
    image = {kind: _in_image(kind) for kind in ("docker", "compose")}
    printed_by = f"lastcall unit k8s agent.py --grace {seconds(POD_GRACE)}"
    pods = Service(target="agent.py", timers=Timers(grace=POD_GRACE), printed_by=printed_by)
    return {
        "lastcall.service": systemd.unit(host),
        f"lastcall.service.d/{systemd.RELOAD}": systemd.reload_drop_in(host),
        f"lastcall.service.d/{systemd.RESTART}": systemd.restart_drop_in(host),
        systemd.SHUTDOWN: systemd.shutdown_drop_in(shutdown),
        "Dockerfile": docker.dockerfile(image["docker"]),
        ".dockerignore": docker.dockerignore(image["docker"]),
        "compose.yaml": docker.compose(image["compose"]),
        "k8s/base/kustomization.yaml": k8s.kustomization(pods),
        **{f"k8s/base/{name}": text for name, text in k8s.base(pods).items()},
        **{f"k8s/keda/{name}": text for name, text in k8s.keda(pods).items()},
        **{f"k8s/long-calls/{name}": text for name, text in k8s.long_calls(pods).items()},
    }


def _in_image(kind: str) -> Service:
    return Service(target="agent.py", printed_by=f"lastcall unit {kind} agent.py")
