"""The supervisor's standard output and error: workers' lines go through, and lost ones are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lastcall.supervisor.processes.output_writer import OutputWriter


class Outputs:
    """Both streams. Lines dropped for a slow reader are told in one log line, once it has caught up."""

    def __init__(self, *, stdout: OutputWriter, stderr: OutputWriter, log: Any) -> None:
        self._writers = {"stdout": stdout, "stderr": stderr}
        self._log = log

    def write_stdout(self, lines: bytes) -> None:
        """Pass whole lines of a worker on."""
        self._write("stdout", lines)

    def write_stderr(self, lines: bytes) -> None:
        """Pass whole lines of a worker on."""
        self._write("stderr", lines)

    @property
    def dropped(self) -> Mapping[str, int]:
        """The number of lines dropped so far, by stream."""
        return {stream: writer.dropped for stream, writer in self._writers.items()}

    def tell_dropped(self) -> None:
        """Say in the log which lines are missing, unless that was said, or the reader is still behind."""
        for stream, writer in self._writers.items():
            count = writer.take_dropped()
            if count:
                self._log.warning("output lines dropped", stream=stream, lines=count)

    def flush(self, timeout: float) -> None:
        """Wait until everything is written; for as many seconds, for each stream."""
        for writer in self._writers.values():
            writer.flush(timeout)

    def _write(self, stream: str, lines: bytes) -> None:
        self._writers[stream].write(lines)
        self.tell_dropped()
