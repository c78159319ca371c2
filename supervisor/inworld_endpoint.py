"""Where jobs reach the Inworld broker, and with which key the broker reaches Inworld.

A broker that dies is replaced. The endpoint outlives each broker, and hands three things to the next:

    the listening socket    the port stays, and new connections wait in the backlog meanwhile
    the token               jobs may show it
    the lifeline            a pipe whose write end every worker holds

A broker is told the API key over
its control socket, and has it in no variable and no argument. Workers have INWORLD_API_KEY as the user has
set it, and the key of `api_key_file` not at all.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping

from lastcall.supervisor.config import Inworld
from lastcall.supervisor.config.user_files import read_text
from lastcall.supervisor.errors import ConfigError, Unreadable
from lastcall.supervisor.processes.child import Child, high, pipe, spawn
from lastcall.supervisor.processes.reaper import ExitStatus, Reaper
from lastcall.worker.base import variables
from lastcall.worker.base.broker_settings import BrokerSettings
from lastcall.worker.base.dial_checks import check_key, check_proxy
from lastcall.worker.base.inworld_keys import digest
from lastcall.worker.base.stopping import SHIELDED

# The broker's own descriptors, as its settings name them.
CONTROL_FD, LISTEN_FD, LIFELINE_FD = 3, 4, 5
# Options of the pool that are not among `BrokerSettings`: a broker is told the key over its control socket.
NOT_FOR_BROKERS = ("enabled", "api_key_file")
# Connections that wait until a new broker accepts them. Ours: more than the jobs of one machine.
BACKLOG = 512
# The variables that a broker gets of the supervisor's: to find programs and certificates, and the way out.
PASSED_ON = frozenset({"PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH"})
PASSED_ON |= {"VIRTUAL_ENV", "SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}
PASSED_ON |= {"http_proxy", "https_proxy", "no_proxy"}


def key_of(config: Inworld, environment: Mapping[str, str], *, again: bool = False) -> str:
    """Return the API key. Blocks, as `read_text` does. Raises ConfigError for none, or a wrong one."""
    if not config.api_key_file:
        key = environment.get(variables.INWORLD_API_KEY, "").strip()
        if not key:
            raise ConfigError("inworld.enabled: no API key: set INWORLD_API_KEY, or inworld.api_key_file")
        return _checked(key, variables.INWORLD_API_KEY)
    try:
        key = read_text(config.api_key_file, again=again).strip()
    except Unreadable as error:
        raise ConfigError(f"inworld.api_key_file: {config.api_key_file!r} {error}") from error
    if not key:
        raise ConfigError(f"inworld.api_key_file: {config.api_key_file!r} is empty; expected the API key")
    return _checked(key, f"inworld.api_key_file: {config.api_key_file!r}")


def _checked(key: str, source: str) -> str:
    try:
        check_key(key)
    except ValueError as error:
        raise ConfigError(f"{source}: got {error}") from error
    return key


def check_way_out(environment: Mapping[str, str]) -> None:
    """Refuse an environment with a proxy that the broker could not use. Raises ConfigError."""
    try:
        check_proxy(environment)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in PASSED_ON if name in environment}


class BrokerEndpoint:
    """The listening socket, the token and the lifeline; `spawn` starts a broker on them.

    `close` and `grace` are seconds, as in `BrokerSettings`. `environment` is the supervisor's. Raises
    ConfigError for a wrong proxy in it.
    """

    def __init__(
        self, config: Inworld, *, close: float, grace: float, environment: Mapping[str, str]
    ) -> None:
        check_way_out(environment)
        self._settings = BrokerSettings(
            control_fd=CONTROL_FD,
            listen_fd=LISTEN_FD,
            lifeline_fd=LIFELINE_FD,
            token=secrets.token_urlsafe(32),
            close=close,
            grace=grace,
            **{name: getattr(config, name) for name in config.options if name not in NOT_FOR_BROKERS},
        )
        self._environment = _passed_on(environment)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self._lifeline, self._lifeline_of_workers = pipe()

    @property
    def lifeline(self) -> int:
        """The descriptor that a worker holds for as long as it lives."""
        return self._lifeline_of_workers

    def differing(self, environment: Mapping[str, str]) -> list[str]:
        """Return the variables of which a broker would get other values from this environment."""
        new = _passed_on(environment)
        return sorted(name for name in PASSED_ON if new.get(name) != self._environment.get(name))

    def environment_for_workers(self, environment: Mapping[str, str], key: str) -> dict[str, str]:
        """Return the environment with the way to the broker in it. `key` is the pool's.

        The key of the environment counts as the pool's too: a TTS that is made without a key uses that one.
        """
        port = self._listener.getsockname()[1]
        token = self._settings.token
        keys = {key, environment.get(variables.INWORLD_API_KEY, "").strip()} - {""}
        return {
            **environment,
            variables.INWORLD_WS_URL: f"ws://127.0.0.1:{port}/",
            variables.INWORLD_URL: f"http://127.0.0.1:{port}/",
            variables.INWORLD_TOKEN: token,
            variables.INWORLD_KEYS: " ".join(sorted(digest(token, each) for each in keys)),
        }

    def spawn(
        self, *, mark: str, reaper: Reaper, on_exit: Callable[[ExitStatus], None]
    ) -> tuple[Child, socket.socket, int]:
        """Start a broker; return its process, its control socket, and the read end of its output.

        `mark` is the value by which the supervisor finds the broker's descendants. Raises SpawnError and
        OSError.
        """
        environment = {
            **self._environment,
            variables.MARK: mark,
            variables.COMPANION: self._settings.to_json(),
            "PYTHONUNBUFFERED": "1",
        }
        ours: list[int] = []
        theirs: dict[int, int] = {}
        control, far = socket.socketpair()
        try:
            out, out_write = pipe()
            ours.append(out)
            theirs = {
                0: high(os.open(os.devnull, os.O_RDONLY)),
                1: out_write,
                2: high(os.dup(out_write)),
                CONTROL_FD: high(far.detach()),
                LISTEN_FD: high(os.dup(self._listener.fileno())),
                LIFELINE_FD: high(os.dup(self._lifeline)),
            }
            child = spawn(
                [sys.executable, "-P", "-m", "lastcall.worker.inworld"],
                environment=environment,
                descriptors=theirs,
                blocked=SHIELDED,
                reaper=reaper,
                on_exit=on_exit,
            )
        except BaseException:
            for fd in ours:
                os.close(fd)
            control.close()
            raise
        finally:
            for fd in theirs.values():
                os.close(fd)
        return child, control, out

    def close(self) -> None:
        """Close every descriptor."""
        self._listener.close()
        for fd in (self._lifeline, self._lifeline_of_workers):
            os.close(fd)
