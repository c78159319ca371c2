"""The state of an AgentSession as JSON: the history, the current agent by its class, and its context.

The state of a session is

    {"agent": "Booker", "items": {KEY: ITEM}, "history": [KEY], "context": [KEY], "userdata": …, …}

An item is as a rule in the history and in the agent's context, and is written once. Its key is its id. An
agent may have changed a copy, which then has another key. The last turns of a leaving agent have the same
form, with those items only that the state before had not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from livekit.agents import llm

from lastcall.worker.job.capsule import NotJson

Item = dict[str, Any]  # Any: JSON
State = dict[str, Any]  # Any: JSON
# Behind the id of an item that the context of the agent has in another form than the history.
OF_CONTEXT = "/context"


class NotKept(NotJson):
    """Raised for a session that no successor could go on with. Names the reason, and no word of the call."""


class NotResumed(RuntimeError):
    """Raised in a successor that can't use the state which its predecessor left."""


def kept(history: Iterable[Any], context: Iterable[Any]) -> State:
    """Return the items of a history and of a context. Raises NotKept."""
    items: dict[str, Item] = {}
    state: State = {"items": items, "history": [], "context": []}
    for name, each in (("history", history), ("context", context)):
        for item in each:
            dumped = _dumped(item)
            key = str(item.id)
            if items.setdefault(key, dumped) != dumped:
                key += OF_CONTEXT
                items[key] = dumped
            state[name].append(key)
    return state


def since(before: Mapping[str, Item], state: State) -> State:
    """Return a state without the items that `before` has."""
    items = {key: item for key, item in state["items"].items() if before.get(key) != item}
    return {**state, "items": items}


def restored(state: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return the items of the history and of the context, of livekit-agents' classes. Raises NotResumed.

    An item is one object in both, as in a session that has not been handed over.
    """
    try:
        keys = dict.fromkeys([*state["history"], *state["context"]])
        items = llm.ChatContext.from_dict({"items": [state["items"][key] for key in keys]}).items
        by_key = dict(zip(keys, items, strict=True))
        return [by_key[key] for key in state["history"]], [by_key[key] for key in state["context"]]
    except (KeyError, TypeError, ValueError) as error:
        # `from None`: the text of pydantic's error shows the item, which is what a caller has said
        raise NotResumed(
            f"lastcall.resume_session: {type(error).__name__}: this livekit-agents can't read the history of"
            " the leaving agent; run the same version, or a newer one"
        ) from None


def _dumped(item: Any) -> Item:
    """Return an item as JSON, without frames of audio and video: an image that has a URL stays."""
    if item.type == "message" and not all(map(_has_text, item.content)):
        item = copy.copy(item)
        item.content = [part for part in item.content if _has_text(part)]
    try:
        dumped: Item = item.model_dump(mode="json", exclude_none=True)
    except ValueError as error:
        raise NotKept(f"an item of the history ({item.type}) is no JSON: {type(error).__name__}") from None
    return dumped


def _has_text(part: Any) -> bool:
    """Tell whether a part of a message is a text, a mark, or an image with a URL, and has no frames."""
    return not hasattr(part, "frame") and isinstance(getattr(part, "image", ""), str)
