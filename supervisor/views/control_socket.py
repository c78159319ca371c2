"""The control socket: how `lastcall status` and other verbs talk to a running supervisor.

    client      {"v": 1, "verb": "status"}\\n
    supervisor  {"v": 1, "ok": true, "result": {...}}\\n      or {"v": 1, "ok": false, "error": "..."}\\n

One request, one answer, then the connection is closed. The socket has mode 0600 in a directory of the
same user (0700). Peers of other users are refused, without root. Each client has a deadline, a bound on
its request, and there is a bound on clients at once, so that none can keep the supervisor from its work.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lastcall.supervisor.config.paths import runtime_directory
from lastcall.supervisor.config.user_files import words_of
from lastcall.supervisor.errors import ConfigError, NotRunning, Refused

if TYPE_CHECKING:
    import asyncio

VERSION = 1
# Bytes of a request, and of an answer. Ours: requests are short, a status of 1000 slots has about 1 MB.
MAX_REQUEST = 16 * 1024
MAX_ANSWER = 16 << 20
# Clients at a time; further ones are closed at once. Ours: people and scripts, not a service.
MAX_CLIENTS = 32
# Seconds that a client may take, and that a verb waits for the answer. Ours: answers take milliseconds.
TIMEOUT = 5.0
# Seconds that a socket has to show that somebody listens. Ours: connect() to a listener returns at once.
LIVE_WITHIN = 1.0
WHAT_NOW = "start one with lastcall run agent.py"

Document = dict[str, Any]
Verb = Callable[[Document], Document | Awaitable[Document]]


@asynccontextmanager
async def serve(path_option: str, verbs: dict[str, Verb]) -> AsyncIterator[Path]:
    """Listen for as long as the block runs; yields the socket's path. Raises ConfigError when it can't."""
    import asyncio  # not above: the verbs need none

    path = _path(path_option)
    sock = _bind(path)
    own = _identity(path)
    clients = 0

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal clients
        clients += 1
        try:
            if clients <= MAX_CLIENTS:
                async with asyncio.timeout(TIMEOUT):
                    await _answer(reader, writer, verbs)
        except (TimeoutError, OSError, ValueError):
            pass  # a client that is slow, gone or talks nonsense has only itself to inform
        finally:
            clients -= 1
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    try:
        server = await asyncio.start_unix_server(client, sock=sock, limit=MAX_REQUEST)
        try:
            yield path
        finally:
            server.close()
    finally:
        with contextlib.suppress(OSError):
            if _identity(path) == own:  # somebody may have put something else there meanwhile
                path.unlink()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, verbs: dict[str, Verb]) -> None:
    peer = writer.get_extra_info("socket")
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid not in (0, os.getuid()):
        return
    line = await reader.readline()
    answer: dict[str, Any] = {"v": VERSION, "ok": False}
    try:
        request = json.loads(line)
        verb = verbs[request["verb"]]
        if request.get("v") != VERSION:
            raise ValueError(f"version {request.get('v')!r}")
    except (ValueError, KeyError, TypeError) as error:
        answer["error"] = f"not a request of version {VERSION}: {error!r}"
    else:
        try:
            result = verb(request)
            answer |= {"ok": True, "result": result if isinstance(result, dict) else await result}
        except Refused as error:
            answer["error"] = str(error)
    writer.write(json.dumps(answer).encode() + b"\n")
    await writer.drain()


def ask(path: Path, verb: str, **arguments: Any) -> dict[str, Any]:
    """Send one request from a verb of the command line.

    Raises NotRunning when nobody answers, Refused when the answer is no.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT)
        try:
            sock.connect(str(path))
            sock.sendall(json.dumps({"v": VERSION, "verb": verb, **arguments}).encode() + b"\n")
            data = bytearray()
            while not data.endswith(b"\n") and len(data) < MAX_ANSWER:
                chunk = sock.recv(1 << 16)
                if not chunk:
                    break
                data += chunk
            answer = json.loads(data)
        except (OSError, ValueError) as error:
            raise NotRunning(
                f"no supervisor answers at {path}: {words_of(error)}; {WHAT_NOW}, or name the socket of"
                " another with --control PATH"
            ) from error
    if not answer.get("ok"):
        raise Refused(str(answer.get("error")))
    result: dict[str, Any] = answer["result"]
    return result


def find(path_option: str) -> Path:
    """Return the socket to talk to: the one named, else the user's only one. Raises NotRunning."""
    if path_option and path_option != "auto":
        return Path(path_option)
    directory = runtime_directory()
    try:
        paths = sorted(directory.glob("*.sock")) if directory.is_dir() else []
    except (OSError, ValueError) as error:
        raise NotRunning(
            f"{directory} can't be looked into: {words_of(error)}; give --control PATH"
        ) from error
    live = [path for path in paths if _is_live(path)]
    if len(live) == 1:
        return live[0]
    if not live:
        raise NotRunning(
            f"no supervisor is running: no live socket in {directory}; {WHAT_NOW}, or name its socket with"
            " --control PATH"
        )
    names = ", ".join(str(path) for path in live)
    raise NotRunning(f"{len(live)} supervisors are running: name one with --control, of {names}")


def _path(option: str) -> Path:
    if option != "auto":
        return Path(option)
    directory = runtime_directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.lstat()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"control: {directory} can't be made: {words_of(error)}; give --control PATH"
        ) from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(
            f"control: {directory} is no directory of your own with mode 0700; mend it or give --control PATH"
        )
    for stale in directory.glob("*.sock"):
        if not _is_live(stale):
            with contextlib.suppress(OSError):
                stale.unlink()
    return directory / f"{os.getpid()}.sock"


def _bind(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        if path.exists() and not path.is_socket():
            raise ConfigError(f"control: {path} exists and is no socket; give another --control PATH")
        if path.exists() and not _is_live(path):
            with contextlib.suppress(OSError):
                path.unlink()
        sock.bind(str(path))
    except BaseException as error:
        sock.close()
        if not isinstance(error, OSError | ValueError):
            raise
        why = words_of(error)
        raise ConfigError(f"control: {path} can't be used: {why}; give --control PATH") from error
    finally:
        os.umask(before)
    return sock


def _identity(path: Path) -> tuple[int, int]:
    info = path.lstat()
    return info.st_dev, info.st_ino


def _is_live(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIVE_WITHIN)
        try:
            sock.connect(str(path))
        except OSError:
            return False
        return True
