"""The private names that lastcall uses of livekit-agents, multiprocessing and the Inworld plugin.

A name is private here when its owner promises nothing about it. It has a leading underscore, or stands in a
module that is not for users to import. `preflight` looks for each name before it is used. A name without
which a stop would go wrong ends the start with exit code 78. For each other name `without` says what lastcall
then does.
`tests/test_names.py` fails on a name that is used and not listed, and on one that is listed and not used.

Nothing is imported here: `scripts/states` renders the table into docs/compatibility.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# A class, function or value belongs to a module, the others to a class. Code of the class assigns an
# attribute, and tells an event.
Kind = Literal["class", "function", "value", "method", "attribute", "event"]

LIVEKIT, PYTHON, INWORLD = "livekit-agents", "Python", "livekit-plugins-inworld"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateName:
    """One private name of a package.

    `owner` is `module` or `module:Class`. `signature` says how lastcall calls or replaces a function, as in
    `async (self, message, late=)`. The name is expected of the versions from `since` on and before `until`.
    With `without` empty a version that lacks the name is refused.
    """

    owner: str
    name: str
    kind: Kind
    needed_by: str
    signature: str = ""
    without: str = ""
    since: str = ""
    until: str = ""

    @property
    def package(self) -> str:
        if self.owner.startswith(PLUGIN):
            return INWORLD
        return LIVEKIT if self.owner.startswith("livekit.") else PYTHON

    @property
    def text(self) -> str:
        """The name with its class, or with its module where it has none."""
        module, _, owner = self.owner.partition(":")
        return f"{owner or module}.{self.name}"

    @property
    def expected_of(self) -> str:
        """The versions that should have the name."""
        spans = (f"from {self.since}" if self.since else "", f"before {self.until}" if self.until else "")
        return " ".join(filter(None, spans)) or "all"


SERVER = "livekit.agents.worker:AgentServer"
REQUEST = "livekit.agents.job:JobRequest"
INFO = "livekit.agents.job:RunningJobInfo"
POOL = "livekit.agents.ipc.proc_pool:ProcPool"
SUPERVISED = "livekit.agents.ipc.supervised_proc"
PROCESS = f"{SUPERVISED}:SupervisedProc"
PROCESS_EXECUTOR = "livekit.agents.ipc.job_proc_executor:ProcJobExecutor"
THREAD_EXECUTOR = "livekit.agents.ipc.job_thread_executor:ThreadJobExecutor"
POPEN = "multiprocessing.popen_forkserver:Popen"
START_BESIDE_END = "a start while another process ends, up to CPython 3.11.3"
START_FAILS = "such a start may fail, and the worker takes no job for a moment"
PLUGIN = "livekit.plugins.inworld"
TTS = f"{PLUGIN}.tts:TTS"
CONNECTION = f"{PLUGIN}.tts:_InworldConnection"

# For the column `needed by`.
FENCE = "the fence"
REGISTER = "the register of jobs"
REPORTS = "the report of a job's end"
READY = "the look at the connection"
PORTS = "the separation of workers on one host"
KILL = "the kill of a job"
FOLLOW = "the pause after job processes that fail"
KEY = "the refusal of an agent without a LiveKit server"
NO_KEY = "livekit-agents says so at each start, and the supervisor starts it again"
AT_ONCE = "livekit-agents starts failed processes again at once, ten a second"
PAST_PROXY = "the way to a local server past the proxy"
THROUGH_PROXY = "dev, demo, rehearse and doctor reach their local server through the proxy"
EXIT = "the look at a process's end"
INWORLD_CLOSE = "the close of the plugin's connections"
PUBLIC_CLOSE = "only the plugin's public aclose() closes connections, which may cut contexts"

NAMES = (
    # -- the server ------------------------------------------------------------------------------------
    PrivateName(owner=SERVER, name="_request_fnc", kind="attribute", needed_by="the gate in front of offers"),
    PrivateName(owner=REQUEST, name="_on_accept", kind="attribute", needed_by="the gate in front of offers"),
    PrivateName(owner=REQUEST, name="_on_reject", kind="attribute", needed_by="the gate in front of offers"),
    PrivateName(
        owner=SERVER,
        name="_handle_termination",
        kind="method",
        signature="async (self, message)",
        needed_by="jobs that go on when the server terminates them",
    ),
    PrivateName(owner=SERVER, name="_draining", kind="attribute", needed_by=FENCE),
    PrivateName(
        owner=SERVER, name="_update_worker_status", kind="method", signature="async (self)", needed_by=FENCE
    ),
    PrivateName(owner=SERVER, name="_msg_chan", kind="attribute", needed_by=FENCE),
    PrivateName(
        owner=SERVER, name="_queue_msg", kind="method", signature="async (self, message)", needed_by=REPORTS
    ),
    PrivateName(owner="livekit.agents.utils.aio", name="ChanClosed", kind="class", needed_by=REPORTS),
    PrivateName(owner=SERVER, name="_conn_task", kind="attribute", needed_by=READY),
    PrivateName(owner=SERVER, name="_connecting", kind="attribute", needed_by=READY),
    PrivateName(
        owner=SERVER,
        name="_connection_failed",
        kind="attribute",
        needed_by="the look at a connection that was given up",
        until="1.7.0",
    ),
    PrivateName(
        owner=SERVER,
        name="_connection_failed",
        kind="attribute",
        needed_by="the look at a connection that was given up",
        without="the end of AgentServer.run() says so alone",
        since="1.7.0",
    ),
    PrivateName(owner=SERVER, name="_ws_url", kind="attribute", needed_by="a local server"),
    PrivateName(owner=SERVER, name="_api_key", kind="attribute", needed_by=KEY, without=NO_KEY),
    PrivateName(owner=SERVER, name="_api_secret", kind="attribute", needed_by=KEY, without=NO_KEY),
    PrivateName(owner=SERVER, name="_entrypoint_fnc", kind="attribute", needed_by="the look at a target"),
    PrivateName(owner=SERVER, name="_port", kind="attribute", needed_by=PORTS),
    PrivateName(owner=SERVER, name="_host", kind="attribute", needed_by=PORTS),
    PrivateName(owner=SERVER, name="_prometheus_port", kind="attribute", needed_by=PORTS),
    PrivateName(owner=SERVER, name="_prometheus_multiproc_dir", kind="attribute", needed_by=PORTS),
    PrivateName(
        owner=SERVER, name="_tasks", kind="attribute", needed_by="the end of request_fnc", until="1.4.2"
    ),
    PrivateName(
        owner=SERVER,
        name="_job_lifecycle_tasks",
        kind="attribute",
        needed_by="the end of request_fnc",
        since="1.4.2",
    ),
    PrivateName(
        owner=SERVER,
        name="_worker_load",
        kind="attribute",
        needed_by="the load in status and metrics",
        without="the load reads 0",
    ),
    PrivateName(
        owner=SERVER,
        name="_load_threshold",
        kind="attribute",
        needed_by="the look at a worker that is FULL for its load",
        without="such a worker is shown as one that accepts, and rehearse keeps the agent's threshold",
    ),
    PrivateName(
        owner=SERVER,
        name="_get_effective_load",
        kind="method",
        signature="(self)",
        needed_by="the look at a worker that is FULL for its load",
        without="the look leaves out jobs that have no process yet",
        since="1.5.7",
    ),
    PrivateName(
        owner=SERVER,
        name="_connection_task",
        kind="method",
        signature="async (self)",
        needed_by="a registration after the first warm process",
        without="a worker registers before its first process is warm",
    ),
    PrivateName(
        owner=SERVER, name="_http_proxy", kind="attribute", needed_by=PAST_PROXY, without=THROUGH_PROXY
    ),
    PrivateName(
        owner=SERVER, name="_http_session", kind="attribute", needed_by=PAST_PROXY, without=THROUGH_PROXY
    ),
    PrivateName(
        owner=SERVER,
        name="_agent_name",
        kind="attribute",
        needed_by="the agent's name in the status",
        without="the status shows no name",
    ),
    PrivateName(
        owner=SERVER,
        name="_inference_executor",
        kind="attribute",
        needed_by="the end of the inference process",
        without="livekit-agents ends the inference process, within the close",
    ),
    PrivateName(
        owner="livekit.agents.cli.log",
        name="setup_logging",
        kind="function",
        signature="(level, devmode=, console=)",
        needed_by="the log of worker and jobs",
    ),
    PrivateName(
        owner="livekit.agents.cli", name="run_app", kind="function", signature="(server)", needed_by="TARGET"
    ),
    PrivateName(
        owner="livekit.agents.cli.cli",
        name="run_app",
        kind="function",
        signature="(server)",
        needed_by="a target that imports run_app from livekit.agents.cli.cli",
        without="such a target is refused, as one that runs its server itself",
    ),
    PrivateName(
        owner="livekit.agents.plugin:Plugin",
        name="emitter",
        kind="attribute",
        needed_by="[inworld]",
    ),
    PrivateName(
        owner="livekit.agents.plugin:Plugin",
        name="registered_plugins",
        kind="attribute",
        needed_by="[inworld]",
    ),
    PrivateName(
        owner="livekit.agents.plugin:Plugin", name="plugin_registered", kind="event", needed_by="[inworld]"
    ),
    # -- job processes ---------------------------------------------------------------------------------
    PrivateName(owner=SERVER, name="_proc_pool", kind="attribute", needed_by=REGISTER),
    PrivateName(owner=POOL, name="processes", kind="attribute", needed_by=REGISTER),
    PrivateName(owner=POOL, name="process_job_launched", kind="event", needed_by=REGISTER),
    PrivateName(owner=POOL, name="process_closed", kind="event", needed_by=REGISTER),
    PrivateName(owner=POOL, name="process_ready", kind="event", needed_by="the look at a warm process"),
    PrivateName(owner=INFO, name="job", kind="attribute", needed_by=REGISTER),
    PrivateName(
        owner=POOL, name="aclose", kind="method", signature="async (self)", needed_by="the end of a worker"
    ),
    PrivateName(
        owner=POOL,
        name="_closed",
        kind="attribute",
        needed_by="the end of idle processes",
        without="livekit-agents closes its pool itself, which may take the whole close",
    ),
    PrivateName(
        owner=POOL,
        name="_warmed_proc_queue",
        kind="attribute",
        needed_by="the look at a warm process",
        without="a registered worker counts as warm",
    ),
    PrivateName(
        owner=POOL,
        name="_default_num_idle_processes",
        kind="attribute",
        needed_by="the look at a warm process",
        without="a registered worker counts as warm",
    ),
    PrivateName(
        owner=POOL, name="start", kind="method", signature="async (self)", needed_by=FOLLOW, without=AT_ONCE
    ),
    PrivateName(
        owner=POOL,
        name="_proc_spawn_task",
        kind="method",
        signature="async (self)",
        needed_by=FOLLOW,
        without=AT_ONCE,
    ),
    PrivateName(owner=POOL, name="process_created", kind="event", needed_by=FOLLOW, without=AT_ONCE),
    PrivateName(
        owner=POOL,
        name="_spawn_tasks",
        kind="attribute",
        needed_by="the start of a trial process",
        without="the close of the pool does not wait for the start of a trial process",
    ),
    PrivateName(
        owner=PROCESS,
        name="_initialize_fut",
        kind="attribute",
        needed_by="the reason why a job process failed",
        without="a failed process is told without its reason",
    ),
    PrivateName(owner=PROCESS, name="pid", kind="attribute", needed_by=KILL),
    PrivateName(owner=PROCESS, name="exitcode", kind="attribute", needed_by=EXIT),
    PrivateName(
        owner=PROCESS,
        name="aclose",
        kind="method",
        signature="async (self)",
        needed_by="the request to a job to shut down",
    ),
    PrivateName(owner=PROCESS_EXECUTOR, name="running_job", kind="attribute", needed_by=REGISTER),
    PrivateName(owner=THREAD_EXECUTOR, name="running_job", kind="attribute", needed_by=REGISTER),
    PrivateName(owner=THREAD_EXECUTOR, name="status", kind="attribute", needed_by=REGISTER),
    PrivateName(
        owner=THREAD_EXECUTOR,
        name="aclose",
        kind="method",
        signature="async (self)",
        needed_by="the request to a job to shut down",
    ),
    PrivateName(
        owner=PROCESS,
        name="_opts",
        kind="attribute",
        needed_by="the time that a job has to shut down",
        without="livekit-agents kills a job after its shutdown_process_timeout",
    ),
    PrivateName(
        owner=f"{SUPERVISED}:_ProcOpts",
        name="close_timeout",
        kind="attribute",
        needed_by="the time that a job has to shut down",
        without="livekit-agents kills a job after its shutdown_process_timeout",
    ),
    PrivateName(
        owner=PROCESS,
        name="_shutting_down_fut",
        kind="attribute",
        needed_by="the look at a job that shuts down by itself, and the close of a process that failed",
        without="such a job is asked to shut down and counts as cut, and such a close may last",
        since="1.5.7",
    ),
    PrivateName(
        owner=PROCESS,
        name="_kill_sent",
        kind="attribute",
        needed_by="a kill without an error in the log",
        without="livekit-agents logs an error for each process that a stop kills",
    ),
    PrivateName(
        owner=PROCESS,
        name="_proc",
        kind="attribute",
        needed_by="a call whose process outlives it",
        without="livekit-agents judges such a call by the exit code of its process",
    ),
    PrivateName(
        owner=SUPERVISED,
        name="_mask_ctrl_c",
        kind="function",
        signature="()",
        needed_by="a SIGINT while a job process starts",
        without="the worker may lose such a SIGINT; the supervisor's message begins the stop",
    ),
    PrivateName(
        owner="livekit.agents.ipc.log_queue:LogQueueListener",
        name="stop",
        kind="method",
        signature="(self)",
        needed_by=EXIT,
    ),
    PrivateName(
        owner="livekit.agents.ipc.log_queue:LogQueueListener",
        name="_duplex",
        kind="attribute",
        needed_by=EXIT,
    ),
    PrivateName(
        owner="livekit.agents.utils.aio.duplex_unix:_Duplex", name="_sock", kind="attribute", needed_by=EXIT
    ),
    PrivateName(
        owner="livekit.agents.utils.http_context",
        name="_close_http_ctx",
        kind="function",
        signature="async ()",
        needed_by="the end of a job",
    ),
    PrivateName(
        owner="livekit.agents.ipc.proc_client",
        name="_dump_stack_traces",
        kind="function",
        signature="(number, frame)",
        needed_by="the stacks of a job that livekit-agents kills",
        without="livekit-agents kills a stuck job without its stacks",
    ),
    # -- multiprocessing -------------------------------------------------------------------------------
    PrivateName(owner=POPEN, name="poll", kind="method", signature="(self, flag)", needed_by=EXIT),
    PrivateName(owner=POPEN, name="sentinel", kind="attribute", needed_by=EXIT),
    PrivateName(owner=POPEN, name="returncode", kind="attribute", needed_by=EXIT),
    PrivateName(
        owner="multiprocessing.util",
        name="Finalize",
        kind="class",
        signature="(owner, call, arguments)",
        needed_by=EXIT,
    ),
    PrivateName(
        owner="multiprocessing.util",
        name="spawnv_passfds",
        kind="function",
        signature="(path, arguments, descriptors)",
        needed_by="a forkserver that is forked from its worker",
        without="the forkserver is a new interpreter, which imports livekit-agents once more",
    ),
    PrivateName(
        owner="multiprocessing.context:ForkServerContext",
        name="set_forkserver_preload",
        kind="method",
        signature="(self, modules)",
        needed_by="the end of a job",
    ),
    PrivateName(
        owner="multiprocessing.resource_tracker",
        name="ensure_running",
        kind="function",
        signature="()",
        needed_by="the shield",
    ),
    PrivateName(
        owner="multiprocessing.process",
        name="_cleanup",
        kind="function",
        signature="()",
        needed_by=START_BESIDE_END,
        without=START_FAILS,
    ),
    PrivateName(
        owner="multiprocessing.process",
        name="_children",
        kind="value",
        needed_by=START_BESIDE_END,
        without=START_FAILS,
    ),
    PrivateName(
        owner="multiprocessing.process:BaseProcess",
        name="_popen",
        kind="attribute",
        needed_by="a call whose process outlives it",
        without="livekit-agents judges such a call by the exit code of its process",
    ),
    PrivateName(
        owner="multiprocessing.process:BaseProcess",
        name="_config",
        kind="attribute",
        needed_by="the directory of the forkserver's socket",
        without="multiprocessing makes a directory in TMPDIR, which stays after a stop",
    ),
    PrivateName(
        owner="multiprocessing.forkserver",
        name="_forkserver",
        kind="value",
        needed_by="the look at the forkserver's shield",
        without="only job processes are looked at",
    ),
    PrivateName(
        owner="multiprocessing.forkserver:ForkServer",
        name="_forkserver_pid",
        kind="attribute",
        needed_by="the look at the forkserver's shield",
        without="only job processes are looked at",
    ),
    # -- the Inworld plugin ----------------------------------------------------------------------------
    PrivateName(
        owner=TTS,
        name="_ensure_session",
        kind="method",
        signature="(self)",
        needed_by="the way of TTS objects to the pool",
        without=f"TTS objects go to Inworld directly, and {PUBLIC_CLOSE}",
    ),
    PrivateName(
        owner=TTS,
        name="_get_pool",
        kind="method",
        signature="(self)",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
        until="1.8.9",
    ),
    PrivateName(
        owner=TTS,
        name="_pool",
        kind="attribute",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
        until="1.8.9",
    ),
    PrivateName(
        owner=f"{PLUGIN}.tts:_ConnectionPool",
        name="_closed",
        kind="attribute",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
        until="1.8.9",
    ),
    PrivateName(
        owner=TTS,
        name="_get_connection",
        kind="method",
        signature="(self)",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
        since="1.8.9",
    ),
    PrivateName(
        owner=TTS,
        name="_prewarm_task",
        kind="attribute",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
        since="1.8.0",
    ),
    PrivateName(
        owner=f"{PLUGIN}.tts",
        name="_InworldConnection",
        kind="class",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
    ),
    PrivateName(
        owner=CONNECTION,
        name="_contexts",
        kind="attribute",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
    ),
    PrivateName(
        owner=CONNECTION,
        name="_outbound_queue",
        kind="attribute",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
    ),
    PrivateName(
        owner=CONNECTION, name="_ws", kind="attribute", needed_by=INWORLD_CLOSE, without=PUBLIC_CLOSE
    ),
    PrivateName(
        owner=CONNECTION, name="_closed", kind="attribute", needed_by=INWORLD_CLOSE, without=PUBLIC_CLOSE
    ),
    PrivateName(
        owner=CONNECTION,
        name="_connect_task",
        kind="attribute",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
        since="1.8.9",
    ),
    PrivateName(
        owner=CONNECTION,
        name="close_context",
        kind="method",
        signature="(self, id)",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
        until="1.8.9",
    ),
    PrivateName(
        owner=CONNECTION,
        name="close_context",
        kind="method",
        signature="(self, id, cancel=)",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
        since="1.8.9",
    ),
    PrivateName(
        owner=CONNECTION,
        name="aclose",
        kind="method",
        signature="async (self)",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
    ),
    PrivateName(
        owner=f"{PLUGIN}.tts:_ContextInfo",
        name="context_id",
        kind="attribute",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
    ),
    PrivateName(
        owner=f"{PLUGIN}.tts:_ContextInfo",
        name="state",
        kind="attribute",
        needed_by=INWORLD_CLOSE,
        without=PUBLIC_CLOSE,
    ),
)


def table() -> str:
    """Return the names in Markdown, one row each."""
    rows = [
        "| owner | name | kind | needed by | without it | versions |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in NAMES:
        module, _, owner = each.owner.partition(":")
        shown = f"`{owner}` of `{module}`" if owner else f"`{module}`"
        kind = f"{each.kind} `{each.signature}`" if each.signature else each.kind
        without = each.without or "exit code 78"
        rows.append(
            f"| {shown} | `{each.name}` | {kind} | {each.needed_by} | {without} | {each.expected_of} |"
        )
    return "\n".join(rows)
