"""Finding the objects of a class that are alive, where nothing leads to them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

__all__ = ["instances_of"]


def instances_of(*kinds: type) -> list[Any]:
    """The objects of these classes, or of classes derived from them, that are alive now: some tens of milliseconds.

    An object refers to its class, so the collector finds it among what refers to the class. A list of all objects is
    no way: it would hold what other threads are just building, and CPython raises a SystemError in a thread whose
    half-built tuple somebody else holds.
    """
    family = {each for kind in kinds for each in _family(kind)}
    return [item for item in gc.get_referrers(*family) if type(item) in family]


def _family(kind: type) -> Iterator[type]:
    yield kind
    derived: type
    for derived in type.__subclasses__(kind):
        yield from _family(derived)
