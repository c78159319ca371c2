r"""The control protocol: what the supervisor and its processes say to each other, as typed messages.

A stream socketpair carries one JSON object per line, UTF-8, at most MAX_LINE_BYTES with its newline. `type`
is the name of a class below in snake case, `v` the version, and each other key a field of that class:

    {"type": "ready", "v": 2, "worker_id": "AW_4711", "warm": false}\n
    {"type": "drain", "v": 2, "drain_at": 81245.2, "close_at": 81270.2}\n

Each side ignores types and keys that it does not know, so that either side may be the newer one. A known
message that lacks a field without a default, a bad value in a field, and another version are errors. End of
file says in both directions that the other side has ended.

All times are readings of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from types import UnionType
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from lastcall.worker.base.errors import WireError
from lastcall.worker.base.records import dataclass

VERSION = 2
# Ours: the workers' own metrics are the longest message, and `exposition` stays below half of this.
MAX_LINE_BYTES = 256 * 1024
# Characters of an exception's text, a traceback or a name that are told. Ours: a character is at most 12
# bytes of JSON, and a message has at most two such texts.
MAX_TEXT = 8192

JobFate = Literal["finished", "failed", "cut", "unassigned"]
ResourceFate = Literal["closed", "forced", "leaked"]
# Why the time of a call is limited: a reload or a recycle has replaced the worker, or the worker was stuck.
# The cause is `handover` where the reload or the recycle was asked to hand the calls over. Every other stop
# of the worker or of the supervisor is `stop`.
StopCause = Literal["stop", "reload", "recycle", "stall", "handover"]
# The steps of one try to hand over a call, as the leaving agent tells them (`worker.job.leaving`).
HandoverStep = Literal[
    "prepared",
    "impossible",
    "seen",
    "silent",
    "speaks",
    "lost",
    "refused",
    "cancelled",
    "back",
    "returned",
    "withdrawn",
]
# How a handover ended that was asked for.
HandoverResult = Literal["done", "refused", "failed"]
Counts = dict[str, dict[str, int]]
# Why a worker that is ready takes no job. An operator holds it, no job process gets ready, it has as many
# jobs as `[jobs] max_running`, or livekit-agents measures a load above `load_threshold`.
FullReason = Literal["hold", "cold", "cap", "load"]
# Between the names of a room of `Served`. No name of a room or an agent has a NUL.
NUL = "\0"
FULL_REASONS: tuple[FullReason, ...] = get_args(FullReason)


# -- what a worker says --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The target was imported, and names this agent."""

    agent_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The target's import has loaded these Python files; said only where the settings ask for it."""

    files: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The worker has registered with the LiveKit server; said at each connection. `warm` as in `Beat`."""

    worker_id: str
    warm: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """The event loop of the worker turns. `warm`: a job process has once been ready for a job.

    `full`: the `FullReason` for which a registered worker takes no job, empty while it takes jobs.
    """

    lag_ms: float
    load: float
    rss_bytes: int
    registered: bool
    accepting: bool
    warm: bool
    full: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFailed:
    """A job process did not get ready for a job; it is the `failures`-th of this worker."""

    failures: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStarted:
    """A job was accepted, and has no pid yet; said again, with the pid, once its process runs it."""

    id: str
    room: str
    dispatch_id: str
    accepted_at: float
    pid: int | None
    room_sid: str = ""
    agent_name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOver:
    """The call of a job is over, by itself; its process lives on, for a bounded time."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLeft:
    """The agent of a job is not in its room any more; the job may have work to do."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCut:
    """A job was asked to shut down, or is killed, while it had more to do; its end follows."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobKeeps:
    """A job has a capsule of so many bytes, 0 for a function that returns one, since `kept_at`.

    `lacks`: why its agent can't hand it over. Empty when it can.
    """

    id: str
    size: int
    kept_at: float
    lacks: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobHandover:
    """A try to hand over a job is over. `successor`: the job that has the call now."""

    id: str
    result: HandoverResult
    reason: str = ""
    successor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverOff:
    """No call of this agent name is handed over any more; the supervisor tells it to the other workers."""

    agent_name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnded:
    """A job has ended, `seconds` after it was accepted.

    `process` says how the process ended, when that was not as its call did: `killed`, `exit code 3`.
    `by_server`: a `finished` job that the owner of its room has ended. `successor`: a `finished` job whose
    call goes on in that job. `callbacks`: `killed` where such a job was ended before its callbacks were done.
    """

    id: str
    fate: JobFate
    seconds: float
    process: str = ""
    by_server: bool = False
    successor: str = ""
    callbacks: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fenced:
    """The worker has answered no offer with yes since `at`, and does so no more."""

    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """No job is left, or the time for them is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One resource was closed. `counts`: the parts of the resource by fate, where it has parts."""

    name: str
    fate: ResourceFate
    counts: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsText:
    """The answer to `AskMetrics` of the same id: Prometheus text, empty when it would be too long."""

    id: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShieldOpen:
    """A stop signal would end the process `pid`; `open_to` names the signals."""

    pid: int
    open_to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobNotAsked:
    """A job could not be asked to shut down, because its pipe broke."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The process ends with the code `exit` for this reason. `traceback` is the user's own part of it."""

    exit: int
    message: str
    traceback: str


WorkerSays = (
    Loaded
    | Imported
    | Ready
    | Beat
    | ProcessFailed
    | JobStarted
    | JobOver
    | JobLeft
    | JobCut
    | JobKeeps
    | JobHandover
    | HandoverOff
    | JobEnded
    | Fenced
    | Drained
    | Resource
    | MetricsText
    | ShieldOpen
    | JobNotAsked
    | Fault
)


# -- what the supervisor says to a worker --------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Accept nothing for as long as the hold is on."""

    on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """Begin the stop: accept nothing more."""

    reason: str
    cause: StopCause = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Wait for jobs until `drain_at`, and be closed by `close_at`; said again whenever the deadlines move.

    A worker that drains early closes within `close_at - drain_at` from then, not within the rest of grace.
    `cause`: that of the reason to stop which has the earliest deadline.
    """

    drain_at: float
    close_at: float
    cause: StopCause = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The rooms in which other workers have agents; said when the worker registers.

    Each is its name, its sid and the name of the agent, with `NUL` between them.
    """

    rooms: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """Have a job go on elsewhere; answered by `JobHandover`. With an empty id: every job, once fenced."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminate:
    """Kill what is left, and exit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskMetrics:
    """Answer with `Metrics` of the same id."""

    id: int


WorkerHears = Hold | Fence | Drain | Served | HandOver | HandoverOff | Terminate | AskMetrics


# -- what the Inworld broker says and hears ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """The broker accepts connections; said after the first `Key`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerBeat:
    """The broker's event loop turns; its clients, and the figures of its pool (`pool.figures.Figures`).

    `direct`: TTS objects of jobs that go to Inworld beside the pool.
    """

    lag_ms: float
    rss_bytes: int
    clients: int
    connections: int
    dialling: int
    contexts: int
    waiters: int
    granted: int
    waited: int
    wait_seconds: float
    refusals: int
    failed_dials: int
    retries: int
    second_tries: int
    lost: int
    faults: int
    direct: int = 0


BrokerSays = Serving | BrokerBeat | Resource | Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """The API key for the connections that are made from now on. No other message has it.

    `accepts`: the digests (`inworld_keys`) of every key that the jobs of this moment may show, with spaces
    between them.
    """

    key: str = field(repr=False)
    accepts: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Be closed by `close_at`; said again, only to make it sooner."""

    close_at: float


BrokerHears = Key | Close


# -- what a job says to the rehearsal that it runs in; one line each in a datagram ---------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EntrypointBegan:
    """The job's process calls the entrypoint of the agent."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EntrypointFailed:
    """The entrypoint of the agent raised; the job is kept open all the same."""

    job: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownAsked:
    """Code of the agent asked for the end of its job. `has_handler`: the agent handles SIGTERM by itself."""

    job: str
    at: float
    has_handler: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EntrypointOver:
    """The job was kept open for as long as it had to be, and ends now."""

    job: str


RehearsedJobSays = EntrypointBegan | EntrypointFailed | ShutdownAsked | EntrypointOver


# -- what a call and its worker say to each other; one line each in a packet ---------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CallJoined:
    """The code of this job has asked for its call; said once, before everything else."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AskExtension:
    """The call needs so many seconds beyond its deadline; answered by a `Limit` that names this id."""

    id: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CallKeeps:
    """The call has a capsule of so many bytes, 0 for a provider, since `kept_at`.

    `lacks`: why the call can't be handed over, as far as its agent knows. Empty when it can.
    """

    size: int
    kept_at: float
    lacks: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStep:
    """A step of the handover of this epoch has been taken.

    `job`: the successor's, of `seen`. `detail`: the reason, of `impossible`, `refused` and `lost`. Of
    `returned` it is the sid and the identity of an agent, with a space between them. `withdrawn` is a step of
    the successor: it leaves again, and the call stays where it is.
    """

    epoch: int
    step: HandoverStep
    job: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskHandover:
    """The agent wants its call to go on in another job; answered by `HandoverOver` of this id."""

    id: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AskRemoval:
    """The predecessor of this call does not answer; answered by `Removed` of this id."""

    id: int
    sid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AskToSpeak:
    """The predecessor of this call is silent; answered by `MaySpeak` of this id, if the worker lives."""

    id: int


CallSays = CallJoined | AskExtension | CallKeeps | CallStep | AskHandover | AskRemoval | AskToSpeak


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The call has to end by itself until `due_at`; said again whenever that moves.

    `answers`: the id of the `AskExtension` that this answers, 0 for none.
    """

    cause: StopCause
    due_at: float
    answers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginHandover:
    """Get ready for a successor. It will have this epoch and identity, and will show the secret.

    `wait`: seconds for the agent to be no longer busy.
    """

    call: str
    epoch: int
    identity: str
    secret: str = field(repr=False)
    wait: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelHandover:
    """Refuse the successor of this epoch from now on, unless it may speak already."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeBack:
    """The successor of this epoch is gone, and has not spoken: speak again."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveRoom:
    """The successor of this epoch speaks: end the job."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverOver:
    """The handover that the agent has asked for is over."""

    id: int
    result: HandoverResult
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """The answer to `AskRemoval`: whether the predecessor is out of the room."""

    id: int
    is_gone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MaySpeak:
    """The answer to `AskToSpeak`."""

    id: int


CallHears = Limit | BeginHandover | CancelHandover | TakeBack | LeaveRoom | HandoverOver | Removed | MaySpeak
Message = WorkerSays | WorkerHears | BrokerSays | BrokerHears | RehearsedJobSays | CallSays | CallHears
M = TypeVar("M", bound=Message)
Said = TypeVar("Said", bound=Message)
Heard = TypeVar("Heard", bound=Message)
Check = Callable[[object], bool]
_ENCODER = json.JSONEncoder(separators=(",", ":"))


# -- to and from lines ---------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """Return one line for a message. Raises WireError when it would be longer than a reader accepts."""
    name, keys = _WORDS[type(message)]
    document = {"type": name, "v": VERSION, **{key: getattr(message, key) for key in keys}}
    line = _ENCODER.encode(document).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise WireError(
            f"control message {name!r} has {len(line)} bytes, at most {MAX_LINE_BYTES} are allowed"
        )
    return line


def shortened(text: str) -> str:
    """Return a text of foreign code that fits into a message, without its middle where it is too long."""
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]} … {text[-half:]}"


class Vocabulary(Generic[M]):
    """The messages that one side says, each by its type on the wire."""

    __slots__ = ("_classes",)

    def __init__(self, *classes: type[M]) -> None:
        self._classes = {_type_of(each): (each, _fields_of(each)) for each in classes}

    def decode(self, line: bytes) -> M | None:
        """Return the message of one line; None for a type that this side does not know.

        Raises WireError for a line that is no message, of another version, or with a bad value. The text of
        the error quotes no value, because a value may be the API key.
        """
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WireError(f"control message of {len(line)} bytes is not JSON") from error
        if not isinstance(document, dict) or not isinstance(document.get("type"), str):
            raise WireError("control message has no type")
        if document.get("v") != VERSION:
            raise WireError(f"control message speaks version {document.get('v')!r}, expected {VERSION}")
        if document["type"] not in self._classes:
            return None
        message, known = self._classes[document["type"]]
        return message(**_values(document, known))


class Decoder(Generic[M]):
    """Turn chunks of a byte stream into messages; never holds more than one line."""

    __slots__ = ("_rest", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary[M]) -> None:
        self._vocabulary = vocabulary
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[M]:
        """Return the messages that this chunk completes. Raises WireError as `Vocabulary.decode` does."""
        self._rest += chunk
        *lines, rest = self._rest.split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise WireError(f"control message is longer than {MAX_LINE_BYTES} bytes")
        self._rest = rest
        messages = [self._vocabulary.decode(bytes(line)) for line in lines if line]
        return [message for message in messages if message is not None]


def _type_of(message: type) -> str:
    """Return `job_started` for JobStarted."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", message.__name__).lower()


def _fields_of(message: type[M]) -> dict[str, tuple[Check, bool]]:
    """Return the check of each field, and whether a message must have it.

    The annotations are strings. Resolving them takes time, so that it is done once.
    """
    types = get_type_hints(message)
    return {each.name: (_check_of(types[each.name]), each.default is MISSING) for each in fields(message)}


def _values(document: Mapping[str, Any], known: Mapping[str, tuple[Check, bool]]) -> dict[str, Any]:
    values = {}
    for name, (is_valid, is_required) in known.items():
        if name in document:
            if not is_valid(document[name]):
                raise WireError(f"control message {document['type']!r} has a bad {name}")
            values[name] = document[name]
        elif is_required:
            raise WireError(f"control message {document['type']!r} has no {name}")
    return values


def _check_of(hint: Any) -> Check:  # a type as typing has it: there is no class for all of them
    """Return the check of a value that came from JSON, for the types that messages have."""
    if isinstance(hint, UnionType):
        either = [_check_of(each) for each in get_args(hint)]
        return lambda value: any(is_valid(value) for is_valid in either)
    if get_origin(hint) is Literal:
        words = frozenset(get_args(hint))
        return lambda value: isinstance(value, str) and value in words
    if get_origin(hint) is list:
        is_item = _check_of(get_args(hint)[0])
        return lambda value: isinstance(value, list) and all(map(is_item, value))
    if get_origin(hint) is dict:
        is_value = _check_of(get_args(hint)[1])
        return lambda value: isinstance(value, dict) and all(map(is_value, value.values()))
    if hint is float:
        return _is_float
    if hint is int:
        return lambda value: isinstance(value, int) and not isinstance(value, bool)
    return lambda value: isinstance(value, hint)


def _is_float(value: object) -> bool:
    """Refuse NaN and infinity, which Python's JSON has: a deadline that is NaN would never pass."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# The type of each message, and its fields. Made here, because the first fence must not wait for it.
_WORDS: dict[type, tuple[str, tuple[str, ...]]] = {
    each: (_type_of(each), tuple(key.name for key in fields(each))) for each in get_args(Message)
}
OF_WORKER: Vocabulary[WorkerSays] = Vocabulary(*get_args(WorkerSays))
FOR_WORKER: Vocabulary[WorkerHears] = Vocabulary(*get_args(WorkerHears))
OF_BROKER: Vocabulary[BrokerSays] = Vocabulary(*get_args(BrokerSays))
FOR_BROKER: Vocabulary[BrokerHears] = Vocabulary(*get_args(BrokerHears))
OF_CALL: Vocabulary[CallSays] = Vocabulary(*get_args(CallSays))
FOR_CALL: Vocabulary[CallHears] = Vocabulary(*get_args(CallHears))
OF_REHEARSED_JOB: Vocabulary[RehearsedJobSays] = Vocabulary(*get_args(RehearsedJobSays))
