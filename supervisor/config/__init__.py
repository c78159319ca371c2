"""The configuration of `lastcall run`: its options, where their values come from, and how errors are told.

Each name is imported when it is first used. The verbs that ask a running supervisor use modules of this
package too, and would wait for the options.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lastcall.supervisor.config.env_file import environment_of
    from lastcall.supervisor.config.loading import load
    from lastcall.supervisor.config.options import Config, Inworld, Recycle
    from lastcall.supervisor.config.paths import runtime_directory
    from lastcall.supervisor.config.sources import warnings

__all__ = ["Config", "Inworld", "Recycle", "environment_of", "load", "runtime_directory", "warnings"]

_MODULES = {
    "Config": "options",
    "Inworld": "options",
    "Recycle": "options",
    "environment_of": "env_file",
    "load": "loading",
    "runtime_directory": "paths",
    "warnings": "sources",
}


def __getattr__(name: str) -> Any:
    """Import a name at its first use. Raises AttributeError for any other."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
