"""The checks: each is a pure function of the facts. A check returns None when it has nothing to say."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lastcall.supervisor.config import calls
from lastcall.supervisor.deploy.service import KILL_MARGIN, Timers, seconds
from lastcall.supervisor.doctor.facts import Facts, Finding, Severity
from lastcall.worker.base import variables
from lastcall.worker.base.plurals import counted

Check = Callable[[Facts], Finding | None]

SHELLS = frozenset({"sh", "bash", "dash", "ash", "zsh", "busybox"})
CONTAINER_INITS = frozenset({"tini", "docker-init", "catatonit", "dumb-init", "podman-init", "s6-svscan"})
# The signals that begin a drain, SIGTERM and SIGINT, by the numbers that systemctl shows.
DRAINING_SIGNALS = frozenset({"15", "2"})
HOST_INITS = frozenset({"systemd", "init", "launchd"})
# In the cgroup paths of a process in a container of Docker, Podman, Kubernetes, ECS, LXC or systemd-nspawn: a
# whole name of a cgroup, or a name with the container's id. Services of a host have names that begin alike,
# as docker.service and container-agent.service.
CONTAINER_CGROUP = re.compile(
    r"/(docker|libpod|containers?|kubepods|([\w-]+-)?kubepods(-[^/\n]+)?\.slice|lxc(\.payload[^/\n]*)?|ecs"
    r"|machine\.slice)(/|$)"
    r"|[/:](docker|libpod|cri-containerd|crio)[-:][0-9a-f]{12,}(\.scope)?(/|$)",
    re.MULTILINE,
)
# Versions of livekit-agents, as in pyproject.toml and the CHANGELOG.
OLDEST_SUPPORTED, NEWEST_TESTED = (1, 3, 12), (1, 8, 9)
GIB = 1 << 30
# Threads count as processes in a cgroup. Ours: a worker with its idle job processes has some hundred.
PROCESSES_PER_WORKER = 500
# Seconds that clocks may differ. LiveKit allows a minute (DEFAULT_LEEWAY in livekit/api/access_token.py).
# Ours: the lower figure, to warn in time.
SKEW_WARN, SKEW_FAIL = 10.0, 60.0
# Open files of one process: DefaultLimitNOFILE of systemd-system.conf(5), and a quarter of it.
OPEN_FILES_WARN, OPEN_FILES_FAIL = 1024, 256
# Seconds from the signal to SIGKILL, for `docker stop` and `podman stop` without -t:
# https://docs.docker.com/reference/cli/docker/container/stop/
CONTAINER_KILL_DEFAULT = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """A platform, known by a variable that the platform sets in every container.

    `default` and `limit` are seconds from the signal to SIGKILL; a platform without a limit takes any number.
    """

    variable: str
    name: str
    default: int
    limit: int | None = None


# Each with the option that sets the timer, in the platform's own documentation.
PLATFORMS = (
    Platform(variable="K_SERVICE", name="Cloud Run", default=10, limit=10),  # container contract, fixed
    Platform(variable="DYNO", name="Heroku", default=30, limit=30),  # dyno shutdown, fixed
    Platform(variable="ECS_CONTAINER_METADATA_URI_V4", name="ECS", default=30, limit=120),  # stopTimeout
    Platform(variable="FLY_APP_NAME", name="Fly", default=5, limit=300),  # kill_timeout
    Platform(variable="RENDER", name="Render", default=30, limit=300),  # maxShutdownDelaySeconds
    Platform(variable="NOMAD_ALLOC_ID", name="Nomad", default=5),  # kill_timeout
    # terminationGracePeriodSeconds
    Platform(variable="KUBERNETES_SERVICE_HOST", name="Kubernetes", default=30),
)


def configuration(facts: Facts) -> Finding:
    """Whether options, environment and file are understood."""
    if facts.config_error:
        return Finding(
            check="configuration",
            verdict="fail",
            why=facts.config_error,
            do="correct it; the other checks go by the defaults",
        )
    why = f"grace {seconds(facts.grace)} s, workers {facts.workers}, http {facts.http}"
    return Finding(check="configuration", verdict="ok", why=why)


def grace(facts: Facts) -> Finding:
    """How long calls have, and whether a job that has to be cut can end well."""
    warning = calls.warning(facts.grace, facts.shares)
    if warning:
        return Finding(check="grace", verdict="warn", why=warning, do=calls.advice(facts.shares))
    return Finding(check="grace", verdict="ok", why=calls.given(facts.grace, facts.shares))


def init(facts: Facts) -> Finding:
    """Whether the process that gets a container's SIGTERM passes it on."""
    name = posixpath.basename(facts.init[0]) if facts.init else "unknown"
    if facts.pid == 1 or any(posixpath.basename(word) == "lastcall" for word in facts.init[:2]):
        why = "lastcall is PID 1: it gets the signal itself and reaps orphans"
        return Finding(check="pid 1", verdict="ok", why=why)
    if name in SHELLS:
        return Finding(
            check="pid 1",
            verdict="fail" if facts.in_container else "warn",
            why=f"PID 1 is a shell ({' '.join(facts.init)[:60]}): it does not pass SIGTERM on",
            do='start it in exec form: ENTRYPOINT ["lastcall-entrypoint"], or exec lastcall in the script',
        )
    if name in CONTAINER_INITS:
        for words in facts.init_children:
            # A shell with nothing to run is that of somebody who looks around.
            if len(words) > 1 and posixpath.basename(words[0]) in SHELLS:
                why = f"below {name} a shell ({' '.join(words)[:60]}) gets SIGTERM, and does not pass it on"
                do = f"exec lastcall in that script, or {name} with lastcall itself as its command"
                return Finding(check="pid 1", verdict="fail", why=why, do=do)
        why = f"PID 1 is {name}: it passes the signal on; not needed, and no harm"
        return Finding(check="pid 1", verdict="ok", why=why)
    if name in HOST_INITS or not facts.in_container:
        return Finding(check="pid 1", verdict="ok", why=f"PID 1 is {name}, the host's own")
    return Finding(
        check="pid 1",
        verdict="warn",
        why=f"PID 1 is {name}: whether it passes SIGTERM on is not known",
        do="make lastcall the container's entry point, or see that it forwards SIGTERM and waits",
    )


def unit(facts: Facts) -> Finding | None:
    """Whether the systemd unit signals and waits as a drain needs it."""
    if facts.unit is None:
        return None
    name, values = facts.unit.name, facts.unit.properties
    if values.get("LoadState", "loaded") != "loaded":
        why = f"{name} is not loaded ({values['LoadState']})"
        do = "give the name of a unit there is, and run systemctl daemon-reload after a change"
        return Finding(check="unit", verdict="fail", why=why, do=do)
    mode = values.get("KillMode", "control-group")
    if mode not in ("mixed", "control-group"):
        return Finding(
            check="unit",
            verdict="fail",
            why=f"{name} has KillMode={mode}: what does not end by itself stays for ever",
            do="KillMode=mixed",
        )
    signal = values.get("KillSignal", "15")
    if signal not in DRAINING_SIGNALS:
        return Finding(
            check="unit",
            verdict="fail",
            why=f"{name} has KillSignal={signal}: lastcall drains at SIGTERM (15) and SIGINT (2)",
            do="KillSignal=SIGTERM, which is the default",
        )
    notifies = values.get("Type", "").startswith("notify")
    if notifies and values.get("NotifyAccess") == "none":
        return Finding(
            check="unit",
            verdict="fail",
            why=f"{name} has Type={values['Type']} and NotifyAccess=none: systemd hears nothing",
            do="NotifyAccess=main",
        )
    policy = values.get("OOMPolicy", "continue")
    if policy != "continue":
        why = f"{name} has OOMPolicy={policy}: one call out of memory ends the unit, and every other call"
        return Finding(check="unit", verdict="fail", why=why, do="OOMPolicy=continue")
    timers = Timers(grace=facts.grace)
    timeout = span(values.get("TimeoutStopUSec", "infinity"))
    if timeout < facts.grace:
        return Finding(
            check="unit",
            verdict="warn" if notifies else "fail",
            why=f"{name} has TimeoutStopSec={timeout:g}, grace is {seconds(facts.grace)} s"
            + ("; lastcall extends it while jobs live" if notifies else ": systemd would cut calls"),
            do=f"TimeoutStopSec={timers.kill_after}"
            + ("" if notifies else ", or Type=notify; lastcall unit systemd prints both"),
        )
    if timeout < timers.kill_after and not notifies:
        after = timeout - facts.grace
        why = f"{name} is killed {after:g} s after grace is over; {timers.margin} s would be safe"
        return Finding(check="unit", verdict="warn", why=why, do=f"TimeoutStopSec={timers.kill_after}")
    return Finding(check="unit", verdict="ok", why=f"{name}: KillMode={mode}, stops within {timeout:g} s")


def shutdown(facts: Facts) -> Finding | None:
    """Whether the machine waits for calls when it is powered off or rebooted."""
    limits = {
        target.name: span(target.timeout)
        for target in facts.shutdown_targets
        if target.action not in ("", "none")
    }
    short = {name: limit for name, limit in limits.items() if limit < facts.grace}
    if not limits:
        return None
    if not short:
        least = min(limits.values())
        why = f"a shutdown is ended by force after {least:g} s, grace is {seconds(facts.grace)} s"
        return Finding(check="shutdown", verdict="ok", why=why)
    why = (
        f"systemd ends a shutdown by force after {min(short.values()):g} s ({', '.join(short)}),"
        f" grace is {seconds(facts.grace)} s: longer calls are cut"
    )
    needed = Timers(grace=facts.grace).shutdown_after
    do = f"JobTimeoutSec={needed} for these targets; lastcall unit poweroff prints the drop-in"
    return Finding(check="shutdown", verdict="fail", why=why, do=do)


def kill_timer(facts: Facts) -> Finding:
    """The platform's kill timer against grace."""
    given = facts.environment.get(variables.PLATFORM_GRACE, "")
    platform = next((each for each in PLATFORMS if each.variable in facts.environment), None)
    needed = Timers(grace=facts.grace).kill_after
    name = platform.name if platform else "the container runtime" if facts.in_container else "the platform"
    if platform and platform.limit is not None and platform.limit < facts.grace:
        fits = platform.limit - KILL_MARGIN
        do = f"--grace {fits}, or a platform that waits" if fits > 0 else "another platform: no call fits in"
        why = f"{name} kills after {platform.limit} s at most, grace is {seconds(facts.grace)} s"
        return Finding(check="kill timer", verdict="fail", why=f"{why}: longer calls are cut", do=do)
    if given:
        try:
            timer = float(given)
        except ValueError:
            timer = math.nan
        if math.isnan(timer):
            why = f"{variables.PLATFORM_GRACE} is {given!r}, no number"
            return Finding(check="kill timer", verdict="fail", why=why, do="give the kill timer in seconds")
        if timer < facts.grace:
            why = f"{name} kills after {timer:g} s, grace is {seconds(facts.grace)} s: calls would be cut"
            return Finding(check="kill timer", verdict="fail", why=why, do=f"raise the timer to {needed} s")
        if timer < needed:
            why = f"{name} kills {timer - facts.grace:g} s after grace is over; {KILL_MARGIN} s would be safe"
            return Finding(check="kill timer", verdict="warn", why=why, do=f"raise the timer to {needed} s")
        why = f"{name} kills after {timer:g} s, grace is {seconds(facts.grace)} s"
        return Finding(check="kill timer", verdict="ok", why=why)
    unit_decides = facts.unit is not None and facts.unit.properties.get("LoadState", "loaded") == "loaded"
    if platform or (facts.in_container and not unit_decides):
        default = platform.default if platform else CONTAINER_KILL_DEFAULT
        return Finding(
            check="kill timer",
            verdict="warn",
            why=f"{name} kills after {default} s unless told otherwise, and nothing says what it was told",
            do=f"set its timer to {needed} s, and {variables.PLATFORM_GRACE}={needed} beside it",
        )
    if unit_decides:
        why = "systemd is the platform: see unit"
        return Finding(check="kill timer", verdict="ok", why=why)
    why = "no container and no platform that would kill by itself"
    return Finding(check="kill timer", verdict="ok", why=why)


def livekit_agents(facts: Facts) -> Finding:
    """The installed livekit-agents, and what a stop does to a bare worker of that version."""
    text = facts.livekit_agents
    if text is None:
        return Finding(
            check="livekit-agents",
            verdict="fail" if facts.target else "warn",
            why="not installed in lastcall's environment: only opaque workers (run -- CMD) can be run",
            do="install lastcall into the agent's own environment",
        )
    version = numbers(text)
    if version < OLDEST_SUPPORTED:
        why = f"{text} is older than {dotted(OLDEST_SUPPORTED)}, the oldest supported"
        do = "upgrade livekit-agents"
        return Finding(check="livekit-agents", verdict="fail", why=why, do=do)
    if version > NEWEST_TESTED:
        why = f"{text} is newer than {dotted(NEWEST_TESTED)}, the newest that was tested"
        do = "rehearse with your agent: lastcall rehearse TARGET"
        return Finding(check="livekit-agents", verdict="warn", why=why, do=do)
    defects = ["a second SIGTERM cuts every call", "exit code 0 although calls were cut"]
    if version < (1, 5):
        defects.append("dispatches are accepted during the drain")
    if version < (1, 8):
        defects.append("a blocked request_fnc keeps the stop from beginning")
    else:
        defects.append("SIGTERM to the process group cuts every call")
    why = f"{text}; what a stop of it does by itself ({'; '.join(defects)}), lastcall run prevents"
    return Finding(check="livekit-agents", verdict="ok", why=why)


def private_names(facts: Facts) -> Finding | None:
    """Whether the installed packages have the private names that a stop needs."""
    if facts.livekit_agents is None:
        return None
    if facts.names is None:
        why, do = "livekit-agents can't be imported", "see what python -c 'import livekit.agents' says"
        return Finding(check="private names", verdict="fail", why=why, do=do)
    lacking = sorted((name for name in facts.names if name.lack), key=lambda name: name.without)
    if not lacking:
        why = f"all {len(facts.names)} that lastcall uses are there"
        return Finding(check="private names", verdict="ok", why=why)
    first, more = lacking[0], f", and {len(lacking) - 1} more" if lacking[1:] else ""
    if first.without:
        why = f"{first.lack}{more}: {first.without}"
        do = f"use an older {first.package} to have it back, or a newer lastcall"
        return Finding(check="private names", verdict="warn", why=why, do=do)
    why = f"{first.lack}, which {first.needed_by} needs{more}: lastcall does not start"
    do = f"use an older {first.package}, or a newer lastcall"
    return Finding(check="private names", verdict="fail", why=why, do=do)


def shield(facts: Facts) -> Finding:
    """Whether a stop that reaches every process leaves the jobs alone: seen on a worker that was started."""
    trial = facts.trial
    if trial is None:
        why, do = "no TARGET, so no worker was started to look at", "lastcall doctor TARGET"
        return Finding(check="shield", verdict="warn", why=why, do=do)
    if trial.error:
        do = "see that lastcall run TARGET starts; the message is its own"
        return Finding(check="shield", verdict="fail", why=trial.error, do=do)
    if trial.open_to:
        holes = ", ".join(f"{name} to {'+'.join(open_to)}" for name, open_to in trial.open_to.items())
        do = "see what in the agent sets signal handlers or masks as it is imported"
        return Finding(check="shield", verdict="fail", why=f"open: {holes}", do=do)
    if trial.exit_code != 0:
        ended = (
            "was not over in time" if trial.exit_code is None else f"ended with exit code {trial.exit_code}"
        )
        why = f"the worker's stop, without a job, {ended}" + (f" ({trial.stop})" if trial.stop else "")
        do = "lastcall rehearse TARGET says more"
        return Finding(check="shield", verdict="fail", why=why, do=do)
    if not trial.looked_at:
        why = "no process was warm for a job, so none could be looked at"
        return Finding(check="shield", verdict="warn", why=why, do="lastcall rehearse TARGET looks at jobs")
    why = f"{counted(trial.looked_at, 'process')} of a worker looked at: SIGTERM and SIGINT end none of them"
    return Finding(check="shield", verdict="ok", why=why)


def memory(facts: Facts) -> Finding:
    """The cgroup's memory limit against what the workers need before the first call."""
    limit = facts.memory_limit
    if limit is None:
        return Finding(check="memory", verdict="ok", why="no limit in this cgroup")
    each = facts.trial.worker_bytes if facts.trial else 0
    if not each:
        why = f"limit {limit / GIB:.1f} GiB; what a worker takes is not known without TARGET"
        return Finding(check="memory", verdict="ok", why=why)
    needed = each * facts.workers
    why = f"limit {limit / GIB:.1f} GiB; {facts.workers} x {each / GIB:.2f} GiB before the first call"
    if needed > limit:
        do = "fewer --workers, or a higher limit"
        return Finding(check="memory", verdict="fail", why=why, do=do)
    if needed * 2 > limit:
        do = "leave at least half for the calls: fewer --workers, or a higher limit"
        return Finding(check="memory", verdict="warn", why=why, do=do)
    return Finding(check="memory", verdict="ok", why=why)


def out_of_memory(facts: Facts) -> Finding | None:
    """Whether one call that finds no memory takes the others along."""
    limit, each = facts.memory_limit, facts.job_memory_mb
    if each and limit is not None and each << 20 >= limit:
        why = f"jobs.memory_mb is {each}, and all jobs together have {limit >> 20} MB: it is never reached"
        do = "give a memory_mb that several jobs fit into, or a higher limit"
        return Finding(check="out of memory", verdict="warn", why=why, do=do)
    if facts.dies_as_group is None:
        return None
    if not facts.dies_as_group:
        why = "memory.oom.group is 0: the kernel kills one process, a job's before a worker"
        return Finding(check="out of memory", verdict="ok", why=why)
    why = "memory.oom.group is 1: the kernel kills every call with the one that finds no memory"
    if each:
        why = (
            f"memory.oom.group is 1, and a job is ended at {each} MB before it comes to that (jobs.memory_mb)"
        )
        return Finding(check="out of memory", verdict="ok", why=why)
    do = (
        "[jobs] memory_mb, which ends one job before; and singleProcessOOMKill: true in the kubelet's"
        " configuration (1.32), or OOMPolicy=continue in a unit"
    )
    return Finding(check="out of memory", verdict="warn", why=why, do=do)


def limits(facts: Facts) -> Finding:
    """File descriptors and processes."""
    if facts.open_files < OPEN_FILES_WARN:
        why = f"only {facts.open_files} open files a process"
        do = "LimitNOFILE=65536, or ulimit -n"
        severity: Severity = "fail" if facts.open_files < OPEN_FILES_FAIL else "warn"
        return Finding(check="limits", verdict=severity, why=why, do=do)
    needed = PROCESSES_PER_WORKER * facts.workers
    if facts.processes_limit is not None and facts.processes_limit < needed:
        why = f"only {facts.processes_limit} processes and threads in this cgroup"
        do = f"TasksMax or pids limit of {needed} or more"
        return Finding(check="limits", verdict="warn", why=why, do=do)
    processes = "no limit" if facts.processes_limit is None else facts.processes_limit
    why = f"{facts.open_files} open files a process; processes and threads: {processes}"
    return Finding(check="limits", verdict="ok", why=why)


def clock(facts: Facts) -> Finding:
    """This machine's clock against the LiveKit server's: tokens are valid by time."""
    skew = facts.livekit.skew_s if facts.livekit else None
    if skew is None:
        why = "compared with nothing: no LiveKit server told the time"
        return Finding(check="clock", verdict="ok", why=why)
    if abs(skew) <= SKEW_WARN:
        return Finding(check="clock", verdict="ok", why=f"within {SKEW_WARN:.0f} s of the LiveKit server's")
    side = "behind" if skew > 0 else "ahead of"
    why = f"{abs(skew):.0f} s {side} the LiveKit server's: tokens may be refused"
    severity: Severity = "fail" if abs(skew) > SKEW_FAIL else "warn"
    return Finding(check="clock", verdict=severity, why=why, do="synchronise the clock of this machine (NTP)")


def livekit(facts: Facts) -> Finding:
    """Whether a worker would be let in."""
    answer = facts.livekit
    if answer is None:
        return Finding(
            check="livekit",
            verdict="warn",
            why="LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET are not all set here",
            do="run doctor where they are, or give them by env_file",
        )
    if answer.error:
        do = "check LIVEKIT_URL, name resolution and what lets traffic out"
        return Finding(check="livekit", verdict="fail", why=f"{answer.url}: {answer.error}", do=do)
    if answer.status == 101:
        return Finding(check="livekit", verdict="ok", why=f"{answer.url} lets a worker with this key in")
    if answer.status in (401, 403):
        do = "check LIVEKIT_API_KEY and LIVEKIT_API_SECRET, and the clock"
        why = f"{answer.url} refuses the key ({answer.status})"
        return Finding(check="livekit", verdict="fail", why=why, do=do)
    why = f"{answer.url} answers {answer.status} to a worker: no LiveKit server, or one that is not well"
    return Finding(check="livekit", verdict="fail", why=why, do="check LIVEKIT_URL")


def handover(facts: Facts) -> Finding | None:
    """Whether the key may ask for the dispatch of a successor, where calls are handed over."""
    answer = facts.livekit
    if not facts.hands_over or answer is None or answer.error or answer.status != 101:
        return None
    if answer.dispatch_status in (401, 403):
        why = (
            f"the key may not dispatch agents ({answer.dispatch_status}): no call goes on elsewhere at a stop"
        )
        do = "give a key that has roomAdmin, or set handover.enabled = false"
        return Finding(check="handover", verdict="warn", why=why, do=do)
    return Finding(check="handover", verdict="ok", why="the key may dispatch the successor of a call")


def inworld(facts: Facts) -> Finding | None:
    """The Inworld key, where the plugin is installed."""
    if not facts.has_inworld_plugin:
        return None
    if facts.has_inworld_key:
        return Finding(check="inworld", verdict="ok", why="the plugin is installed and a key is there")
    why, do = "the plugin is installed, and INWORLD_API_KEY is not set here", "set it where lastcall runs"
    return Finding(check="inworld", verdict="warn", why=why, do=do)


def places(facts: Facts) -> Finding:
    """Whether the port is free, and socket and receipt can be written."""
    if facts.http_problem:
        do = "give another --http HOST:PORT, or off; or stop what listens there"
        return Finding(check="places", verdict="fail", why=facts.http_problem, do=do)
    if facts.place_problems:
        do = "give a path that can be written, as --control or --receipt"
        return Finding(check="places", verdict="fail", why="; ".join(facts.place_problems), do=do)
    port = "no port wanted" if facts.http == "off" else f"{facts.http} is free, or lastcall's already"
    return Finding(check="places", verdict="ok", why=f"{port}; socket and receipt can be written")


def processes(facts: Facts) -> Finding | None:
    """Whether a supervisor that runs here has had job processes that did not get ready."""
    if not facts.process_failures:
        return None
    why = f"the running supervisor: {'; '.join(facts.process_failures)}"
    do = "mend what prewarm, or the import of the agent, needs; the next process is tried by itself"
    return Finding(check="processes", verdict="fail", why=why, do=do)


def image(facts: Facts) -> Finding | None:
    """Whether the image of a supervisor that runs here has everything that its workers import."""
    if not facts.image_limits:
        return None
    return Finding(
        check="image",
        verdict="warn",
        why=f"the image of the running supervisor: {'; '.join(facts.image_limits)}",
        do="have the package start that at its first use; until then each process imports the package itself",
    )


def load(facts: Facts) -> Finding | None:
    """The load by which livekit-agents calls a worker full, where several workers share a machine."""
    if facts.workers < 2:
        return None
    why = (
        f"livekit-agents measures the whole machine or its cgroup: the {facts.workers} workers have one load"
        " and are full at the same moment (load_threshold, 0.7 by default), so that more workers take no more"
        " calls; jobs.max_running, or a load_fnc of the agent, counts for each worker"
    )
    return Finding(check="load", verdict="ok", why=why)


CHECKS: tuple[Check, ...] = (
    configuration,
    grace,
    init,
    unit,
    shutdown,
    kill_timer,
    livekit_agents,
    private_names,
    shield,
    memory,
    out_of_memory,
    limits,
    clock,
    livekit,
    handover,
    inworld,
    places,
    processes,
    image,
    load,
)


def examine(facts: Facts) -> list[Finding]:
    """Return every finding."""
    return [finding for check in CHECKS if (finding := check(facts)) is not None]


def is_container(
    environment: Mapping[str, str], init: Sequence[str], init_environment: str, cgroups: str
) -> bool:
    """Tell whether this is a container, by what container managers set, by PID 1, and by cgroup paths.

    A variable `container` is set by systemd-nspawn, Podman and LXC: https://systemd.io/CONTAINER_INTERFACE/.
    `init` is the command line of PID 1: a host's is an init, and has a name of HOST_INITS.
    """
    name = posixpath.basename(init[0]) if init else ""
    return (
        bool(environment.get("container"))
        or "KUBERNETES_SERVICE_HOST" in environment
        or any(variable.startswith("container=") for variable in init_environment.split("\0"))
        or (name != "" and name not in HOST_INITS)
        or CONTAINER_CGROUP.search(cgroups) is not None
    )


# -- reading -----------------------------------------------------------------------------------------------

# systemd.time(7): a month has 30.44 days, a year 365.25.
SECONDS_PER_UNIT = {
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1,
    "min": 60,
    "h": 3600,
    "d": 86400,
    "w": 604800,
    "month": 2629800,
    "y": 31557600,
}


def span(text: str) -> float:
    """Read a time span as systemd prints it, as in 1h 30s; infinity when it says so or can't be read."""
    total, rest = 0.0, text.strip()
    parts = re.findall(r"([\d.]+)\s*(us|ms|s|min|h|d|w|month|y)\b", rest)
    for amount, name in parts:
        total += float(amount) * SECONDS_PER_UNIT[name]
    return total if parts else math.inf


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 1.8.9rc1 is (1, 8, 9)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else (0,)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
