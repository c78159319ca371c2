"""The control channel as a worker, or the Inworld broker, holds it: the end that faces the supervisor."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Generic, cast

from lastcall.worker.base.errors import WireError
from lastcall.worker.base.wire import Beat, BrokerBeat, Decoder, Heard, Said, Vocabulary, encode

# Ours: some thousand beats. A supervisor that has left so much unread is stuck, and beats would only pile up.
MAX_UNREAD_BYTES = 1 << 20


def follow(on_message: Callable[[Heard], None], message: Heard) -> None:
    """Hand over a message. An exception goes to the loop's exception handler, and to nobody else.

    One that left `data_received` would close the channel, and the worker would end with it.
    """
    try:
        on_message(message)
    except Exception as error:
        context = {"message": f"not followed: {type(message).__name__}", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)


class Control(asyncio.Protocol, Generic[Said, Heard]):
    """Send and receive control messages; without a socket everything sent goes nowhere.

    Before the loop runs, while the target is loaded, `say` writes to the socket itself. `on_message` gets
    each message, `on_lost` is called once when the supervisor is gone or talks nonsense.
    """

    def __init__(
        self,
        sock: socket.socket | None,
        hears: Vocabulary[Heard],
        on_message: Callable[[Heard], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._on_message = on_message
        self._on_lost = on_lost
        self._decoder = Decoder(hears)
        self._transport: asyncio.WriteTransport | None = None
        self._lost = sock is None

    @property
    def is_supervised(self) -> bool:
        return self._sock is not None

    def say(self, message: Said) -> None:
        """Send one message. Never blocks: a supervisor that does not read loses beats, then everything."""
        if self._lost:
            return
        line = encode(message)
        if self._transport is None:
            assert self._sock is not None
            try:
                self._sock.sendall(line)
            except OSError:
                self._lost = True  # read as end of file once the loop runs
        elif (
            not isinstance(message, Beat | BrokerBeat)
            or self._transport.get_write_buffer_size() < MAX_UNREAD_BYTES
        ):
            self._transport.write(line)

    async def connect(self) -> None:
        """Hand the socket to the running loop."""
        if self._sock is not None:
            self._sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: self, sock=self._sock)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's class is no subclass of it

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                follow(self._on_message, message)
        except WireError:
            assert self._transport is not None
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._on_lost()
