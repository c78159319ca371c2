"""The names of the environment variables that lastcall reads or sets, all of them.

An option of `lastcall run` is `PREFIX` and its key in capitals; `supervisor.config` makes those names.
"""

from __future__ import annotations

PREFIX = "LASTCALL_"

# -- set by the user ----------------------------------------------------------------------------------------

CONFIG = "LASTCALL_CONFIG"
"""The configuration file."""

GRACE = "LASTCALL_GRACE"
"""The option, which a worker without a supervisor reads too."""

CONTROL = "LASTCALL_CONTROL"
"""The option, which the verbs read too that ask a supervisor."""

PLATFORM_GRACE = "LASTCALL_PLATFORM_GRACE"
"""Seconds after which the platform kills, for `lastcall doctor` in a container, where they can't be read."""

INWORLD_API_KEY = "INWORLD_API_KEY"
"""The key of the Inworld account."""

# -- set by the supervisor ----------------------------------------------------------------------------------

WORKER = "LASTCALL_WORKER"
"""The settings of a worker, as JSON."""

COMPANION = "LASTCALL_COMPANION"
"""The settings of the Inworld broker, as JSON."""

MARK = "LASTCALL_MARK"
"""The mark: the supervisor, slot and generation from which a process descends."""

INWORLD_WS_URL = "LASTCALL_INWORLD_WS_URL"
"""Where a job reaches the Inworld broker for streams."""

INWORLD_URL = "LASTCALL_INWORLD_URL"
"""Where a job reaches the Inworld broker for all else."""

INWORLD_TOKEN = "LASTCALL_INWORLD_TOKEN"
"""A job without an API key shows this to the broker. It is good for nothing beyond this machine."""

INWORLD_KEYS = "LASTCALL_INWORLD_KEYS"
"""Digests of the keys that are the pool's, with spaces between them."""

# -- set by a worker ----------------------------------------------------------------------------------------

WORKER_PID = "LASTCALL_WORKER_PID"
"""The pid of the worker: a job whose own pid it is runs in a thread of the worker."""

# -- set by a rehearsal -------------------------------------------------------------------------------------

REHEARSAL = "LASTCALL_WORKER_REHEARSAL"
"""How the supervisor of a rehearsal starts its workers, as JSON."""

REHEARSAL_TOKEN = "LASTCALL_WORKER_REHEARSAL_TOKEN"
"""A token by which a rehearsal finds every process of it."""

# -- no options ---------------------------------------------------------------------------------------------

# Names that begin like an option and are none. Some are those above. Kubernetes sets the others for a Service
# that is called `lastcall`:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
NOT_OPTIONS = frozenset({CONFIG, PLATFORM_GRACE, MARK, WORKER, COMPANION})
NOT_OPTIONS |= {INWORLD_WS_URL, INWORLD_URL, INWORLD_TOKEN, INWORLD_KEYS}
NOT_OPTION_PREFIXES = (WORKER + "_", "LASTCALL_SERVICE", "LASTCALL_PORT")
