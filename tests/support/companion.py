"""The broker's process, with a test in the place of its supervisor."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from lastcall.worker.base.wire import OF_BROKER, BrokerHears, BrokerSays, Decoder, Key, Serving, encode
from lastcall.worker.inworld.broker.broker import listen
from lastcall.worker.local.inworld_server import InworldServer
from tests.support.broker import TOKEN
from tests.support.inworld import until

ROOT = Path(__file__).parent.parent.parent
Said = TypeVar("Said", bound=BrokerSays)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Companion:
    """One broker process and the supervisor's ends of what it was given."""

    def __init__(self, server: InworldServer, listener: socket.socket, log: Path, **settings: Any) -> None:
        self.server = server
        self.messages: list[BrokerSays] = []
        self.received = b""
        self.ws_url = f"ws://127.0.0.1:{listener.getsockname()[1]}/"
        self.log = log
        self._decoder = Decoder(OF_BROKER)
        self._control, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        fds = (theirs.fileno(), listener.fileno(), lifeline)
        values = {
            "control_fd": fds[0],
            "listen_fd": fds[1],
            "lifeline_fd": fds[2],
            "token": TOKEN,
            "ws_url": server.ws_url,
            "base_url": server.base_url,
            "beat": 0.05,
            **settings,
        }
        self.environment = {**os.environ, "LASTCALL_COMPANION": json.dumps(values)}
        self.environment.pop("INWORLD_API_KEY", None)
        # Inherited, as the contract says.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with open(log, "ab") as file:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "lastcall.worker.inworld"],
                    cwd=ROOT,
                    env={**self.environment, "PYTHONPATH": str(ROOT)},
                    stdout=file,
                    stderr=file,
                    pass_fds=fds,
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        os.close(lifeline)
        self._control.setblocking(False)
        asyncio.get_running_loop().add_reader(self._control.fileno(), self._read)

    def _read(self) -> None:
        try:
            chunk = self._control.recv(65536)
        except ConnectionError:
            chunk = b""
        if not chunk:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
        self.received += chunk
        self.messages += self._decoder.feed(chunk)

    def say(self, message: BrokerHears) -> None:
        self._control.send(encode(message))

    async def heard(self, kind: type[Said]) -> Said:
        """Wait for a message of the process's."""
        found: list[Said] = []

        def look() -> bool:
            found[:] = [message for message in self.messages if isinstance(message, kind)]
            return bool(found)

        await until(look, 30.0)
        return found[-1]

    async def serve(self) -> None:
        self.say(Key(key=self.server.api_key))
        await self.heard(Serving)

    def lose(self) -> None:
        """Be a supervisor that was killed."""
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()

    def let_go(self) -> None:
        """Be the last worker, and end."""
        fd, self._lifeline = self._lifeline, -1
        if fd >= 0:
            os.close(fd)

    async def exit(self) -> int:
        await until(lambda: self.process.poll() is not None, 30.0)
        assert self.process.returncode is not None
        return self.process.returncode

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.let_go()
        if self._control.fileno() >= 0:
            self.lose()


@asynccontextmanager
async def companion(tmp_path: Path, **options: Any) -> AsyncIterator[Companion]:
    server_options = {key: options.pop(key) for key in ("faults", "speech", "limits") if key in options}
    async with InworldServer(**server_options) as server:
        with listen() as listener:
            one = Companion(server, listener, tmp_path / "log", **options)
            try:
                yield one
            finally:
                one.end()
