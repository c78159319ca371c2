"""Output that can't block: a bounded queue in front of a descriptor, written by a thread.

The reader of the supervisor's standard output may be slow, stopped or gone. Making the descriptor
non-blocking would change it for every process that shares it, the user's shell included; so a thread does the
writing and may hang there. Lines that find the queue full are dropped and counted, whole lines at a time.
"""

from __future__ import annotations

import os
import threading
from collections import deque

from lastcall.supervisor.processes.line_breaks import broken

# Bytes that wait for a slow reader. Ours: a minute of a chatty fleet, and little beside a worker's memory.
MAX_QUEUED = 4 << 20


class OutputWriter:
    """Lines for one descriptor. Never blocks, never raises because of the reader."""

    def __init__(self, fd: int) -> None:
        # Lines dropped so far because the reader was too far behind.
        self.dropped = 0
        # Set for a log that people read: lines that are too wide for a terminal are broken between words.
        self.breaks_lines = False
        self._fd = fd
        self._queue: deque[bytes] = deque()
        self._size = 0
        self._told = 0
        self._writing = False
        self._broken = False
        self._ready = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, name=f"output-{fd}", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Queue whole lines, or drop them when the reader is too far behind."""
        with self._ready:
            if self._broken:
                return
            if self._size + len(data) > MAX_QUEUED:
                self.dropped += data.count(b"\n")
                return
            self._queue.append(data)
            self._size += len(data)
            self._ready.notify_all()

    def take_dropped(self) -> int:
        """Return how many lines were dropped since the last time; 0 while the reader is far behind."""
        if self._size > MAX_QUEUED // 2:
            return 0
        count, self._told = self.dropped - self._told, self.dropped
        return count

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
                self._writing = True
            ok = self._write(self._laid_out(data))
            with self._ready:
                self._writing = False
                # Not earlier: lines that the thread hangs in are behind the reader as those in the queue are.
                self._size -= len(data)
                self._broken = self._broken or not ok
                self._ready.notify_all()
            if not ok:
                return

    def _laid_out(self, data: bytes) -> bytes:
        if not self.breaks_lines:
            return data
        try:
            width = os.get_terminal_size(self._fd).columns
        except OSError:
            return data  # no terminal, or none any more
        lines = data.decode(errors="surrogateescape").split("\n")
        return "\n".join(broken(line, width) for line in lines).encode(errors="surrogateescape")

    def _write(self, data: bytes) -> bool:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                # Somebody else made it non-blocking; this thread may wait where they would not.
                threading.Event().wait(0.01)
            except OSError:
                return False  # closed, or the reader is gone
        return True
