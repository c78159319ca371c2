"""The API keys of the pool, as digests, by which jobs and the broker know a key again.

A job does not get the key of `api_key_file`, and has to tell it from the key of another account all the same.
The local token keys the digests, and it is new for each supervisor.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable


def digest(token: str, key: str) -> str:
    """Return the digest of a key, in hexadecimal."""
    return hmac.new(_bytes(token), _bytes(key), hashlib.sha256).hexdigest()


def is_known(key: str, *, token: str, digests: Iterable[str]) -> bool:
    """Tell whether a key is the token, or has one of the digests. The time does not depend on the key."""
    found = hmac.compare_digest(_bytes(key), _bytes(token))
    own = digest(token, key)
    for each in digests:
        found |= hmac.compare_digest(own, each)
    return found


def _bytes(text: str) -> bytes:
    # aiohttp decodes a header that is no UTF-8 in this way.
    return text.encode("utf-8", "surrogateescape")
