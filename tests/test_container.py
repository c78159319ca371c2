"""The shipped Dockerfile under podman and runc: PID 1, non-root, read-only, without capabilities."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from lastcall.worker.local.livekit_server import Dispatched, DispatchServer
from tests.support.containers import ROOT, Container, Podman

pytestmark = pytest.mark.container

DOCKER = ROOT / "examples" / "docker"
# A hundred processes that leave their parent, end, and are then somebody's to reap.
ORPHANS = """
import os, time
for _ in range(100):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.2)
        os._exit(0)
    os.wait()
print("up", flush=True)
time.sleep(600)
"""
STATES = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        print(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0])
    except OSError:
        pass
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    podman = Podman(tmp_path_factory.mktemp("podman"))
    podman.build()
    return podman


@pytest.fixture
def podman(built: Podman) -> Iterator[Podman]:
    """The image is there; the containers of a test are gone after it."""
    try:
        yield built
    finally:
        built.close()


def options(server: DispatchServer, **more: str) -> tuple[str, ...]:
    values = {**server.environment, "JOB_LOG": "/tmp/jobs", **more}
    return tuple(word for name, value in values.items() for word in ("-e", f"{name}={value}"))


async def call(
    container: Container, server: DispatchServer, seconds: float, mode: str = "sleep"
) -> Dispatched:
    """Dispatch a job, when there is a worker, and see it assigned."""
    await container.until(server.available)
    metadata = json.dumps({"sleep": seconds, "mode": mode})
    job = await server.dispatch("room", metadata=metadata)
    assert job.outcome == "assigned", container.logs()
    return job


def hang_up(container: Container) -> None:
    """Let jobs end that were called to hold."""
    container.exec("touch", "/tmp/jobs.go")


async def stop(container: Container, seconds: int) -> int:
    """docker stop -t SECONDS; return the exit code."""
    await asyncio.to_thread(lambda: container.run("stop", "-t", str(seconds), timeout=seconds + 30.0))
    return int(container.state("ExitCode"))


@pytest.mark.timeout(500)
async def test_health_and_a_stop_with_time_enough(podman: Podman) -> None:
    """No server yet, a hold, a crashed worker: a new container would mend none of it, so it is healthy.

    In the stop the job ends by itself and the container exits 0; the health check is content all along.
    """
    async with DispatchServer() as server:
        server.refuse_connections = True
        container = podman.start("enough", options=options(server, LASTCALL_GRACE="40"))

        def status() -> dict[str, Any]:
            document: dict[str, Any] = json.loads(container.exec("lastcall", "status", "--json"))
            return document

        await container.until(lambda: container.events("supervisor started"))
        await container.until(lambda: container.health() == 0)
        assert status()["phase"] == "starting"
        server.refuse_connections = False
        await container.until(server.available)
        await container.until(lambda: status()["phase"] == "running")
        assert container.health() == 0
        container.exec("lastcall", "hold")
        assert status()["held"]
        assert container.health() == 0
        container.exec("lastcall", "release")
        container.exec("kill", "-KILL", str(status()["slots"][0]["pid"]))
        await container.until(lambda: container.events("slot failed"))
        assert container.health() == 0

        job = await call(container, server, 0, "hold")
        assert container.exec("id", "-u").strip() == "65532"
        assert container.exec("cat", "/proc/1/comm").strip() == "lastcall"
        assert "No such file" in podman.run("exec", container.name, "ls", "/app/.env", check=False).stderr
        assert container.health() == 0
        container.run("kill", "--signal", "TERM")  # podman asks a container that it stops itself nothing
        await container.until(lambda: container.events("stop draining"))
        assert container.health() == 0, "a draining container must not be taken for a sick one"
        hang_up(container)
        assert await stop(container, 40) == 0, container.logs()
        receipt = container.receipt()
        assert (receipt["outcome"], receipt["left"]) == ("clean", 0)
        assert server.jobs[job.job_id].status == "JS_SUCCESS"


async def test_stop_with_too_little_time(podman: Podman) -> None:
    """A kill timer below grace ends in 137, whatever anybody does: why units print grace + 30 s."""
    async with DispatchServer() as server:
        container = podman.start("little", options=options(server, LASTCALL_GRACE="40"))
        job = await call(container, server, 60)
        assert await stop(container, 2) == 137
        assert server.jobs[job.job_id].status == "JS_RUNNING" or server.jobs[job.job_id].forgotten


async def test_the_docker_example(podman: Podman) -> None:
    """The agent of examples/docker serves in the image that its Dockerfile makes, and stops clean."""
    async with DispatchServer() as server:
        agent = f"{DOCKER / 'agent.py'}:/app/agent.py:ro"
        container = podman.start("example", options=("-v", agent, *options(server, LASTCALL_GRACE="40")))
        await container.until(lambda: container.events("ready"))
        assert server.counts["registered"] == 1
        assert await stop(container, 40) == 0, container.logs()
        assert container.receipt()["outcome"] == "clean"


async def test_grace_that_fits_below_the_kill_timer(podman: Podman) -> None:
    """A job longer than grace is cut, reported and counted before the container would be killed: 75."""
    async with DispatchServer() as server:
        container = podman.start("fits", options=options(server, LASTCALL_GRACE="8"))
        job = await call(container, server, 60)
        assert await stop(container, 38) == 75, container.logs()
        assert container.receipt()["outcome"] == "cut"
        assert server.jobs[job.job_id].status == "JS_FAILED"


async def test_orphans_are_reaped(podman: Podman) -> None:
    """As PID 1 it reaps a hundred strangers, and any command of the image's can be run opaquely."""
    container = podman.start("orphans", "--", "python", "-c", ORPHANS)
    await container.until(lambda: "up" in container.logs())

    def states() -> list[str]:
        return container.exec("/opt/venv/bin/python", "-c", STATES).split()

    await container.until(lambda: "Z" not in states() and len(states()) < 10)
    assert await stop(container, 20) == 0, container.logs()


async def test_job_over_the_memory_limit_dies_alone(podman: Podman) -> None:
    """The kernel kills the job that is too big; the other one ends well, and so does the container."""
    async with DispatchServer() as server:
        limit = ("--memory", "900m", "--memory-swap", "900m")
        container = podman.start("hungry", options=(*limit, *options(server, LASTCALL_GRACE="40", IDLE="2")))
        good = await call(container, server, 0, "hold")
        bad = await call(container, server, 1, "hungry")
        await container.until(lambda: server.jobs[bad.job_id].status == "JS_FAILED")
        assert server.jobs[good.job_id].status == "JS_RUNNING"
        hang_up(container)
        assert await stop(container, 40) == 0, container.logs()
        assert server.jobs[good.job_id].status == "JS_SUCCESS"
        totals = container.receipt()["totals"]
        assert (totals["failed"], totals["finished"], totals["cut"]) == (1, 1, 0)


async def test_a_hung_supervisor_is_unhealthy(podman: Podman) -> None:
    """The health check asks the supervisor itself, so one that no longer answers is seen."""
    container = podman.start("hung", "--", "sleep", "infinity")
    await container.until(lambda: container.health() == 0)
    asked = podman.run("exec", container.name, "lastcall", "doctor", "--json", check=False).stdout
    verdicts = {each["check"]: (each["verdict"], each["why"]) for each in json.loads(asked)["findings"]}
    assert verdicts["kill timer"][0] == "warn" and "the container runtime kills" in verdicts["kill timer"][1]
    assert verdicts["pid 1"] == ("ok", "lastcall is PID 1: it gets the signal itself and reaps orphans")
    container.run("kill", "--signal", "STOP")
    assert await asyncio.to_thread(container.health) != 0
    container.run("kill", "--signal", "CONT")
    await container.until(lambda: container.health() == 0)
    assert await stop(container, 20) == 0, container.logs()


async def test_wrong_target_in_a_container(podman: Podman) -> None:
    """Exit code 78, which an orchestrator shows as a crash loop and nobody takes for a clean end."""
    container = podman.start("wrong", "nobody.py")
    await container.until(lambda: container.state("Status") == "exited")
    assert container.state("ExitCode") == "78"
    assert "nobody.py" in container.logs()
