"""The attributes of a dispatch by which a call goes on in another job.

The worker of the leaving agent writes them, beside the original metadata and attributes of the job. The
worker that takes the dispatch takes them out again before the agent's `request_fnc` sees the offer, and the
job of the arriving agent does so before its entrypoint runs. No participant sees the secret.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field

# Participants of a call that is handed over have the first two too, so that agents know each other.
CALL = "lastcall.call"
EPOCH = "lastcall.epoch"
COUNT = "lastcall.count"
PREDECESSOR = "lastcall.predecessor"
IDENTITY = "lastcall.identity"
SECRET = "lastcall.secret"
REASON = "lastcall.reason"
# The arriving agent sets this attribute to the epoch, at the moment from which the agent may speak. Only a
# participant of the kind AGENT with the identity that the dispatch names is believed.
SPEAKS = "lastcall.speaks"
# An agent that has its voice back sets this attribute to the epoch of the successor that has failed.
WITHDRAWN = "lastcall.withdrawn"
# Between the identity of the first agent of a call and the epoch. Ours: rare in identities.
MARK = "~"


@dataclass(frozen=True, slots=True, kw_only=True)
class Succession:
    """One try to hand over a call.

    `call`: the id of the first job of the call. `epoch`: of the arriving agent. Each try has the next one.
    `count`: how often the call has been handed over, this time included. `predecessor` and `identity` are
    those of the leaving and of the arriving agent.
    """

    call: str
    epoch: int
    count: int
    predecessor: str
    identity: str
    secret: str = field(repr=False)
    reason: str = ""

    def attributes(self) -> dict[str, str]:
        """Return the attributes of the dispatch."""
        return {
            CALL: self.call,
            EPOCH: str(self.epoch),
            COUNT: str(self.count),
            PREDECESSOR: self.predecessor,
            IDENTITY: self.identity,
            SECRET: self.secret,
            REASON: self.reason,
        }

    @property
    def shown(self) -> dict[str, str]:
        """The attributes of the arriving participant, which everybody in the room sees."""
        return {CALL: self.call, EPOCH: str(self.epoch)}


def taken_from(attributes: MutableMapping[str, str]) -> Succession | None:
    """Take the attributes of a handover out of those of a job; None, and nothing taken, if it is none.

    A dispatch whose figures can't be read is none: no version of lastcall writes one.
    """
    needed = (CALL, EPOCH, COUNT, PREDECESSOR, IDENTITY, SECRET)
    if not all(name in attributes for name in needed):  # to read a name would add it, in a map of protobuf
        return None
    try:
        found = Succession(
            call=attributes[CALL],
            epoch=int(attributes[EPOCH]),
            count=int(attributes[COUNT]),
            predecessor=attributes[PREDECESSOR],
            identity=attributes[IDENTITY],
            secret=attributes[SECRET],
            reason=attributes.get(REASON, ""),
        )
    except ValueError:
        return None
    for name in (*needed, REASON):
        attributes.pop(name, None)
    return found


def successor_identity(identity: str, epoch: int) -> str:
    """Return the identity of the arriving agent: that of the first agent of the call, with the epoch.

    An identity that two agents have would throw out the older agent and end the job of the newer one.
    """
    base, mark, number = identity.rpartition(MARK)
    return f"{base if mark and number.isdigit() else identity}{MARK}{epoch}"


def epoch_of(attributes: Mapping[str, str], call: str) -> int:
    """Return the epoch that a participant shows for a call; -1 for a participant of no or another call."""
    return _number(attributes, call, EPOCH)


def speaks_at(attributes: Mapping[str, str], call: str) -> int:
    """Return the epoch at which a participant says that it speaks in a call; -1 where it does not."""
    epoch = _number(attributes, call, EPOCH)
    return epoch if epoch == _number(attributes, call, SPEAKS) else -1


def is_superseded(call: str, epoch: int, agents: Iterable[Mapping[str, str]]) -> bool:
    """Tell whether an agent of this epoch has no right to speak, by the attributes of the other agents.

    So it is when a later one speaks, or when an older one has taken its voice back from this epoch.
    """
    return any(speaks_at(each, call) > epoch or _number(each, call, WITHDRAWN) >= epoch for each in agents)


def _number(attributes: Mapping[str, str], call: str, name: str) -> int:
    text = attributes.get(name, "")
    return int(text) if attributes.get(CALL) == call and text.isdigit() else -1
