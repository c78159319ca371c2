"""The receipt of a stop: the ledger of jobs, the record of the stop, and the document made from both.

Pure: nothing in here reads a clock or a process.
"""

from lastcall.supervisor.receipt.document import judge, versions, write
from lastcall.supervisor.receipt.ledger import EntryFate, JobEntry, Ledger
from lastcall.supervisor.receipt.record import ResourceEntry, StopRecord
from lastcall.worker.base.wire import ResourceFate

__all__ = [
    "EntryFate",
    "JobEntry",
    "Ledger",
    "ResourceEntry",
    "ResourceFate",
    "StopRecord",
    "judge",
    "versions",
    "write",
]
