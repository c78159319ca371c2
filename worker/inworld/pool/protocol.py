r"""Inworld's WebSocket frames, in both directions, as pure functions.

A client sends one payload key and a context id:

    {"create": {"voiceId": …, "modelId": …, …}, "contextId": "c1"}
    {"send_text": {"text": "Hello.", "flush_context": {}}, "contextId": "c1"}
    {"flush_context": {}, …}  {"update_config": {…}, …}  {"close_context": {}, …}  {"cancel_context": {}, …}

The server answers with results, or with an error that belongs to no context:

    {"result": {"contextId": "c1", "status": {"code": 0, …}, "contextCreated": {…}}}
    {"result": {"contextId": "c1", "audioChunk": {"audioContent": "<base64>", "timestampInfo": {…}}}}
    {"result": {"contextId": "c1", "status": {"code": 5, "message": "Context c1 not found …"}}}
    {"error": {"code": 3, "message": "…"}}

Nearly all bytes are base64 audio. The audio is neither decoded nor parsed here: base64 has no quote in it, so
one search finds the end of the string. The rest of the frame is small, and is parsed whole. A search for the
other keys would be faster, but the order of keys is not fixed, and such a search would now and then be wrong.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass
from typing import Any

from lastcall.worker.inworld.pool.errors import UNKNOWN, Malformed

# Bytes of the largest frame that is read. Ours: thirty seconds of 48 kHz 16-bit audio in base64 fit.
MAX_FRAME = 4 * 1024 * 1024
# Characters of an error text that are passed on. Ours: longer than any text that Inworld is known to send.
MAX_ERROR_TEXT = 500

Document = dict[str, Any]


class Kind(enum.Enum):
    """The kind of a frame of the server."""

    CREATED = "contextCreated"
    UPDATED = "contextUpdated"
    AUDIO = "audioChunk"
    FLUSHED = "flushCompleted"
    CLOSED = "contextClosed"
    STATUS = "status"  # an error that names its context
    ERROR = "error"  # an error that names no context
    OTHER = ""  # a result of a kind that is not known yet


class Action(enum.Enum):
    """The request of a frame of a client."""

    CREATE = "create"
    TEXT = "send_text"
    FLUSH = "flush_context"
    UPDATE = "update_config"
    CLOSE = "close_context"
    CANCEL = "cancel_context"
    OTHER = ""


RESULTS = {kind.value: kind for kind in (Kind.AUDIO, Kind.CREATED, Kind.CLOSED, Kind.FLUSHED, Kind.UPDATED)}
ACTIONS = {action.value: action for action in Action if action is not Action.OTHER}
ENCODER = json.JSONEncoder(separators=(",", ":"))
AUDIO_CONTENT = re.compile(r'"audioContent"\s*:\s*"')


@dataclass(slots=True, kw_only=True)
class Frame:
    """One frame of the server. `text` is the frame as it came; `audio` the span of base64 in it.

    Nobody changes a frame. It is not frozen, because a frozen dataclass takes twice as long to make.
    """

    kind: Kind
    context: str | None
    text: str
    code: int = 0
    message: str = ""
    audio: tuple[int, int] = (0, 0)

    @property
    def payload(self) -> str:
        """The audio of the frame, in base64."""
        return self.text[slice(*self.audio)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One frame of a client. `document` is all of it."""

    action: Action
    context: str | None
    document: Document


def parse(text: str) -> Frame:
    """Return the frame of a server's text message. Raises Malformed.

    Unknown keys and a missing or null status are fine; a status code that is no number counts as an error.
    """
    match = AUDIO_CONTENT.search(text)
    if match is None:
        envelope, audio = text, (0, 0)
    else:
        start = match.end()
        end = text.find('"', start)
        if end < 0:
            raise Malformed(f"frame ends within its audio: {text[:80]!r}")
        envelope, audio = text[:start] + text[end:], (start, end)
    document = _document(envelope)
    result = document.get("result")
    if isinstance(document.get("error"), dict):
        code, message = _status(document["error"])
        return Frame(kind=Kind.ERROR, context=None, text=text, code=code or UNKNOWN, message=message)
    if not isinstance(result, dict):
        raise Malformed(f"frame has neither a result nor an error: {text[:80]!r}")
    context = result.get("contextId")
    if not isinstance(context, str):
        context = None
    code, message = _status(result.get("status"))
    if code:
        kind = Kind.ERROR if context is None else Kind.STATUS
        return Frame(kind=kind, context=context, text=text, code=code, message=message)
    for key, kind in RESULTS.items():
        if key in result:
            return Frame(kind=kind, context=context, text=text, audio=audio)
    return Frame(kind=Kind.OTHER, context=context, text=text)


def parse_request(text: str) -> Request:
    """Return the request of a client's text message. Raises Malformed."""
    document = _document(text)
    context = document.get("contextId")
    if context is not None and not isinstance(context, str):
        raise Malformed(f"contextId is {context!r:.80}, expected a string")
    actions = [action for key, action in ACTIONS.items() if key in document]
    if len(actions) > 1:
        names = ", ".join(action.value for action in actions)
        raise Malformed(f"frame asks for {names} at once, expected one of them")
    return Request(action=actions[0] if actions else Action.OTHER, context=context, document=document)


def encode(document: Document, context: str) -> str:
    """Return the text of a client's frame, addressed to a context."""
    return ENCODER.encode({**document, "contextId": context})


def create(config: Document) -> Document:
    return {"create": config}


def send_text(text: str) -> Document:
    return {"send_text": {"text": text}}


def flush() -> Document:
    return {"flush_context": {}}


def close() -> Document:
    return {"close_context": {}}


def cancel() -> Document:
    return {"cancel_context": {}}


def status(context: str | None, code: int, message: str) -> str:
    """Return the text of a server's error: of one context, or of none."""
    error = {"code": code, "message": message, "details": []}
    if context is None:
        return json.dumps({"error": error})
    return json.dumps({"result": {"contextId": context, "status": error}})


def readdress(text: str, old: str, new: str) -> str:
    """Return a server's frame with another context id in place of `old`, the rest as it was.

    `old` is an id that the pool has drawn at random, with a hyphen in it, so that the id stands nowhere else.
    """
    return text.replace(old, json.dumps(new)[1:-1])


def _document(text: str) -> Document:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"frame is not JSON: {text[:80]!r}") from error
    if not isinstance(document, dict):
        raise Malformed(f"frame is not an object: {text[:80]!r}")
    return document


def _status(status: object) -> tuple[int, str]:
    if not isinstance(status, dict):
        return 0, ""
    code = status.get("code", 0)
    if not isinstance(code, int):
        code = UNKNOWN if code else 0
    message = status.get("message")
    return code, message[:MAX_ERROR_TEXT] if isinstance(message, str) else ""
