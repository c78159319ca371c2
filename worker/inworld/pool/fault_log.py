"""Exceptions that nobody foresaw: each is a fault in lastcall, and ends only the thing that raised it."""

from __future__ import annotations

import logging
import traceback

log = logging.getLogger("lastcall.inworld")

# Places in the code whose traceback is remembered as logged. Ours: a bound, far above the faults of one
# version.
MAX_PLACES = 100


class FaultLog:
    """Counts faults, and logs the traceback of each place once. A fault may come back with every request."""

    def __init__(self) -> None:
        self.count = 0
        self._places: set[tuple[str, str, int]] = set()

    def note(self, what: str, error: Exception, **fields: object) -> None:
        """Count a fault, and log it: `what` says what has ended."""
        self.count += 1
        leaf = error
        while isinstance(leaf, ExceptionGroup):  # a TaskGroup's: the traceback is that of its first member
            leaf = leaf.exceptions[0]
        frames = traceback.extract_tb(leaf.__traceback__)
        place = (type(leaf).__name__, *((frames[-1].filename, frames[-1].lineno or 0) if frames else ("", 0)))
        if place not in self._places and len(self._places) < MAX_PLACES:
            self._places.add(place)
            fields["traceback"] = "".join(traceback.format_exception(error))
        log.error("fault in lastcall", extra={"what": what, "error": type(leaf).__name__, **fields})
