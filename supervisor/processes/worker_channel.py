"""The supervisor's end of the control channel to a worker, or to the Inworld broker."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Generic, cast

from lastcall.worker.base.channel import follow
from lastcall.worker.base.errors import WireError
from lastcall.worker.base.wire import Decoder, Heard, Said, Vocabulary, encode

# Ours: far more than a whole stop says. A process that has left so much unread does not obey.
MAX_UNREAD_BYTES = 1 << 20


class Channel(asyncio.Protocol, Generic[Said, Heard]):
    """Messages to and from one process. `on_message` gets each one, `on_lost` the end and what was wrong."""

    def __init__(
        self,
        hears: Vocabulary[Heard],
        on_message: Callable[[Heard], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._decoder = Decoder(hears)
        self._transport: asyncio.Transport | None = None
        self._wrong = ""

    @classmethod
    async def open(
        cls,
        sock: socket.socket,
        hears: Vocabulary[Heard],
        on_message: Callable[[Heard], None],
        on_lost: Callable[[str], None],
    ) -> Channel[Said, Heard]:
        """Take over a connected socket."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_connection(lambda: cls(hears, on_message, on_lost), sock=sock)
        return channel

    def say(self, message: Said) -> bool:
        """Send a message; False when there is nobody to hear it. Never blocks."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        transport.write(encode(message))
        if transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
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
                follow(self._on_message, message)
        except WireError as error:
            self._wrong = str(error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost(self._wrong)
