"""lastcall: a process supervisor for LiveKit agent workers. What agents may import of it.

`closing(ctx, obj)` closes anything with an `aclose` when a job ends, `inworld.TTS` is the Inworld plugin's
class, `__version__` is the installed version.

This file runs in front of the first statement of each process of lastcall, which blocks the stop signals, so
every import stands inside a function: `import lastcall` loads neither asyncio nor livekit nor aiohttp.
"""

from __future__ import annotations

TYPE_CHECKING = False  # a type checker takes this name for true; `typing` itself costs milliseconds
if TYPE_CHECKING:
    from lastcall.worker import inworld
    from lastcall.worker.job.teardown import closing

    __version__: str

__all__ = ["__version__", "closing", "inworld"]


def __getattr__(name: str) -> object:
    if name == "closing":
        from lastcall.worker.job.teardown import closing

        return closing
    if name == "inworld":
        from lastcall.worker import inworld

        return inworld
    if name == "__version__":
        from importlib.metadata import version

        return version("lastcall")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
