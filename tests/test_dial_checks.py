"""URLs and keys are refused where they are read, and what is let through can be dialled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urljoin

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from lastcall.supervisor.config import Inworld
from lastcall.supervisor.errors import ConfigError
from lastcall.supervisor.inworld_endpoint import BrokerEndpoint, key_of
from lastcall.worker.base.dial_checks import check_key, check_proxy, check_url
from lastcall.worker.base.inworld_keys import is_known
from lastcall.worker.inworld.pool.dialling import PATH, DialError, dial

ODD = st.text("aB0.-_~%:@/[]?#\\\\!$&'()*+,;=| \n\t\u00e4\u212a\u3002\ud800", max_size=20)


@given(ODD)
def test_an_url_that_is_accepted_can_be_dialled(rest: str) -> None:
    """aiohttp finds a host and a port in it, and nothing that it would refuse with another header."""
    url = f"wss://{rest}"
    try:
        check_url(url, ("ws", "wss"))
    except ValueError:
        return
    found = URL(urljoin(url, PATH))
    assert found.host and found.port and not found.user and not found.password


@given(st.text(max_size=20))
def test_a_key_that_is_accepted_can_be_sent(key: str) -> None:
    """It is one word of a header."""
    try:
        check_key(key)
    except ValueError as error:
        assert len(key) < 4 or key not in str(error)
        return
    assert f"Basic {key}".encode("latin-1").split() == [b"Basic", key.encode()]


@pytest.mark.parametrize(
    "key", ["secret\nkey", "secret\x00key", "Basic secretkey", "secr\u00e9tkey", "secret" * 1000]
)
def test_a_wrong_key_is_one_line_without_it(key: str, tmp_path: Path) -> None:
    """From the variable and from the file, at the start and at a reload: the source, and what is expected."""
    file = tmp_path / "key"
    file.write_text(key)
    for config, source in (
        (Inworld(enabled=True), "INWORLD_API_KEY: got "),
        (Inworld(enabled=True, api_key_file=str(file)), f"inworld.api_key_file: {str(file)!r}: got "),
    ):
        for again in (False, True):
            with pytest.raises(ConfigError) as error:
                key_of(config, {"INWORLD_API_KEY": key}, again=again)
            text = str(error.value)
            assert text.startswith(source) and "expected the key as the Inworld portal gives it" in text
            assert "\n" not in text and "tkey" not in text and "secretsecret" not in text
    assert key_of(Inworld(enabled=True), {"INWORLD_API_KEY": " good\n"}) == "good"


@pytest.mark.parametrize("proxy", ["proxy:3128", "socks5://user:secret@proxy", "http://user:secret@a..b"])
def test_a_wrong_proxy_is_one_line(proxy: str) -> None:
    """The variable is named; a password in it is not shown."""
    with pytest.raises(ConfigError) as error:
        BrokerEndpoint(Inworld(), close=1, grace=1, environment={"HTTPS_PROXY": proxy})
    text = str(error.value)
    assert text.startswith("HTTPS_PROXY: expected http://HOST/") and "secret" not in text
    check_proxy({"HTTPS_PROXY": "http://user:sec/ret@proxy.test:3128", "HTTP_PROXY": "nonsense"})


def test_what_workers_are_given() -> None:
    """Opaque ones too: the user's key as it is or none, and a token in a variable of lastcall's only."""
    endpoint = BrokerEndpoint(Inworld(), close=1, grace=1, environment={})
    try:
        for users in ({"INWORLD_API_KEY": "user's"}, {"INWORLD_API_KEY": ""}, {}):
            given = endpoint.environment_for_workers({"PATH": "/bin", **users}, "of the pool")
            assert {name: value for name, value in given.items() if "LASTCALL_" not in name} == {
                "PATH": "/bin",
                **users,
            }
            token = given["LASTCALL_INWORLD_TOKEN"]
            assert [name for name, value in given.items() if token in value] == ["LASTCALL_INWORLD_TOKEN"]
            assert "of the pool" not in given.values()
            digests = given["LASTCALL_INWORLD_KEYS"].split()
            assert is_known("of the pool", token=token, digests=digests)
            assert is_known("user's", token=token, digests=digests) is (
                users.get("INWORLD_API_KEY") == "user's"
            )
    finally:
        endpoint.close()


async def test_the_password_of_a_proxy_is_told_to_nobody() -> None:
    """A proxy that refuses is named by its status: aiohttp's own text has the URL with the password."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    proxy = f"http://user:s3cret@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, aiohttp.ClientSession(proxy=proxy) as session:
        with pytest.raises(DialError, match="the proxy answers 407") as raised:
            await dial(session, "wss://inworld.test/", "key", timeout=10, close_timeout=1)
    assert "s3cret" not in str(raised.value) and raised.value.failure == "failed"
