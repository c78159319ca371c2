"""The Dockerfile and the compose file."""

from __future__ import annotations

import json

from lastcall.supervisor.deploy.service import Service, seconds

PORT = 8080
USER = 65532

IGNORED = """\
# Secrets and what a checkout collects stay out of the image.
.env
.env.*
.git
.venv
**/__pycache__
**/*.pyc
"""


def dockerfile(service: Service) -> str:
    """Return a Dockerfile for a directory with requirements.txt, which names lastcall, and the agent."""
    timers = service.timers
    return f"""{service.header}\
# Build context: the agent's directory with a requirements.txt that pins everything and names lastcall.
# For a build that can be repeated, pin the base: --build-arg BASE=python:3.13-slim@sha256:...
# Stop it by docker stop -t {timers.kill_after}: grace + {timers.margin} s. The default of 10 s cuts calls.
ARG BASE=python:3.13-slim

FROM ${{BASE}} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
WORKDIR /app
COPY requirements.txt ./
# The whole context is there for this one step, for requirements that are files of it.
RUN --mount=type=bind,target=/app /opt/venv/bin/pip install -r requirements.txt
COPY . .
# Models are downloaded here and not at the start:
# RUN /opt/venv/bin/python agent.py download-files
# Compiled here, because the file system is read-only later.
RUN python -m compileall -q /app && /opt/venv/bin/python -m compileall -q /opt/venv

FROM ${{BASE}}
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
ENV PATH=/opt/venv/bin:$PATH \\
    HOME=/tmp \\
    PYTHONUNBUFFERED=1 \\
    PYTHONDONTWRITEBYTECODE=1 \\
    LASTCALL_GRACE={seconds(timers.grace)} \\
    LASTCALL_WORKERS={service.workers}
WORKDIR /app
# In numbers, so that Kubernetes can see that it is not root.
USER {USER}:{USER}
EXPOSE {PORT}
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 CMD ["lastcall", "status"]
# It reaps orphans itself: neither tini nor --init is needed, and neither does harm.
ENTRYPOINT ["lastcall-entrypoint"]
CMD [{json.dumps(service.target)}]
"""


def compose(service: Service) -> str:
    """Return a compose file for one host."""
    timers = service.timers
    return f"""{service.header}\
name: {json.dumps(service.name)}
services:
  agent:
    image: {json.dumps(service.image_or_default)}
    build: .
    command: [{json.dumps(service.target.replace("$", "$$"))}]
    # grace + {timers.margin} s; the default of 10 s cuts calls.
    stop_grace_period: {timers.kill_after}s
    stop_signal: SIGTERM
    init: false
    restart: unless-stopped
    read_only: true
    tmpfs:
      - /tmp
    cap_drop:
      - ALL
    security_opt:
      - no-new-privileges:true
    # About 25 voice jobs.
    cpus: 4
    mem_limit: 8g
    memswap_limit: 8g
    env_file:
      - .env
    environment:
      LASTCALL_GRACE: "{seconds(timers.grace)}"
      LASTCALL_PLATFORM_GRACE: "{timers.kill_after}"
      LASTCALL_WORKERS: "{service.workers}"
      LASTCALL_HTTP: "0.0.0.0:{PORT}"
    healthcheck:
      test: ["CMD", "lastcall", "status"]
      interval: 30s
      timeout: 10s
      start_period: 30s
      retries: 3
    logging:
      options:
        max-size: 50m
        max-file: "5"
    deploy:
      update_config:
        order: start-first
"""
