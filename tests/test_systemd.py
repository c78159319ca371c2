"""The printed unit under a real systemd, old and new, driven by the systemctl of the same version."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lastcall.supervisor.deploy import systemd
from lastcall.supervisor.deploy.service import Service
from lastcall.worker.local.livekit_server import Dispatched, DispatchServer
from tests.support.left_out import SUITES
from tests.support.machine import LASTCALL, Machine, Unit

pytestmark = pytest.mark.systemd

AGENT = "/srv/agents/calls.py"
EXAMPLE = Path(__file__).parent.parent / "examples" / "systemd"
SHUTDOWN = "/etc/systemd/system/poweroff.target.d"
START = 60.0


@pytest.fixture(scope="module", params=SUITES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Each test runs on systemd 257 and on 252, in one boot of each."""
    with Machine(request.param) as booted:
        yield booted


def service(machine: Machine, name: str, server: DispatchServer, **settings: str) -> Unit:
    """Install a livekit service with a grace of 40 s."""
    unit = Unit(machine, name, AGENT, "--grace", "40", **settings)
    unit.environment({**server.environment, **extra(name)})
    return unit


def extra(name: str) -> dict[str, str]:
    """Return variables of a service: what conftest.py sets for other processes, and the log of the jobs."""
    return {
        "JOB_LOG": f"/var/lib/{name}/jobs",
        "LIVEKIT_AGENTS_PRELOAD_LOCAL_INFERENCE": "0",
        "SSL_CERT_FILE": "/srv/authority.pem",
    }


async def registered(unit: Unit, server: DispatchServer, count: int) -> None:
    """Wait for so many workers in all, as the server has seen them, which costs less than systemctl."""
    await unit.until(lambda: server.counts["registered"] == count, START)


async def call(unit: Unit, server: DispatchServer, seconds: float | None = None) -> Dispatched:
    """Dispatch a job and wait until its program runs; without seconds it lasts until `hang_up`."""
    spec = {"mode": "hold"} if seconds is None else {"sleep": seconds}
    job = await server.dispatch("room", metadata=json.dumps(spec))
    assert job.outcome == "assigned", unit.journal()
    await unit.until(lambda: "started" in unit.machine.read(f"/var/lib/{unit.name}/jobs"))
    return job


def hang_up(unit: Unit) -> None:
    unit.machine.run("touch", f"/var/lib/{unit.name}/jobs.go")


async def stop(unit: Unit) -> None:
    await asyncio.to_thread(unit.systemctl, "stop")


def finished_well(unit: Unit, server: DispatchServer, job: Dispatched) -> bool:
    receipt = json.loads(unit.receipt())
    return bool(
        (receipt["outcome"], receipt["exit_code"], receipt["left"]) == ("clean", 0, 0)
        and [entry["fate"] for entry in receipt["jobs"]] == ["finished"]
        and server.jobs[job.job_id].status == "JS_SUCCESS"
    )


async def test_from_the_start_to_the_stop(machine: Machine) -> None:
    """Active when registered, past TimeoutStartSec too; a job longer than TimeoutStopSec ends well.

    After SIGKILL of the main process nothing stays in the cgroup, and the service is back by itself. In a
    reload the worker is replaced, its job goes on; from 253 on `systemctl reload` returns when that is done.
    """
    async with DispatchServer() as server:
        server.refuse_connections = True
        limits = {"TimeoutStopSec": "2", "TimeoutStartSec": "10", "RestartSec": "100ms"}
        unit = service(machine, "whole", server, **limits)
        if machine.suite == "trixie":
            values = Service(target=AGENT, name="whole")
            unit.drop_in(systemd.RELOAD, systemd.reload_drop_in(values))
            unit.machine.run("systemctl", "daemon-reload")
        unit.systemctl("start", "--no-block")
        await unit.until(lambda: unit.show("StatusText").startswith("starting: 0 of 1"))
        past = time.monotonic() + 12
        await unit.until(lambda: time.monotonic() > past, 20)
        assert unit.show("ActiveState") == "activating", unit.journal()
        server.refuse_connections = False
        await registered(unit, server, 1)
        await unit.until(lambda: unit.show("ActiveState") == "active", START)
        await unit.until(lambda: unit.show("StatusText") == "running: 1 of 1 worker accepting, 0 jobs")

        before = unit.pids()
        main = unit.show("MainPID")
        assert len(before) > 2 and int(main) in before
        unit.systemctl("kill", "--signal=KILL", "--kill-who=main")
        await registered(unit, server, 2)
        await unit.until(
            lambda: unit.show("ActiveState") == "active" and unit.show("MainPID") not in (main, "0"), START
        )
        assert unit.show("NRestarts") == "1"
        assert not before & unit.pids()

        main = unit.show("MainPID")
        job = await call(unit, server)
        await asyncio.to_thread(unit.systemctl, "reload")
        if machine.suite != "trixie":
            await registered(unit, server, 3)
        assert server.counts["registered"] == 3, unit.journal()
        assert server.jobs[job.job_id].status == "JS_RUNNING"
        assert (unit.show("ActiveState"), unit.show("MainPID")) == ("active", main)

        stopping = asyncio.create_task(stop(unit))
        await unit.until(lambda: unit.show("StatusText").startswith("draining: 1 job, "))
        due = time.monotonic() + 3
        await unit.until(lambda: time.monotonic() > due)
        hang_up(unit)
        await stopping
        assert unit.show("Result") == "success", unit.journal()
        assert finished_well(unit, server, job), unit.receipt()


async def test_the_example(machine: Machine) -> None:
    """install.sh of examples/systemd starts the service, and a second time brings a new version."""
    async with DispatchServer() as server:
        for path in EXAMPLE.iterdir():
            machine.write(f"/root/example/{path.name}", path.read_text())
        lines = "".join(f'{key}="{value}"\n' for key, value in server.environment.items())
        machine.write("/etc/lastcall/agent.env", lines, "600")
        install = ("env", "-C", "/root/example", f"LASTCALL={LASTCALL}", "sh", "install.sh")
        await asyncio.to_thread(lambda: machine.run(*install, timeout=START))
        unit = Unit.installed(machine, "agent")
        assert (unit.show("ActiveState"), server.counts["registered"]) == ("active", 1), unit.journal()
        await asyncio.to_thread(lambda: machine.run(*install, timeout=START))
        await registered(unit, server, 2)
        await unit.until(lambda: unit.show("StatusText").startswith("running: 1 of 1"), START)
        await stop(unit)
        assert unit.show("Result") == "success", unit.journal()
        assert json.loads(unit.receipt())["outcome"] == "clean"


async def test_default_kill_mode(machine: Machine) -> None:
    """SIGTERM to every process of the cgroup, as systemd sends it by default, cuts no job."""
    async with DispatchServer() as server:
        unit = service(machine, "group", server, KillMode="control-group", TimeoutStopSec="2")
        await asyncio.to_thread(unit.systemctl, "start")
        job = await call(unit, server, 4)
        await stop(unit)
        assert unit.show("Result") == "success", unit.journal()
        assert finished_well(unit, server, job), unit.receipt()


async def test_stopped_supervisor_is_restarted_by_the_watchdog(machine: Machine) -> None:
    """The loop feeds the watchdog, so a supervisor that hangs is replaced; one that works is not."""
    unit = Unit(machine, "hung", "none:at_all", "--grace", "5", WatchdogSec="2", RestartSec="100ms")
    sleeper = "/opt/lastcall/bin/lastcall run --http off -- sleep infinity"
    unit.drop_in("command.conf", f"[Service]\nExecStart=\nExecStart={sleeper}\n")
    unit.environment({})
    await asyncio.to_thread(unit.systemctl, "start")
    main = unit.show("MainPID")
    began = time.monotonic()
    await unit.until(lambda: time.monotonic() > began + 3)  # longer than the watchdog bears
    assert unit.show("MainPID") == main
    unit.systemctl("kill", f"--signal={signal.SIGSTOP.name}", "--kill-who=main")
    await unit.until(lambda: unit.show("NRestarts") == "1" and unit.show("ActiveState") == "active")
    assert unit.show("MainPID") not in (main, "0")
    assert "watchdog" in unit.journal().lower()
    await stop(unit)
    assert unit.show("Result") == "success", unit.journal()


async def test_wrong_target_is_not_restarted(machine: Machine) -> None:
    """Exit code 78 is final: the start fails, and nothing is tried again."""
    unit = Unit(machine, "wrong", "/srv/agents/no_such_agent.py", RestartSec="50ms")
    unit.environment({"LASTCALL_HTTP": "off"})
    done = await asyncio.to_thread(lambda: unit.systemctl("start", check=False))
    assert done.returncode != 0
    await unit.until(lambda: unit.show("ActiveState") == "failed")
    assert (unit.show("ExecMainStatus"), unit.show("NRestarts")) == ("78", "0"), unit.journal()


def findings(machine: Machine, unit: str, *options: str) -> dict[str, dict[str, str]]:
    """Return what the doctor says of a service, by the name of the check."""
    given = ("--unit", unit, "--http", "off", "--json", *options)
    asked = machine.run(LASTCALL, "doctor", *given, check=False)
    return {each["check"]: each for each in json.loads(asked.stdout)["findings"]}


def limit_shutdown(machine: Machine) -> None:
    """Have systemd kill all that is left 2 s after a shutdown has begun: they stand for its 30 min."""
    machine.write(f"{SHUTDOWN}/00-limit.conf", "[Unit]\nJobTimeoutSec=2\n")
    machine.run("systemctl", "daemon-reload")


def test_unit_is_understood_and_tight(machine: Machine) -> None:
    """systemd-analyze verify has nothing to say, drop-ins included where they apply; exposure at most 2.5.

    The doctor understands the unit too, and warns of systemd's own limit for a shutdown.
    """
    unit = Unit(machine, "checked", AGENT)
    values = Service(target=AGENT, name="checked")
    if machine.suite == "trixie":
        unit.drop_in(systemd.RELOAD, systemd.reload_drop_in(values))
        unit.drop_in(systemd.RESTART, systemd.restart_drop_in(values))
    unit.environment({})
    verified = machine.run("systemd-analyze", "verify", "/etc/systemd/system/checked.service", check=False)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    judged = machine.run(
        *("systemd-analyze", "security", "--offline=yes", "--threshold=25"),
        "/etc/systemd/system/checked.service",
        check=False,
    )
    assert judged.returncode == 0, judged.stdout
    limit_shutdown(machine)
    found = findings(machine, "checked.service")
    said = (found["unit"]["verdict"], found["unit"]["why"])
    assert said == ("ok", "checked.service: KillMode=mixed, stops within 3630 s")
    # The other targets have 30 min, which is less than the grace too.
    shutdown = found["shutdown"]
    assert shutdown["verdict"] == "fail" and "after 2 s (poweroff.target, reboot" in shutdown["why"]
    expected = "notify-reload" if machine.suite == "trixie" else "notify"
    assert unit.show("Type") == expected


async def test_poweroff_waits_for_the_job(machine: Machine) -> None:
    """A machine that is shut down lets the call end first, also a call that is longer than systemd's limit.

    1 s stands for the 90 s until what is left is killed. The doctor is content with the printed drop-in. The
    test is the last one of a machine.
    """
    async with DispatchServer() as server:
        unit = service(machine, "last", server)
        limit_shutdown(machine)
        machine.write("/etc/systemd/system.conf.d/kill.conf", "[Manager]\nDefaultTimeoutStopSec=1\n")
        printed = machine.run(LASTCALL, "unit", "poweroff", AGENT, "--grace", "40")
        machine.write(f"{SHUTDOWN}/10-lastcall.conf", printed.stdout)
        machine.run("systemctl", "daemon-reload")
        assert findings(machine, "last.service", "--grace", "40")["shutdown"]["verdict"] == "ok"
        await asyncio.to_thread(unit.systemctl, "start")
        job = await call(unit, server, 8)
        machine.run("systemctl", "--no-block", "poweroff")
        await asyncio.to_thread(machine.wait, 40)
        assert server.jobs[job.job_id].status == "JS_SUCCESS", machine.console()
