"""sd_notify: what the service manager is told, and the socket that it goes to.

One datagram of KEY=value lines at a time, to the address in NOTIFY_SOCKET; a leading @ is an abstract socket:

    READY=1                                  the workers are ready; or a reload is over, as it may have gone
    RELOADING=1, MONOTONIC_USEC=…            a reload begins; in one datagram, or 253 and newer drop it
    STOPPING=1                               the stop has begun
    EXTEND_TIMEOUT_USEC=…                    give the start, the reload or the stop so long from now
    STATUS=draining: 3 jobs, 3541 s left     for `systemctl status`
    WATCHDOG=1                               the supervision loop turns

`Notifications` decides what is due and knows neither clock nor socket. A missing listener is no error, and
neither is a datagram that could not be sent: what matters is said again.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from lastcall.worker.base.records import dataclass

USEC = 1_000_000
# Seconds that each extension of a timer reaches, and seconds until it is said again. Ours: the rest of the
# last extension, when no job is left, has to cover the reserved shares that follow (40 s by default).
EXTENSION = 60.0
EXTEND_EVERY = 10.0
# Seconds between two STATUS lines of a stop. Ours: `systemctl status` shows how much time is left.
STATUS_EVERY = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state that the service manager is told of. `end_at`: the end of grace, in a stop.

    `up_at`: by when the workers that start have to be ready, in a start of the service and in a reload.
    """

    is_ready: bool = False
    is_reloading: bool = False
    is_busy: bool = False
    end_at: float | None = None
    up_at: float | None = None
    text: str = ""

    @property
    def extends_to(self) -> float | None:
        """Return how far the service manager's timer may be extended; None where it is left alone."""
        if self.end_at is not None:
            return self.end_at if self.is_busy else None
        return self.up_at


class Notifications:
    """Decides which lines are due, from the state now and the lines sent before."""

    def __init__(self, *, watchdog: float | None = None) -> None:
        self._watchdog_every = None if watchdog is None else watchdog / 2
        self._feed_at = self._extend_at = self._status_at = 0.0
        self._was = Snapshot()

    def due(self, snapshot: Snapshot, now: float) -> list[str]:
        """Return the lines of the datagram that is due, none when none is."""
        was, self._was = self._was, snapshot
        lines = []
        if snapshot.end_at is not None:
            if was.end_at is None:
                lines.append("STOPPING=1")
                self._extend_at = now  # the timer of the stop is another one than that of the start
        elif snapshot.is_reloading and not was.is_reloading:
            lines += ["RELOADING=1", f"MONOTONIC_USEC={int(now * USEC)}"]
            self._extend_at = now
        elif snapshot.is_ready and not snapshot.is_reloading and (was.is_reloading or not was.is_ready):
            lines.append("READY=1")
        if snapshot.extends_to is not None and now >= self._extend_at:
            self._extend_at = now + EXTEND_EVERY
            usec = int(min(EXTENSION, snapshot.extends_to - now) * USEC)
            lines += [f"EXTEND_TIMEOUT_USEC={usec}"] if usec > 0 else []
        is_news = (snapshot.text, snapshot.end_at) != (was.text, was.end_at)
        if is_news or (snapshot.end_at is not None and now >= self._status_at):
            self._status_at = now + STATUS_EVERY
            left = "" if snapshot.end_at is None else f", {max(0.0, snapshot.end_at - now):.0f} s left"
            lines.append(f"STATUS={snapshot.text}{left}")
        if self._watchdog_every is not None and now >= self._feed_at:
            self._feed_at = now + self._watchdog_every
            lines.append("WATCHDOG=1")
        return lines

    def due_at(self) -> float | None:
        """Return when there is something to say although nothing changes; None where there never is."""
        dues = [] if self._watchdog_every is None else [self._feed_at]
        if self._was.end_at is not None:
            dues.append(self._status_at)
        if self._was.extends_to is not None and self._extend_at < self._was.extends_to:
            dues.append(self._extend_at)
        return min(dues, default=None)


class NotifySocket:
    """The service manager's end of the protocol, as found in the environment; it may not be there."""

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        self.address = _address(environment.get("NOTIFY_SOCKET", ""))
        self.watchdog = _watchdog(environment, pid) if self.address else None
        self._socket: socket.socket | None = None

    @property
    def is_there(self) -> bool:
        return bool(self.address)

    def tell(self, lines: list[str]) -> None:
        """Send one datagram; never waits, and never fails."""
        if not self.address or not lines:
            return
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._socket.sendto("\n".join(lines).encode(errors="replace"), self.address)
        except OSError:
            return  # it restarts, or its queue is full; a watchdog that gets nothing has lastcall restarted

    def close(self) -> None:
        """Close the socket; what was sent is not lost."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _address(name: str) -> str:
    """Return the socket's address; empty for one that is no unix socket (vsock, of a virtual machine)."""
    if name.startswith("@") and len(name) > 1:
        return "\0" + name[1:]
    return name if name.startswith("/") else ""


def _watchdog(environment: Mapping[str, str], pid: int) -> float | None:
    usec = environment.get("WATCHDOG_USEC", "")
    if environment.get("WATCHDOG_PID", str(pid)) != str(pid) or not usec.isdecimal() or int(usec) == 0:
        return None
    return int(usec) / USEC
