"""The settings that the Inworld broker's process is given at its start."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from dataclasses import asdict, fields

from lastcall.worker.base import variables
from lastcall.worker.base.budget import DEFAULT_GRACE
from lastcall.worker.base.records import dataclass

# The broker's name in status, log and receipt.
COMPANION_NAME = "inworld-pool"
# Inworld's documentation of the streaming and of the plain text-to-speech API.
INWORLD_WS_URL = "wss://api.inworld.ai/"
INWORLD_URL = "https://api.inworld.ai/"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSettings:
    """Descriptors, token, budget and limits of one broker; times are in seconds.

    The supervisor (`supervisor.inworld_endpoint`) hands the value over as JSON in one variable.

    `control_fd`: the broker's end of the control channel. A broker without one has no supervisor.
    `listen_fd`: the listening socket, of 127.0.0.1, which the supervisor keeps for the next broker.
    `lifeline_fd`: the read end of a pipe whose write end each worker holds, or None.
    `token`: the secret that a job shows in place of the API key.
    `close`: the time for a close without a deadline.
    `grace`: the longest time that the broker serves on once the supervisor is lost.
    `beat`: the time between two beats.
    The other fields are those of [inworld] in the configuration.
    """

    control_fd: int | None = None
    listen_fd: int | None = None
    lifeline_fd: int | None = None
    token: str
    close: float = 5.0
    grace: float = DEFAULT_GRACE
    beat: float = 1.0
    ws_url: str = INWORLD_WS_URL
    base_url: str = INWORLD_URL
    max_connections: int = 20
    max_contexts: int = 5
    idle_connection_timeout: float = 300.0
    acquire_timeout: float = 30.0

    def to_json(self) -> str:
        """Return the settings as the text that `take` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> BrokerSettings | None:
        """Read the settings and remove them from the environment; None for a process without a supervisor.

        After an upgrade the supervisor is older than the broker that it starts again: keys that are not known
        are left out, keys that are missing have their defaults.
        """
        text = environ.pop(variables.COMPANION, "")
        if not text:
            return None
        values = json.loads(text)
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})
