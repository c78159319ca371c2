"""An HTTP proxy on loopback that knows host names nobody else does, and a certificate for them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

# A proxy that nothing serves: what goes through it fails at once.
DEAD = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
CHUNK_BYTES = 65536


class Proxy:
    """`seen` is the HOST:PORT of each request; `heads` are the requests themselves."""

    def __init__(self, names: Mapping[str, int]) -> None:
        self.names = names
        self.seen: list[str] = []
        self.heads: list[str] = []
        self.url = ""

    @property
    def environment(self) -> dict[str, str]:
        return {"HTTPS_PROXY": self.url, "HTTP_PROXY": self.url}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head.decode())
            method, target, _ = head.decode().split(" ", 2)
            where = target if method == "CONNECT" else urlsplit(target).netloc
            self.seen.append(where)
            port = self.names.get(where)
            if port is None:
                writer.write(b"HTTP/1.1 502 unknown name\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
            else:
                first = b"" if method == "CONNECT" else head
                if method == "CONNECT":
                    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                await relay(reader, writer, port, first)
        writer.close()


async def relay(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, first: bytes = b""
) -> None:
    """Pass everything on between a connection and a port of this machine, until either ends."""
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
    far_writer.write(first)
    ways = [
        asyncio.create_task(pump(reader, far_writer)),
        asyncio.create_task(pump(far_reader, writer)),
    ]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        far_writer.close()
        writer.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def proxy(names: Mapping[str, int]) -> AsyncIterator[Proxy]:
    """Serve a proxy that knows `names`: the port of this machine for each HOST:PORT."""
    made = Proxy(names)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()


def certificate(directory: Path, *names: str) -> Path:
    """Return a PEM file with a key, and with a certificate for the names that is signed by this key."""
    key, file = directory / "key.pem", directory / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tests"),
            *("-addext", "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)),
            *("-keyout", str(key), "-out", str(file)),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    (directory / "both.pem").write_text(key.read_text() + file.read_text())
    return directory / "both.pem"


@asynccontextmanager
async def tls(port: int, pem: Path) -> AsyncIterator[int]:
    """Serve TLS in front of a port of this machine; yield the port of that."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await relay(reader, writer, port)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
