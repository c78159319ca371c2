"""The HTTP proxy, as livekit-agents finds it, for everything of lastcall that takes the same way.

livekit-agents (worker.py, the default of `http_proxy`) reads HTTPS_PROXY, then HTTP_PROXY, in capitals, for
its connection to LiveKit and for the HTTP session of each job. It hands the proxy to aiohttp itself, so that
NO_PROXY has no effect.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY")


def proxy_of(environ: Mapping[str, str]) -> str | None:
    """Return the URL of the proxy, or None for a direct way."""
    return next((environ[name] for name in PROXY_VARIABLES if environ.get(name)), None)


def proxy_to(url: str, environ: Mapping[str, str]) -> str | None:
    """Return the proxy on the way to a URL: none to this machine, whose loopback no proxy reaches."""
    return None if is_loopback(urlsplit(url).hostname or "") else proxy_of(environ)


def is_loopback(host: str) -> bool:
    """Tell whether the name or address of a host means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
