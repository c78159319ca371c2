"""Generators of random numbers that nobody has seeded, and whose state a fork copies.

In each fork CPython seeds the generator behind `random.random()` anew (Lib/random.py), and OpenSSL does the
same with that of the library. All other generators go on with one state in every fork. An example is the
default `random.Random()` of aiohttp, for the masks of WebSocket frames (aiohttp/_websocket/writer.py).
"""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any  # numpy may not be there

Unseeded = weakref.WeakSet[random.Random]
# NumPy draws 128 bits for a generator that nobody has seeded (SeedSequence). A seed that somebody has chosen
# is shorter: one of 2^64 and more would be taken for a draw.
SHORTEST_DRAW = 1 << 64


@contextmanager
def noted(found: Unseeded) -> Iterator[None]:
    """Note each `random.Random` that is made in the block and seeded by nobody."""
    kind = random.Random
    plain_seed, plain_setstate = kind.seed, kind.setstate

    def seed(self: random.Random, a: Any = None, version: int = 2) -> None:
        plain_seed(self, a, version)
        (found.add if a is None else found.discard)(self)

    def setstate(self: random.Random, state: Any) -> None:
        plain_setstate(self, state)
        found.discard(self)

    kind.seed, kind.setstate = seed, setstate  # type: ignore[method-assign]  # for this block
    try:
        yield
    finally:
        kind.seed, kind.setstate = plain_seed, plain_setstate  # type: ignore[method-assign]


def generators_of_numpy() -> list[Any]:
    """Return the bit generators of NumPy in the globals of modules that nobody has seeded.

    NumPy's own one, behind `numpy.random.random()`, is not among them.
    """
    numbers = sys.modules.get("numpy.random")
    if numbers is None:
        return []
    found: dict[int, Any] = {}
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            if type(value) is numbers.Generator:
                bits = value.bit_generator
                entropy = getattr(bits.seed_seq, "entropy", None)
                if isinstance(entropy, int) and entropy >= SHORTEST_DRAW:
                    found[id(bits)] = bits
    return list(found.values())


def seed_anew(unseeded: Unseeded, bit_generators: list[Any]) -> None:
    """Give each generator, and NumPy's own one, a state of this process."""
    for each in unseeded:
        each.seed()
    for bits in bit_generators:
        bits.state = type(bits)().state
    numbers = sys.modules.get("numpy.random")
    if numbers is not None:
        numbers.seed()
