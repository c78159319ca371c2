"""The Kubernetes manifests: a kustomize base, KEDA in place of the HPA, and an overlay for long calls.

The pods need no preStop: no Service stands in front of them, and dispatches come over the worker's own
connection, so a pause before SIGTERM would only let more of them in. The probes ask the supervisor, which
answers /livez while it drains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lastcall.supervisor.deploy.service import Service, Timers, quoted
from lastcall.supervisor.deploy.template import render

# Ours: the longest calls that the overlay is for take 4 hours.
LONG_CALLS = Timers(grace=4 * 3600.0)
# Ours: half of about 25 voice jobs on 4 cores and 8 GiB. The other half is for jobs that come while a pod
# starts.
JOBS_PER_POD = 12
# The resources of the base, in the order in which `kubectl apply` gets them.
BASE = ("deployment.yaml", "pdb.yaml", "hpa.yaml", "networkpolicy.yaml")
WORKERS = """\
            - name: LASTCALL_WORKERS
              value: "{workers}"
"""
CONFIG = """\
            - name: LASTCALL_CONFIG
              value: {file}
"""
PRE_STOP = """\
          lifecycle:
            preStop:
              sleep:
                seconds: {seconds}
"""


def base(service: Service) -> Mapping[str, str]:
    """Return the base's resources by file name.

    They have the grace also when a file sets it, because the kill timer beside it is made for that grace.
    """
    variables = "" if "workers" in service.in_file else WORKERS.format(workers=service.workers)
    if service.config_variable:
        variables += CONFIG.format(file=_escaped(quoted(service.config_variable)))
    pre_stop = service.timers.pre_stop
    values = {
        "quoted_target": _escaped(service.quoted_words),
        "lifecycle": PRE_STOP.format(seconds=pre_stop) if pre_stop else "",
        "jobs_per_pod": str(JOBS_PER_POD),
        "variables": variables,
    }
    return {name: render(f"k8s/base/{name}", service, **values) for name in BASE}


def _escaped(text: str) -> str:
    """Write an argument, or the value of a variable, in which Kubernetes replaces $(NAME), and $$ by $."""
    return text.replace("$", "$$")


def stream(service: Service) -> str:
    """Return the base's resources as one stream, for `kubectl apply -f -`."""
    return service.header + "---\n" + "---\n".join(base(service).values())


def kustomization(service: Service) -> str:
    """Return the base's kustomization."""
    return render("k8s/base/kustomization.yaml", service)


def keda(service: Service) -> Mapping[str, str]:
    """Return the component that puts a KEDA ScaledObject in place of the HPA, by file name.

    Its query sums the jobs of the Deployment's pods over all slots. Draining pods take nothing new, and count
    as pods without jobs.
    """
    names = ("kustomization.yaml", "names.yaml", "scaledobject.yaml")
    return {name: render(f"k8s/keda/{name}", service, jobs_per_pod=str(JOBS_PER_POD)) for name in names}


def long_calls(service: Service) -> Mapping[str, str]:
    """Return the overlay for calls of hours: a longer grace, and scale-downs that are rarer still."""
    names = ("kustomization.yaml", "deployment.yaml", "scaledobject.yaml")
    longer = replace(service, timers=LONG_CALLS)
    return {name: render(f"k8s/long-calls/{name}", longer) for name in names}
