"""The verbs of the control socket: what an operator may ask for, and what is answered."""

from __future__ import annotations

from typing import Any

from lastcall.supervisor.errors import Refused
from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.supervisor.fleet.operations import Operations
from lastcall.supervisor.shutdown import Shutdown
from lastcall.supervisor.views.control_socket import Verb
from lastcall.supervisor.views.status import Status


class Commands:
    """Does at once what a verb, or the signal of the same meaning, asks for. Each may raise Refused.

    Work that takes time is an operation: it goes on in the background, and can be looked at.
    """

    def __init__(
        self, fleet: Fleet, *, operations: Operations, status: Status, shutdown: Shutdown, log: Any
    ) -> None:
        self._fleet = fleet
        self._operations = operations
        self._status = status
        self._shutdown = shutdown
        self._log = log

    def hold(self, on: bool) -> None:
        """Have no worker accept a job, until it is released again. Raises Refused."""
        if self._fleet.launcher.is_opaque:
            raise Refused("an opaque worker can't be told to hold: it knows nothing of jobs")
        if self._fleet.is_stopping:
            raise Refused("the supervisor is stopping: nothing is accepted any more")
        self._fleet.hold(on)
        self._log.info("hold" if on else "released")

    def toggle_hold(self) -> None:
        """Hold, or release a hold. Raises Refused."""
        self.hold(not self._fleet.is_held)

    def dump(self, number: int | None = None) -> list[int]:
        """Have one worker, or all, write the stack of its main thread to its standard error. Raises Refused.

        Returns the numbers of the slots that were asked. An opaque worker can't do it, and is left alone.
        """
        slots = [slot for slot in self._fleet.slots if number in (None, slot.number)]
        if not slots:
            raise Refused(f"there is no slot {number}")
        for slot in slots:
            slot.dump()
        return [slot.number for slot in slots]

    def table(self) -> dict[str, Verb]:
        """Return the verbs by name; each takes a request of the control socket and returns the answer."""
        operations = self._operations
        return {
            "status": lambda _request: self._status.fresh_document(),
            "operation": lambda request: operations.find(_integer(request, "id")).document(),
            "reload": lambda request: operations.reload(hands_over=_flag(request, "handover")).document(),
            "recycle": lambda request: operations.recycle(
                _integer(request, "slot"), hands_over=_flag(request, "handover")
            ).document(),
            "handover": lambda request: operations.hand_over(_text(request, "job")).document(),
            "scale": lambda request: operations.scale(_integer(request, "workers")).document(),
            "hold": self._hold,
            "release": self._release,
            "drain": self._drain,
            "dump": self._dump,
        }

    def _hold(self, _request: dict[str, Any]) -> dict[str, Any]:
        self.hold(True)
        return {"held": True}

    def _release(self, _request: dict[str, Any]) -> dict[str, Any]:
        self.hold(False)
        return {"held": False}

    def _drain(self, _request: dict[str, Any]) -> dict[str, Any]:
        self._shutdown.begin("drain was asked for")
        return {}

    def _dump(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._fleet.launcher.is_opaque:
            raise Refused("an opaque worker shows no stack")
        number = None if request.get("slot") is None else _integer(request, "slot")
        return {"slots": self.dump(number)}


def _integer(request: dict[str, Any], name: str) -> int:
    value = request.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused(f"{name}: got {value!r}, expected a whole number")
    return value


def _flag(request: dict[str, Any], name: str) -> bool:
    value = request.get(name, False)
    if not isinstance(value, bool):
        raise Refused(f"{name}: got {value!r}, expected true or false")
    return value


def _text(request: dict[str, Any], name: str) -> str:
    value = request.get(name)
    if not isinstance(value, str) or not value:
        raise Refused(f"{name}: got {value!r}, expected a text")
    return value
