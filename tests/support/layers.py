"""The rooms of the package, floor by floor: what the layer test holds, and the architecture page renders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A package, what it is for, and its modules and sub-packages by floor, the lowest first."""

    idea: str
    floors: tuple[str, ...]


ROOMS: dict[str, Room] = {
    "lastcall": Room(
        idea="the public API, and the `lastcall` command",
        floors=("worker", "supervisor", "__main__"),
    ),
    "lastcall.worker": Room(
        idea="hosts one AgentServer and ends it without cutting a job",
        floors=(
            "base",
            "sdk shield target scratch orphan_output exposition imported presence jobs job_memory"
            " call_channels local refused_key room_service",
            "inworld warming terminations second_jobs handovers",
            "engine",
            "job host",
            "__main__",
        ),
    ),
    "lastcall.worker.base": Room(
        idea="what supervisor and worker share",
        floors=(
            "errors clock exit_codes loggers variables process backoff garbage peers plurals randomness"
            " succession records",
            "memory budget target_form image_wire",
            "inworld_keys proxies setup_errors",
            "condition wire settings broker_settings calls_over dial_checks",
            "stopping resources channel",
        ),
    ),
    "lastcall.worker.sdk": Room(
        idea="the private names of livekit-agents and multiprocessing",
        floors=(
            "names",
            "preflight child_processes forkserver",
            "agent_server job_process process_pool scout",
            "image_process",
            "__main__",
        ),
    ),
    "lastcall.worker.job": Room(
        idea="what runs inside a job process",
        floors=(
            "teardown preload capsule deletions",
            "leaving",
            "arriving",
            "call",
            "session_state session_voice room_watch",
            "session",
            "setup",
            "rehearsed",
        ),
    ),
    "lastcall.worker.inworld": Room(
        idea="the Inworld pool, the broker that shares it, and the plugin's side",
        floors=("pool plugin", "broker", "__main__"),
    ),
    "lastcall.worker.inworld.pool": Room(
        idea="connections and the contexts on them",
        floors=(
            "errors lifecycles timings splitting close_report fault_log figures timer second_tries",
            "protocol outbox capacity pinging",
            "dialling idling context",
            "redialling",
            "connection",
            "open_connections",
            "live_contexts",
            "pool",
        ),
    ),
    "lastcall.worker.inworld.broker": Room(
        idea="one pool for all jobs of a machine, on loopback",
        floors=("json_log client passthrough", "broker", "broker_process"),
    ),
    "lastcall.worker.inworld.plugin": Room(
        idea="livekit-plugins-inworld inside a job process",
        floors=("arguments private_names", "connections", "attached", "tts"),
    ),
    "lastcall.worker.local": Room(
        idea="local LiveKit and Inworld servers, for the demo, for development and for tests",
        floors=(
            "inworld_settings speech rooms participants ticks sample",
            "room room_server twirp inworld_connection",
            "inworld_server livekit_server",
            "driven __main__",
        ),
    ),
    "lastcall.supervisor": Room(
        idea="starts workers, keeps them up, stops them",
        floors=(
            "errors signals metric_family",
            "config receipt",
            "processes",
            "logs environment outputs receipt_file inworld_endpoint",
            "fleet",
            "inworld_broker sentences",
            "program shutdown",
            "views",
            "signal_actions",
            "app",
            "deploy rehearsal picture",
            "doctor",
            "cli",
        ),
    ),
    "lastcall.supervisor.config": Room(
        idea="every option, written once; where values come from",
        floors=("paths user_files calls section", "env_file values", "options", "sources", "loading"),
    ),
    "lastcall.supervisor.receipt": Room(
        idea="what a stop did: jobs, resources, processes; and the document that says so",
        floors=("ledger record textfile", "document"),
    ),
    "lastcall.supervisor.processes": Room(
        idea="one edge of the operating system each",
        floors=(
            "reaper cgroup descendants output_reader line_breaks worker_channel socket_directory",
            "child output_writer",
            "image",
            "launch",
        ),
    ),
    "lastcall.supervisor.fleet": Room(
        idea="workers, their states, their stops and replacements",
        floors=(
            "states histogram restarts full_time",
            "worker_view stop_steps shared",
            "aftermath",
            "generation",
            "stopper",
            "slot",
            "fleet",
            "operations footprints",
            "stalls",
        ),
    ),
    "lastcall.supervisor.views": Room(
        idea="what is shown of a running supervisor, and what may be asked of it",
        floors=(
            "sd_notify control_socket worker_metrics families",
            "status",
            "metrics commands service_manager",
            "http",
        ),
    ),
    "lastcall.supervisor.deploy": Room(
        idea="units, images and manifests, from one description of the service",
        floors=("service", "template", "docker systemd k8s", "tree"),
    ),
    "lastcall.supervisor.rehearsal": Room(
        idea="the fire drill: scenes, and a verdict on each",
        floors=("scenes", "stage drill_report", "play"),
    ),
    "lastcall.supervisor.picture": Room(
        idea="a stop as a picture, read from its receipt",
        floors=("reading", "timeline", "terminal page"),
    ),
    "lastcall.supervisor.doctor": Room(
        idea="facts gathered once, and one pure check for each thing to know",
        floors=("facts", "checks probe report trial", "gather"),
    ),
    "lastcall.supervisor.cli": Room(
        idea="one module for each group of verbs",
        floors=(
            "examples plain_words plain_text local_server source_changes beside page_file progress",
            "command_line parameters asking tables drill_page",
            "demo_view",
            "live_screen",
            "demo dev operate deployment receipts",
            "run",
        ),
    ),
}
# Two modules of one name would be taken for each other. Only a room and the main module in it may share one.
SAME_NAME_ALLOWED = {"errors": "Python's convention, one tree of exceptions for each side"}


def floors_of(room: str) -> dict[str, int]:
    """Return the floor of each module and sub-package that is directly in a room."""
    return {name: n for n, floor in enumerate(ROOMS[room].floors) for name in floor.split()}


def table() -> str:
    """Render the rooms as rows of a Markdown table."""
    rows = ["| room | what | from the lowest floor up |", "| --- | --- | --- |"]
    for name, room in ROOMS.items():
        short = name.removeprefix("lastcall.").replace(".", "/") + "/"
        rows.append(f"| `{short}` | {room.idea} | {' → '.join(room.floors)} |")
    return "\n".join(rows)
