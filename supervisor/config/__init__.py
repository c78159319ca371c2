"""The configuration of `lastcall run`: its options, where their values come from, and how errors are told."""

from lastcall.supervisor.config.env_file import environment_of
from lastcall.supervisor.config.loading import load
from lastcall.supervisor.config.options import Config, Inworld, Recycle
from lastcall.supervisor.config.paths import runtime_directory
from lastcall.supervisor.config.sources import warnings

__all__ = ["Config", "Inworld", "Recycle", "environment_of", "load", "runtime_directory", "warnings"]
