"""`dataclass` for modules that a supervisor imports at its start, in a third of the time.

The one of the standard library compiles five to nine functions for each class, and a supervisor has a
hundred classes: a quarter of the processor time until its first child. Here only `__init__` is compiled, and
the other functions are the same for all classes. mypy checks that a frozen object is not changed, and nothing
checks it when the program runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    import dataclasses
    from operator import attrgetter

    def dataclass(*, frozen=False, eq=True, **options):
        """Return a decorator that does what `dataclasses.dataclass` does, other than to freeze."""

        def decorate(cls):
            made = dataclasses.dataclass(eq=False, repr=False, **options)(cls)
            if "__repr__" not in vars(cls):
                made.__repr__ = _repr
            if eq:
                names = [each.name for each in dataclasses.fields(made) if each.compare]
                values = attrgetter(*names) if names else type
                made.__eq__ = _eq_of(values)
                made.__hash__ = _hash_of(values) if frozen else None
            return made

        return decorate

    def _eq_of(values):
        def is_equal(self, other):
            return values(self) == values(other) if type(other) is type(self) else NotImplemented

        return is_equal

    def _hash_of(values):
        return lambda self: hash(values(self))

    def _repr(self):
        shown = [
            f"{each.name}={getattr(self, each.name)!r}" for each in dataclasses.fields(self) if each.repr
        ]
        return f"{type(self).__qualname__}({', '.join(shown)})"


__all__ = ["dataclass"]
