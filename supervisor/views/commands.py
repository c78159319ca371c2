"""What may be asked over the control socket, and what is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lastcall.supervisor.errors import Refused
from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.supervisor.fleet.operations import Operations
from lastcall.supervisor.views.control_socket import Verb
from lastcall.supervisor.views.status import View


def verbs(
    fleet: Fleet, operations: Operations, view: View, *, stop: Callable[[str], None], dump: Callable[[], None]
) -> dict[str, Verb]:
    """Return the table of verbs. Each answers at once; what takes time is an operation to be looked at."""

    def hold(on: bool) -> Verb:
        def verb(_request: dict[str, Any]) -> dict[str, Any]:
            if fleet.launcher.is_opaque:
                raise Refused("an opaque worker can't be told to hold: it knows nothing of jobs")
            if fleet.is_stopping:
                raise Refused("the supervisor is stopping: nothing is accepted any more")
            fleet.hold(on)
            return {"held": on}

        return verb

    def drain(_request: dict[str, Any]) -> dict[str, Any]:
        stop("drain was asked for")
        return {}

    def dump_stacks(request: dict[str, Any]) -> dict[str, Any]:
        if fleet.launcher.is_opaque:
            raise Refused("an opaque worker shows no stack")
        number = request.get("slot")
        if number is None:
            dump()
            return {"slots": [slot.number for slot in fleet.slots]}
        slot = fleet.slot(_integer(request, "slot"))
        if slot is None:
            raise Refused(f"there is no slot {number}")
        slot.dump()
        return {"slots": [slot.number]}

    return {
        "status": lambda _request: view.document(),
        "operation": lambda request: operations.find(_integer(request, "id")).document(),
        "reload": lambda _request: operations.reload().document(),
        "recycle": lambda request: operations.recycle(_integer(request, "slot")).document(),
        "scale": lambda request: operations.scale(_integer(request, "workers")).document(),
        "hold": hold(True),
        "release": hold(False),
        "drain": drain,
        "dump": dump_stacks,
    }


def _integer(request: dict[str, Any], name: str) -> int:
    value = request.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused(f"{name}: got {value!r}, expected a whole number")
    return value
