"""Standard output and its reader: a slow one delays nobody, and is told which lines it has missed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from lastcall.supervisor.outputs import Outputs
from lastcall.supervisor.processes.output_writer import MAX_QUEUED, OutputWriter
from tests.support.harness import LASTCALL

LINE = b"x" * 999 + b"\n"


class Log:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))


@pytest.fixture
def pipes() -> Any:
    fds = [*os.pipe(), *os.pipe()]
    yield fds
    for fd in fds:
        os.close(fd)


async def until(condition: Any, timeout: float = 30.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


async def test_dropped_lines_are_told_once(pipes: list[int]) -> None:
    """Nothing is said while the reader is behind; one line with their number when it has caught up."""
    read, write, _read_errors, write_errors = pipes
    log = Log()
    stdout, stderr = OutputWriter(write), OutputWriter(write_errors)
    outputs = Outputs(stdout=stdout, stderr=stderr, log=log)
    count = 2 * MAX_QUEUED // len(LINE)
    for _ in range(count):
        outputs.write_stdout(LINE)
    dropped = outputs.dropped["stdout"]
    assert 0 < dropped < count and log.lines == []
    got = bytearray()
    while len(got) < (count - dropped) * len(LINE):
        got += await asyncio.to_thread(os.read, read, 1 << 20)
    assert bytes(got) == LINE * (count - dropped), "whole lines, in order"
    outputs.write_stdout(LINE)
    assert log.lines == [("output lines dropped", {"stream": "stdout", "lines": dropped})]
    outputs.write_stderr(LINE)
    outputs.write_stdout(LINE)
    outputs.tell_dropped()
    assert len(log.lines) == 1 and outputs.dropped == {"stdout": dropped, "stderr": 0}
    outputs.flush(5.0)


TALKS = """
import pathlib, sys, time
line = "x" * 999
for _ in range(20_000):
    print(line)
sys.stdout.flush()
pathlib.Path(sys.argv[2]).touch()
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
print("again", flush=True)
time.sleep(600)
"""


async def test_reader_that_does_not_read(tmp_path: Path) -> None:
    """The worker writes all it has, the metric counts what was lost, and one log line tells it afterwards."""
    go, done = tmp_path / "go", tmp_path / "done"
    command = [*LASTCALL, "run", "--http", "127.0.0.1:0", "--control", str(tmp_path / "c")]
    command += ["--", sys.executable, "-c", TALKS, str(go), str(done)]
    with (
        open(tmp_path / "err", "wb") as err,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, cwd=tmp_path) as process,
    ):

        def log(event: str) -> list[dict[str, Any]]:
            lines = (tmp_path / "err").read_text().splitlines()
            return [entry for entry in map(json.loads, lines) if entry["event"] == event]

        def dropped() -> float:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            (line,) = [x for x in text.splitlines() if x.startswith(name)]
            return float(line.split()[-1])

        name = 'lastcall_output_dropped_lines_total{stream="stdout"}'
        try:
            await until(lambda: log("slot ready"))
            address = log("supervisor started")[0]["http"]
            # 20 MB in all, of which the queue and two pipes take less than 5.
            await until(lambda: done.exists() and dropped() > 0)
            assert log("output lines dropped") == []
            assert process.stdout is not None
            kept: list[bytes] = []

            def read_all(stdout: IO[bytes]) -> None:
                for line in stdout:
                    kept.append(line)  # one by one, for the test to see how far it is

            reading = asyncio.create_task(asyncio.to_thread(read_all, process.stdout))
            await until(lambda: dropped() + len(kept) == 20_000)
            missing = int(dropped())
            await asyncio.to_thread(go.touch)
            await until(lambda: len(kept) > 20_000 - missing)
            process.terminate()
            assert await asyncio.to_thread(process.wait, 30) == 0
            await reading
            assert kept == [LINE] * (20_000 - missing) + [b"again\n"]
        finally:
            for child in psutil.Process(process.pid).children() if process.poll() is None else []:
                child.kill()
            process.kill()
        (told,) = log("output lines dropped")
        assert (told["stream"], told["lines"]) == ("stdout", missing)
