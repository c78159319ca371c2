"""The metrics of /metrics in the order of docs/metrics.md, into which `scripts/reference` renders them."""

from __future__ import annotations

from lastcall.supervisor.metric_family import Family, Kind
from lastcall.supervisor.receipt.ledger import EntryFate


def _family(kind: Kind, name: str, text: str, *labels: str) -> Family:
    return Family(name=f"lastcall_{name}", kind=kind, text=text, labels=labels)


SLOTS = _family("gauge", "slots", "workers by state, those on their way out included", "state")
ACCEPTING = _family("gauge", "workers_accepting", "workers that accept jobs at this moment")
WANTED = _family("gauge", "workers_wanted", "slots that are to be kept up")
HELD = _family("gauge", "held", "1 while a hold lasts")
FULL = _family(
    "counter",
    "full_seconds",
    "seconds in which no worker took jobs although one was ready: `load` (livekit-agents' `load_threshold`),"
    " `cap` (`jobs.max_running`), `hold`, `cold` (no job process gets ready)",
    "reason",
)
PROCESS_FAILURES = _family(
    "counter", "process_failures", "job processes that did not get ready for a job", "slot"
)
JOBS_RUNNING = _family("gauge", "jobs_running", "jobs accepted or running", "slot")
JOBS_STARTED = _family("counter", "jobs_started", "jobs accepted")
JOBS: dict[EntryFate, Family] = {
    "finished": _family("counter", "jobs_finished", "jobs that ended by themselves, well"),
    "failed": _family("counter", "jobs_failed", "jobs whose process ended with an error"),
    "cut": _family(
        "counter",
        "jobs_cut",
        "jobs that lastcall ended, or whose agent's identity another participant took; counted when a job is"
        " asked to shut down, which may be 18 s before its end",
    ),
    "ended_by_server": _family(
        "counter", "jobs_ended_by_server", "jobs whose room was deleted, or whose agent was removed from it"
    ),
    "handed_over": _family("counter", "jobs_handed_over", "jobs whose call goes on in another job"),
    "lost": _family("counter", "jobs_lost", "jobs whose worker died, so that nobody knows their end"),
}
HANDOVERS = _family(
    "counter",
    "handovers",
    "tries to hand over a call: `done`, `refused` (not possible), `failed` (nobody took it, or the successor"
    " died)",
    "result",
)
JOBS_TO_CUT = _family(
    "gauge",
    "jobs_to_cut",
    "jobs of workers that are being stopped, which are cut when the drain is over",
)
DRAIN_LEFT = _family(
    "gauge",
    "drain_left_seconds",
    "seconds until the first of these jobs are asked to shut down; 0 without such jobs",
)
FENCE = _family("histogram", "fence_seconds", "seconds from the fence to the worker's acknowledgement")
DRAIN = _family(
    "histogram",
    "drain_seconds",
    "seconds from the fence to the end of a worker's last job, which grace has to cover. Workers whose jobs"
    " were cut are left out",
)
RESTARTS = _family(
    "counter",
    "restarts",
    "restarts, by how the one before ended: `exited`, `killed`, `never ready`, `not started`, `left`",
    *("slot", "reason"),
)
STALLS = _family("counter", "stalls", "workers that were found stuck")
OPERATIONS = _family(
    "counter",
    "operations",
    "reloads, recycles, scalings and handovers; result is `done` or `failed`",
    *("verb", "result"),
)
LAG = _family(
    "gauge",
    "worker_loop_lag_seconds",
    "seconds by which the worker's event loop was late, the last time that was measured",
    *("slot", "generation"),
)
LAST_BEAT = _family(
    "gauge",
    "worker_last_beat_seconds",
    "seconds since the worker's last sign of life",
    *("slot", "generation"),
)
WORKER_MEMORY = _family(
    "gauge",
    "worker_resident_memory_bytes",
    "resident memory of the worker itself, not of its jobs",
    *("slot", "generation"),
)
WORKER_PSS = _family(
    "gauge",
    "worker_pss_bytes",
    "memory of the worker and of all processes below it; what is shared counts in parts",
    *("slot", "generation"),
)
WORKER_PRIVATE = _family(
    "gauge",
    "worker_private_memory_bytes",
    "memory of the same processes that none of them shares",
    *("slot", "generation"),
)
IMAGE_PSS = _family(
    "gauge",
    "image_pss_bytes",
    "memory of the image; what is shared counts in parts. 0 without an image",
)
IMAGE_PRIVATE = _family(
    "gauge", "image_private_memory_bytes", "memory of the image that no worker shares; 0 without an image"
)
STOPPING = _family("gauge", "stopping", "1 while a stop is under way")
GRACE_LEFT = _family(
    "gauge", "grace_left_seconds", "seconds that are left of the stop's budget; 0 without a stop"
)
DROPPED = _family(
    "counter",
    "output_dropped_lines",
    "lines of workers and of lastcall's own log that were dropped, because the reader of `stdout` or `stderr`"
    " was too slow",
    "stream",
)
MEMORY = _family("gauge", "resident_memory_bytes", "resident memory of the supervisor")
# By the name of the figure that the broker tells. Its counters are since that broker was started.
POOL = {
    "connections": _family(
        "gauge", "pool_connections", "connections to Inworld, those in their handshake included"
    ),
    "contexts": _family("gauge", "pool_contexts", "contexts that Inworld counts"),
    "waiters": _family("gauge", "pool_waiters", "creates that wait for capacity"),
    "granted": _family("counter", "pool_granted", "contexts that were given capacity"),
    "wait_seconds": _family(
        "counter", "pool_wait_seconds", "seconds that creates have waited for capacity, all together"
    ),
    "refusals": _family("counter", "pool_refusals", "handshakes that Inworld refused with 429"),
    "retries": _family("counter", "pool_retries", "creates that were sent again on another connection"),
    "second_tries": _family(
        "counter", "pool_second_tries", "those of the retries whose first try was slow, and not failed"
    ),
    "faults": _family(
        "counter",
        "pool_faults",
        "handshakes, connections, contexts and local requests that ended by a fault in lastcall; the broker's"
        " log has the traceback",
    ),
    "direct": _family(
        "counter",
        "pool_direct",
        "TTS objects that went to Inworld beside the pool, with another URL or another account's key",
    ),
}
