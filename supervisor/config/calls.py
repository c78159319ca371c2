"""The words for what calls get of a grace, as `run`, `unit` and `doctor` say them."""

from __future__ import annotations

from lastcall.worker.base.budget import CALLBACKS, Shares


def given(grace: float, shares: Shares) -> str:
    """Say how long calls have."""
    calls, close = shares.calls(grace), shares.within(grace).jobs_close
    return f"calls have {calls:.4g} s to end by themselves, and then {close:.2g} s to shut down"


def warning(grace: float, shares: Shares) -> str:
    """Say which callbacks of a call that is cut may not run; empty when all of them can."""
    has, wait = shares.within(grace).jobs_close, shares.entrypoint_wait
    if has >= wait + CALLBACKS:
        return ""
    what = "on_session_end and shutdown callbacks may not run"
    if has >= CALLBACKS:
        what += f" where the entrypoint goes on: livekit-agents waits {wait:.2g} s for the entrypoint first"
    return f"with a grace of {grace:.7g} s a call that is cut has {has:.2g} s to shut down: its {what}"


def advice(shares: Shares) -> str:
    """Say what would let all callbacks run."""
    if shares.close < shares.close_needed:
        return f"stop.close of {shares.close_needed:.4g} s or more"
    return f"raise --grace to {shares.grace_needed:.4g} s or more"
