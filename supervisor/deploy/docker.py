"""The Dockerfile and the compose file."""

from __future__ import annotations

from lastcall.supervisor.deploy.service import Service, quoted, seconds
from lastcall.supervisor.deploy.template import render


def dockerfile(service: Service) -> str:
    """Return a Dockerfile for a directory with requirements.txt, which names lastcall, and the agent."""
    options = {"grace": seconds(service.timers.grace), "workers": str(service.workers)}
    # The image holds the file of `in_file`, and nothing beside these variables depends on their values.
    variables = "".join(
        f"ENV LASTCALL_{option.upper()}={value}\n"
        for option, value in options.items()
        if option not in service.in_file
    )
    if service.config_variable:
        variables += f"ENV LASTCALL_CONFIG={_quoted_in_dockerfile(service.config_variable)}\n"
    return render("Dockerfile", service, quoted_target=service.quoted_words, options=variables)


def dockerignore(service: Service) -> str:
    """Return the list of files that the build does not see."""
    return render(".dockerignore", service)


def compose(service: Service) -> str:
    """Return a compose file for one host.

    It has the grace also when a file sets it, because the kill timer beside it is made for that grace.
    """
    # compose reads a dollar sign as the start of a variable, and two of them as one dollar sign.
    variables = "" if "workers" in service.in_file else f'      LASTCALL_WORKERS: "{service.workers}"\n'
    if service.config_variable:
        variables += f"      LASTCALL_CONFIG: {quoted(service.config_variable).replace('$', '$$')}\n"
    quoted_target = service.quoted_words.replace("$", "$$")
    return render("compose.yaml", service, quoted_target=quoted_target, variables=variables)


def _quoted_in_dockerfile(value: str) -> str:
    """Quote a value of ENV, in which `\\` escapes and `$` begins a variable."""
    return '"' + "".join("\\" + each if each in '\\"$' else each for each in value) + '"'
