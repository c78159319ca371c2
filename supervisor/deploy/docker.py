"""The Dockerfile and the compose file."""

from __future__ import annotations

from lastcall.supervisor.deploy.service import Service
from lastcall.supervisor.deploy.template import render


def dockerfile(service: Service) -> str:
    """Return a Dockerfile for a directory with requirements.txt, which names lastcall, and the agent."""
    return render("Dockerfile", service, quoted_target=service.quoted_words)


def dockerignore(service: Service) -> str:
    """Return the list of files that the build does not see."""
    return render(".dockerignore", service)


def compose(service: Service) -> str:
    """Return a compose file for one host."""
    # compose reads a dollar sign as the start of a variable, and two of them as one dollar sign.
    return render("compose.yaml", service, quoted_target=service.quoted_words.replace("$", "$$"))
