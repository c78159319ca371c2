"""`python -m lastcall.worker.inworld`: the Inworld broker, alone or under a supervisor."""

import signal

if __name__ == "__main__":
    # First of all: a signal that comes while the imports below run waits until its handler stands.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})

import argparse
import asyncio
import faulthandler
import json
import logging
import os
import secrets
import sys
from typing import NoReturn

import uvloop

from lastcall.worker.base import variables
from lastcall.worker.base.broker_settings import INWORLD_URL, INWORLD_WS_URL, BrokerSettings
from lastcall.worker.base.dial_checks import check_key, check_proxy, check_url
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.process import forbid_dumps, leave
from lastcall.worker.inworld.broker import json_log
from lastcall.worker.inworld.broker.broker import Broker, listen
from lastcall.worker.inworld.broker.broker_process import BrokerProcess

log = logging.getLogger("lastcall.inworld")


def main() -> NoReturn:
    """Run the broker and end with its exit code."""
    json_log.set_up()
    if not forbid_dumps():  # the API key comes into the memory of this process
        log.warning("this system does not let a process forbid its core dumps")
    # As in a worker: a handler of the loop could not show where the loop is stuck.
    faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=False)
    settings = BrokerSettings.take(os.environ)
    if settings is not None:
        for fd in (settings.control_fd, settings.listen_fd, settings.lifeline_fd):
            if fd is not None:
                os.set_inheritable(fd, False)
        process = BrokerProcess(settings)
        run(process)
    settings = alone(sys.argv[1:])
    key = os.environ.pop(variables.INWORLD_API_KEY, "").strip()
    if not key:
        print(
            "lastcall: INWORLD_API_KEY is not set, expected the key as the Inworld portal gives it",
            file=sys.stderr,
        )
        raise SystemExit(Exit.CONFIG)
    try:
        check_key(key)
    except ValueError as error:
        print(f"lastcall: {variables.INWORLD_API_KEY}: got {error}", file=sys.stderr)
        raise SystemExit(Exit.CONFIG) from error
    run(BrokerProcess(settings, key=key), say=True)


def alone(arguments: list[str]) -> BrokerSettings:
    """Return the settings of a broker without a supervisor, with a listening socket."""
    parser = argparse.ArgumentParser(
        prog="python -m lastcall.worker.inworld",
        description="Share one pool of Inworld connections among the processes of this machine. "
        f"Needs INWORLD_API_KEY; {variables.INWORLD_TOKEN} is the token, if set. Prints where it serves.",
    )
    parser.add_argument("--ws-url", default=INWORLD_WS_URL, help="Inworld's WebSocket URL")
    parser.add_argument("--base-url", default=INWORLD_URL, help="Inworld's HTTP URL")
    parser.add_argument("--port", type=int, default=0, help="to listen on; 0: any free one")
    given = parser.parse_args(arguments)
    for option, url, schemes in (
        ("--ws-url", given.ws_url, ("ws", "wss")),
        ("--base-url", given.base_url, ("http", "https")),
    ):
        try:
            check_url(url, schemes)
        except ValueError as error:
            parser.exit(Exit.USAGE, f"lastcall: {option}: {error}\n")
    try:
        check_proxy(os.environ)
    except ValueError as error:
        print(f"lastcall: {error}", file=sys.stderr)
        raise SystemExit(Exit.CONFIG) from error
    try:
        listener = listen(given.port)
    except OSError as error:
        print(f"lastcall: port {given.port} can't be listened on: {error.strerror}", file=sys.stderr)
        raise SystemExit(Exit.CONFIG) from error
    return BrokerSettings(
        listen_fd=listener.detach(),
        token=os.environ.get(variables.INWORLD_TOKEN) or secrets.token_urlsafe(24),
        ws_url=given.ws_url,
        base_url=given.base_url,
    )


def run(process: BrokerProcess, *, say: bool = False) -> NoReturn:
    """Run and leave; with `say` the first line of standard output tells where it serves, as JSON."""

    def tell(broker: Broker) -> None:
        token = process.settings.token
        environment = {
            variables.INWORLD_WS_URL: broker.ws_url,
            variables.INWORLD_URL: broker.base_url,
            variables.INWORLD_TOKEN: token,
            variables.INWORLD_KEYS: process.key_digest,
        }
        where = {"ws_url": broker.ws_url, "base_url": broker.base_url, "environment": environment}
        print(json.dumps(where), flush=True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        # Not by the loop's close, which would wait for a lookup of a name that hangs.
        leave(runner.run(process.run(tell if say else lambda _: None)))


if __name__ == "__main__":
    main()
