"""Output that can't block: a bounded queue in front of a descriptor, written by a thread.

Whoever reads our standard output may be slow, stopped or gone. Making the descriptor non-blocking would
change it for everybody who shares it, the user's shell included; so a thread does the writing and may hang
there. What finds the queue full is dropped and counted, whole lines at a time.
"""

from __future__ import annotations

import os
import threading
from collections import deque

LIMIT = 4 << 20


class Sink:
    """Lines for one descriptor. Never blocks, never raises because of the reader."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._queue: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._writing = False
        self._broken = False
        self._closed = False
        self._ready = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, name=f"sink-{fd}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self._dropped

    def write(self, data: bytes) -> None:
        """Queue whole lines, or drop them when the reader is too far behind."""
        with self._ready:
            if self._broken or self._closed:
                return
            if self._size + len(data) > LIMIT:
                self._dropped += data.count(b"\n")
                return
            self._queue.append(data)
            self._size += len(data)
            self._ready.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until everything queued has been written; False when the reader did not let it, in seconds."""
        with self._ready:
            return self._ready.wait_for(
                lambda: self._broken or (not self._queue and not self._writing), timeout
            )

    def _write_all(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._queue)
                data = b"".join(self._queue)
                self._queue.clear()
                self._size = 0
                self._writing = True
            ok = self._write(data)
            with self._ready:
                self._writing = False
                self._broken = self._broken or not ok
                self._ready.notify_all()
            if not ok:
                return

    def _write(self, data: bytes) -> bool:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                # Somebody else made it non-blocking; this thread may wait where they would not.
                threading.Event().wait(0.01)
            except OSError:
                return False  # closed, or the reader is gone: there is nobody to tell
        return True
