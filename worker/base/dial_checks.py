"""Checks of URLs and keys that the user gives. Each error says what was expected, and quotes no secret."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from lastcall.worker.base.proxies import PROXY_VARIABLES

# Characters of an API key. Ours: a key has about a hundred, and servers take headers of 8 kB.
MAX_KEY = 4096


def check_host(host: str) -> None:
    """Refuse a name that no resolver takes: resolving one raises UnicodeError. Raises ValueError."""
    try:
        host.encode("idna")
    except UnicodeError as error:
        form = "expected labels of 1 to 63 characters, with dots between them"
        raise ValueError(f"{host!r} can't be the name of a host: {form}") from error


def check_url(value: str, schemes: tuple[str, ...]) -> None:
    """Refuse a URL that an HTTP client could not use, or that has credentials in it. Raises ValueError."""
    form = f"expected {schemes[-1]}://HOST/"
    if "@" in value:
        # Before all else, because other errors quote a part of the URL.
        raise ValueError(f"{form} without user and password")
    if not value.isprintable() or " " in value:
        raise ValueError(f"{form} without spaces and line breaks")
    try:
        parts = urlsplit(value)
        host = parts.hostname or ""
        is_url = parts.scheme in schemes and bool(host) and parts.port != 0
        check_host(host)
    except ValueError as error:
        raise ValueError(f"{form}; {error}") from error
    if not is_url:
        raise ValueError(form)
    if not _is_address(host) and not re.fullmatch(r"[\w.-]+", host):
        raise ValueError(f"{form}; {host!r} can't be the name of a host")


def check_key(key: str) -> None:
    """Refuse a key that can't be sent in a header, as one with a line break. Raises ValueError."""
    expected = "expected the key as the Inworld portal gives it, one word of ASCII characters"
    if len(key) > MAX_KEY:
        raise ValueError(f"{len(key)} characters, {expected}")
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(f"a space, a line break or another character that no key has, {expected}")


def check_proxy(environ: Mapping[str, str]) -> None:
    """Refuse a proxy that aiohttp could not use. Its credentials are allowed. Raises ValueError."""
    name = next((name for name in PROXY_VARIABLES if environ.get(name)), None)
    if name is None:
        return
    scheme, slashes, rest = environ[name].partition("://")
    try:
        check_url(f"{scheme}{slashes}{rest.rpartition('@')[2]}", ("https", "http"))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
