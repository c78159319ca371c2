"""`python -m lastcall.worker.sdk`: print the private names, and what the installed versions have, as JSON."""

from __future__ import annotations

import contextlib
import importlib
import json

from lastcall.worker.base.errors import Incompatible
from lastcall.worker.base.garbage import stop_collecting
from lastcall.worker.base.process import leave
from lastcall.worker.sdk import preflight
from lastcall.worker.sdk.names import NAMES, PLUGIN


def main() -> int:
    """Print one line, and return the exit code: 1 without a livekit-agents."""
    stop_collecting()  # little but imports follows, and they leave no garbage
    with contextlib.suppress(ImportError):
        importlib.import_module(PLUGIN)  # its names are looked at where something has imported it
    try:
        lacks = {lack.name: lack.text for lack in preflight.lacks()}
    except Incompatible:
        return 1
    seen = [
        {
            "package": name.package,
            "version": preflight.version_of(name.package),
            "name": name.text,
            "needed_by": name.needed_by,
            "without": name.without,
            "lack": lacks.get(name, ""),
        }
        for name in preflight.expected(NAMES)
        if preflight.version_of(name.package)
    ]
    print(json.dumps(seen))
    return 0


if __name__ == "__main__":
    leave(main())
