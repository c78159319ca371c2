"""The names of the environment variables that lastcall reads or sets, all of them.

An option of `lastcall run` is `PREFIX` and its key in capitals; `supervisor.config` makes those names.
"""

from __future__ import annotations

PREFIX = "LASTCALL_"

# -- set by the user ----------------------------------------------------------------------------------------

# The configuration file, and three options that are read apart from the others: by a worker without a
# supervisor, by the verbs that ask a supervisor, and by the entrypoint of an image.
CONFIG = "LASTCALL_CONFIG"
GRACE = "LASTCALL_GRACE"
CONTROL = "LASTCALL_CONTROL"
# Seconds after which the platform kills, where lastcall can't read them.
PLATFORM_GRACE = "LASTCALL_PLATFORM_GRACE"
INWORLD_API_KEY = "INWORLD_API_KEY"

# -- set by the supervisor for its children -----------------------------------------------------------------

# The settings of a worker, and of the Inworld broker, as JSON.
WORKER = "LASTCALL_WORKER"
COMPANION = "LASTCALL_COMPANION"
# The mark: the supervisor, slot and generation from which a process descends.
MARK = "LASTCALL_MARK"
# Where a job reaches the Inworld broker, what it shows there if it has no API key, and the digests
# (`inworld_keys`) of the keys that are the pool's, with spaces between them.
INWORLD_WS_URL = "LASTCALL_INWORLD_WS_URL"
INWORLD_URL = "LASTCALL_INWORLD_URL"
INWORLD_TOKEN = "LASTCALL_INWORLD_TOKEN"
INWORLD_KEYS = "LASTCALL_INWORLD_KEYS"

# -- set by a worker for its jobs ---------------------------------------------------------------------------

# The pid of the worker: a job whose own pid it is runs in a thread of the worker.
WORKER_PID = "LASTCALL_WORKER_PID"

# -- set by a rehearsal for the supervisor that it starts ---------------------------------------------------

# `Rehearsal` as JSON, and a token by which the rehearsal finds every process of it.
REHEARSAL = "LASTCALL_WORKER_REHEARSAL"
REHEARSAL_TOKEN = "LASTCALL_WORKER_REHEARSAL_TOKEN"

# Names that begin like an option and are none. Some are those above. Kubernetes sets the others for a Service
# that is called `lastcall`:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
NOT_OPTIONS = frozenset({CONFIG, PLATFORM_GRACE, MARK, WORKER, COMPANION})
NOT_OPTIONS |= {INWORLD_WS_URL, INWORLD_URL, INWORLD_TOKEN, INWORLD_KEYS}
NOT_OPTION_PREFIXES = (WORKER + "_", "LASTCALL_SERVICE", "LASTCALL_PORT")
