"""Shared by supervisor and worker: time, waiting, the wire, deadlines, settings, exit codes, errors."""
