"""The supervisor's end of a worker's control socketpair."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

from lastcall.worker.base.errors import WireError
from lastcall.worker.base.wire import Decoder, Message, encode

# A worker that does not read its orders is not obeying them; what piles up is dropped with the channel.
MAX_UNREAD = 1 << 20


class Channel(asyncio.Protocol):
    """Messages to and from one worker. `on_message` gets each one, `on_lost` the end, with what was wrong."""

    def __init__(self, on_message: Callable[[Message], None], on_lost: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self._wrong = ""

    @classmethod
    async def open(
        cls, sock: socket.socket, on_message: Callable[[Message], None], on_lost: Callable[[str], None]
    ) -> Channel:
        """Take over a connected socket."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_connection(lambda: cls(on_message, on_lost), sock=sock)
        return channel

    def say(self, type: str, **fields: Any) -> bool:
        """Send a message; False when there is nobody to hear it. Never blocks."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        transport.write(encode(type, **fields))
        if transport.get_write_buffer_size() > MAX_UNREAD:
            self._wrong = "does not read its control socket"
            transport.abort()
            return False
        return True

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class is no subclass of it

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._on_message(message)
        except WireError as error:
            self._wrong = str(error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost(self._wrong)
