"""The Inworld pool's figures: beside the pool of livekit-plugins-inworld 1.8.8, and through the broker.

`scripts/bench pool [--seconds S] [--rounds N]`. Both pools talk in turns to one local server, which has a
process for itself. A client process has N streams. Each stream opens a context, closes it at once, and waits
until the server has closed it. `created` is from the wish for a context to contextCreated, for the client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

CONFIG = {"voiceId": "Ashley", "modelId": "m", "audioConfig": {"sampleRateHertz": 24000}, "autoMode": True}
STREAMS = (1, 20, 100, 200)


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)

    def share(part: float) -> float:
        return round(ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))] * 1000, 3)

    return {"p50_ms": share(0.5), "p99_ms": share(0.99)}


# -- clients: each runs in a process of its own ---------------------------------------------------


class OurListener:
    """Notes when a context was created, and when it ended."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.created = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_frame(self, frame: Any, context: Any) -> None:
        self.created = self.created or time.perf_counter()

    def on_end(self, error: Any, frame: Any, context: Any) -> None:
        if error is not None:
            raise error
        self.ended.set_result(None)


async def ours(url: str, key: str, streams: int, seconds: float) -> dict[str, Any]:
    from lastcall.worker.inworld.pool.pool import InworldPool

    created: list[float] = []
    async with InworldPool(url, key) as pool:

        async def live(until: float) -> None:
            while time.perf_counter() < until:
                listener = OurListener()
                pool.close(pool.start(CONFIG, listener))
                await listener.ended
                created.append(listener.created - listener.began)

        async def cold() -> float:
            listener = OurListener()
            pool.close(pool.start(CONFIG, listener))
            await listener.ended
            return listener.created - listener.began

        first = await cold()
        return {"cold_ms": round(first * 1000, 3), **await rate(live, streams, seconds, created)}


async def theirs(url: str, key: str, streams: int, seconds: float) -> dict[str, Any]:
    import aiohttp
    from livekit.plugins.inworld import tts as module

    created: dict[str, float] = {}

    class Log:
        """In the place of the plugin's logger: costs it nothing, and tells when a context was created."""

        def info(self, _text: str, extra: dict[str, Any]) -> None:
            created[extra["context_id"]] = time.perf_counter()

        def debug(self, *_: Any, **__: Any) -> None: ...

        def warning(self, text: str, extra: Any = None, **__: Any) -> None:
            print(text, extra, file=sys.stderr)

        error = warning

    module.logger = Log()
    times: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tts = module.TTS(api_key=key, ws_url=url, http_session=session)
        pool = await tts._get_pool()

        async def one() -> None:
            began = time.perf_counter()
            name, waiter, connection = await pool.acquire_context(None, tts._opts, 30.0)
            connection.close_context(name)
            await waiter
            times.append(created.pop(name) - began)

        async def live(until: float) -> None:
            while time.perf_counter() < until:
                await one()

        await one()
        first = times.pop()
        figures = {"cold_ms": round(first * 1000, 3), **await rate(live, streams, seconds, times)}
        await tts.aclose()
        return figures


async def rate(live: Any, streams: int, seconds: float, created: list[float]) -> dict[str, Any]:
    warm = time.perf_counter() + min(1.0, seconds / 4)
    await asyncio.gather(*(live(warm) for _ in range(streams)))
    created.clear()
    began = time.perf_counter()
    await asyncio.gather(*(live(began + seconds) for _ in range(streams)))
    took = time.perf_counter() - began
    return {"contexts_s": round(len(created) / took), **(summary(created) if created else {})}


async def raw(url: str, key: str, streams: int, seconds: float) -> dict[str, Any]:
    """One local connection, one context after the other: what a job sees, with or without a broker."""
    import aiohttp

    headers = {"Authorization": f"Basic {key}"}
    created: list[float] = []
    async with aiohttp.ClientSession() as session:
        began = time.perf_counter()
        async with session.ws_connect(url + "tts/v1/voice:streamBidirectional", headers=headers) as ws:
            number, first, until = 0, 0.0, began + seconds
            while time.perf_counter() < until:
                number += 1
                asked = time.perf_counter() if number > 1 else began
                await ws.send_str(json.dumps({"create": CONFIG, "contextId": f"c{number}"}))
                if "contextCreated" not in await ws.receive_str():
                    raise RuntimeError("expected contextCreated")
                took = time.perf_counter() - asked
                first = first or took
                created.append(took)
                await ws.send_str(json.dumps({"close_context": {}, "contextId": f"c{number}"}))
                if "contextClosed" not in await ws.receive_str():
                    raise RuntimeError("expected contextClosed")
    return {"cold_ms": round(first * 1000, 3), **summary(created[len(created) // 10 :])}


async def firsts(url: str, key: str, streams: int, seconds: float) -> dict[str, Any]:
    """New connections, each with one context: a new job's first, in a process that has its code loaded."""
    import aiohttp

    headers = {"Authorization": f"Basic {key}"}
    times: list[float] = []
    for _ in range(streams):
        began = time.perf_counter()
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url + "tts/v1/voice:streamBidirectional", headers=headers) as ws,
        ):
            await ws.send_str(json.dumps({"create": CONFIG, "contextId": "c"}))
            await ws.receive_str()
            times.append(time.perf_counter() - began)
            await ws.send_str(json.dumps({"close_context": {}, "contextId": "c"}))
            await ws.receive_str()
    return {"cold_ms": summary(times[1:])["p50_ms"]}


async def their_firsts(url: str, key: str, streams: int, seconds: float) -> dict[str, Any]:
    """The same with a TTS object of the plugin's for each."""
    times = [(await theirs(url, key, 1, 0.0))["cold_ms"] for _ in range(streams)]
    return {"cold_ms": round(statistics.median(times[1:]), 3)}


async def listen(url: str, key: str, streams: int, seconds: float) -> dict[str, Any]:
    """Ten local connections that together have so many contexts speak in real time."""
    import aiohttp

    headers = {"Authorization": f"Basic {key}"}
    chunks = 0
    async with aiohttp.ClientSession() as session:

        async def live(count: int) -> None:
            nonlocal chunks
            async with session.ws_connect(url + "tts/v1/voice:streamBidirectional", headers=headers) as ws:
                text = {"text": "x" * 900, "flush_context": {}}
                for number in range(count):
                    await ws.send_str(json.dumps({"create": CONFIG, "contextId": f"c{number}"}))
                    await ws.send_str(json.dumps({"send_text": text, "contextId": f"c{number}"}))
                print("ready", flush=True)
                async for message in ws:
                    chunks += "audioContent" in message.data

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(live(streams // 10)) for _ in range(10)]
            await asyncio.sleep(seconds)
            for task in tasks:
                task.cancel()
    return {"chunks_s": round(chunks / seconds)}


CLIENTS = {
    "ours": ours,
    "theirs": theirs,
    "raw": raw,
    "firsts": firsts,
    "their_firsts": their_firsts,
    "listen": listen,
}


def client(arguments: list[str]) -> None:
    import uvloop

    kind, url, key, streams, seconds = arguments
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(CLIENTS[kind](url, key, int(streams), float(seconds)))))


# -- the run ---------------------------------------------------------------------------------------


class Server:
    """A process that prints one line of JSON about where it serves, until it is told to end."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        self.where = json.loads(self.process.stdout.readline())
        self.url: str = self.where["ws_url"]
        self.key: str = self.where["environment"]["INWORLD_API_KEY"]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)

    def usage(self) -> tuple[float, int]:
        """Return CPU seconds and voluntary context switches of all threads."""
        cpu, switches = 0.0, 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            cpu += int((task / "schedstat").read_text().split()[0]) / 1e9
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    switches += int(line.split()[1])
        return cpu, switches


def inworld(*options: str) -> Server:
    return Server("-m", "lastcall.worker.local.inworld_server", "--pace", "instant", *options)


def broker(server: Server) -> Server:
    urls = ["--ws-url", server.url, "--base-url", server.where["base_url"]]
    return Server("-m", "lastcall.worker.inworld", *urls, INWORLD_API_KEY=server.key)


def run(python: str, kind: str, at: Server, streams: int, seconds: float) -> dict[str, Any]:
    command = [python, __file__, "client", kind, at.url, at.key, str(streams), str(seconds)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def median(rounds: list[dict[str, Any]]) -> dict[str, float]:
    return {key: round(statistics.median(each[key] for each in rounds), 3) for key in rounds[0]}


def pools(python: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Take turns on one server, so that a slow minute of the machine hits both."""
    figures: dict[str, Any] = {}
    with inworld() as server:
        for streams in STREAMS:
            seen: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
            for _ in range(rounds):
                for kind, its in (("theirs", python), ("ours", sys.executable)):
                    seen[kind].append(run(its, kind, server, streams, seconds))
            figures[str(streams)] = {kind: median(each) for kind, each in seen.items()}
            print(f"  {streams} streams {figures[str(streams)]}", file=sys.stderr)
    return figures


def brokers(seconds: float, rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with inworld() as server, broker(server) as its:
        direct, through = [], []
        for _ in range(rounds):
            direct.append(run(sys.executable, "raw", server, 1, seconds))
            through.append(run(sys.executable, "raw", its, 1, seconds))
        figures["one_stream"] = {"direct": median(direct), "broker": median(through)}
        time.sleep(12)  # the timers of the last contexts fire once more
        _, before = its.usage()
        time.sleep(30)
        figures["idle_wakeups_s"] = round((its.usage()[1] - before) / 30, 3)
    with inworld("--pace", "real-time") as server, broker(server) as its:
        command = [sys.executable, __file__, "client", "listen", its.url, its.key, "100", "20"]
        listener = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert listener.stdout is not None
        for _ in range(10):
            listener.stdout.readline()
        time.sleep(3)
        began, (cpu, _) = time.monotonic(), its.usage()
        time.sleep(12)
        used = (its.usage()[0] - cpu) / (time.monotonic() - began)
        listener.wait(60)
        chunks = json.loads(listener.stdout.read().splitlines()[-1])
        figures["audio"] = {"core_percent": round(used * 100, 2), **chunks}
    return figures


def cold(python: str) -> dict[str, Any]:
    """Time a new job's first context, with a handshake of 50 ms: by the job's pool, and by a warm broker."""
    with inworld("--handshake-delay", "0.05") as server, broker(server) as its:
        return {
            "theirs": run(python, "their_firsts", server, 20, 0.0)["cold_ms"],
            "broker": run(sys.executable, "firsts", its, 20, 0.0)["cold_ms"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench pool", description=__doc__)
    parser.add_argument("--upstream", required=True, help="python of an environment with the plugin's 1.8.8")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--write", action="store_true", help="write into docs/performance.md")
    given = parser.parse_args(sys.argv[2:])
    figures = {"pools": pools(given.upstream, given.seconds, given.rounds)}
    figures["cold_ms"] = cold(given.upstream)
    figures |= brokers(given.seconds, given.rounds)
    print(json.dumps(figures, indent=2))
    if given.write:
        from scripts.bench import machine
        from scripts.pages import write_section

        write_section("pool", page(figures, machine(), given.rounds))


def page(figures: dict[str, Any], machine: str, rounds: int) -> str:
    lines = [
        f"Measured by `scripts/bench pool --write` on {machine}; the other pool is that of",
        f"livekit-plugins-inworld 1.8.8. Medians of {rounds} rounds, in turns, on one local server.",
        "",
        "| streams | contexts/s: lastcall, plugin | ask → created, p99 ms: lastcall, plugin | aim |",
        "| --- | --- | --- | --- |",
    ]
    for streams, each in figures["pools"].items():
        ours, theirs = each["ours"], each["theirs"]
        aim = "1.5 times as many" if int(streams) > 100 else "as many, p99 no longer"
        lines.append(
            f"| {streams} | {ours['contexts_s']:.0f}, {theirs['contexts_s']:.0f}"
            f" | {ours['p99_ms']:.2f}, {theirs['p99_ms']:.2f} | {aim} |"
        )
    one, cold_ms, audio = figures["one_stream"], figures["cold_ms"], figures["audio"]
    added = one["broker"]["p50_ms"] - one["direct"]["p50_ms"]
    rows = [
        ("added by the broker at one stream, p50", f"{added:.2f} ms", "≤ 0.5 ms"),
        (
            "100 streams of real-time audio through the broker",
            f"{audio['core_percent']} % of a core",
            "≤ 8 %",
        ),
        ("first context of a new job, 50 ms handshake, warm broker", f"{cold_ms['broker']:.1f} ms", "≤ 3 ms"),
        ("… with the plugin's own pool", f"{cold_ms['theirs']:.1f} ms", "for comparison"),
        ("idle broker: wakeups", f"{figures['idle_wakeups_s']} /s", "0"),
    ]
    lines += ["", "| what | figure | aim |", "| --- | --- | --- |"]
    lines += [f"| {what} | {figure} | {aim} |" for what, figure, aim in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        client(sys.argv[2:])
    else:
        main()
