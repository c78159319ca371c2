"""One scene of a rehearsal as a section of a page."""

from __future__ import annotations

from lastcall.supervisor.errors import UsageError
from lastcall.supervisor.picture.page import Section
from lastcall.supervisor.picture.reading import check
from lastcall.supervisor.picture.timeline import Timeline, lay_out
from lastcall.supervisor.rehearsal.scenes import SceneResult


def section(verdict: SceneResult) -> Section:
    """Return the verdict on a scene with the picture of its stop, if the scene left a receipt."""
    scene = verdict.scene
    return Section(
        title=f"{scene.name}: {'ok' if verdict.is_good else 'failed'}",
        is_good=verdict.is_good,
        text=f"As by {scene.says}. {verdict.seconds:.1f} s with the start.",
        notes=(*verdict.problems, *(f"note: {warning}" for warning in verdict.warnings)),
        timeline=_timeline(verdict),
    )


def _timeline(verdict: SceneResult) -> Timeline | None:
    if not verdict.receipt:
        return None
    try:
        return lay_out(check(dict(verdict.receipt), verdict.scene.name))
    except UsageError:
        return None  # the agent wrote into the receipt of the scene: its verdict has a problem already
