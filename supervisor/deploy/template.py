"""Templates of artefacts: files of this package that read like the artefact, with `{{ placeholders }}`.

The folder templates/ mirrors scripts/deploy/, so that a template lies at the path of its rendered twin. A
placeholder in a line is replaced by its value. A placeholder that fills a line stands for whole lines: its
value is empty, which takes the line away, or ends with a newline.
"""

from __future__ import annotations

import re
from importlib import resources

from lastcall.supervisor.deploy.service import Service, seconds

# The port of `http` inside a container; EXPOSE, containerPort and the probes name it.
PORT = 8080
# The "nonroot" user of distroless images, an id that no user of a host has:
# https://github.com/GoogleContainerTools/distroless/blob/main/common/variables.bzl
USER = 65532

PLACEHOLDER = re.compile(r"^\{\{ (\w+) \}\}\n|\{\{ (\w+) \}\}", re.MULTILINE)


def render(path: str, service: Service, **more: str) -> str:
    """Return a template with the values of a service and more in it. Raises KeyError for an unknown one."""
    timers = service.timers
    values = {
        "header": service.header,
        "name": service.name,
        "image": service.image_or_default,
        "port": str(PORT),
        "user": str(USER),
        "grace": seconds(timers.grace),
        "margin": str(timers.margin),
        "pre_stop": str(timers.pre_stop),
        "kill_after": str(timers.kill_after),
        "pod_kill_after": str(timers.pod_kill_after),
        **more,
    }
    text = resources.files(__package__).joinpath("templates", path).read_text(encoding="utf-8")
    return PLACEHOLDER.sub(lambda found: values[found[1] or found[2]], text)
