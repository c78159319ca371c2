"""Refuse to build from a tree that has lost its links, and link the package for an editable install."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LinksHook(BuildHookInterface[BuilderConfig]):
    """Runs in front of each build, of an editable install too."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Look at the two links, and make the third.

        Raises SystemExit with one line where one of the two is no directory.
        """
        for name in ("supervisor", "worker"):
            link = Path(self.root) / "lastcall" / name
            if not link.is_dir():
                raise SystemExit(
                    f"lastcall/{name} is no directory, expected a link to ../{name}: unpacking a zip loses"
                    f" links; clone the repository, or make the link with: ln -sfn ../{name} lastcall/{name}"
                )
        if version == "editable":
            place = Path(self.root) / "build" / "editable"  # named as dev-mode-dirs in pyproject.toml
            place.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # of another environment, made before or beside this one
                (place / "lastcall").symlink_to(Path("..", "..", "lastcall"))
