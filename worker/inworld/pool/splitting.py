"""Text cut into pieces that one `send_text` may carry."""

from __future__ import annotations

# Characters in one send_text: Inworld's documentation of the text-to-speech WebSocket, under limits.
MAX_TEXT = 1000


def split(text: str, limit: int = MAX_TEXT) -> list[str]:
    """Return pieces of at most `limit` characters that joined are the text; cut after white space if any.

    The server joins the pieces, so a cut within a word is heard only if the server flushes just there, and a
    cut after white space is never heard. Only the latter half of a piece is searched, so that pieces stay
    large.
    """
    pieces = []
    start = 0
    while len(text) - start > limit:
        end = start + limit
        cut = next((at for at in range(end, end - limit // 2, -1) if text[at - 1].isspace()), end)
        pieces.append(text[start:cut])
        start = cut
    pieces.append(text[start:])
    return pieces
