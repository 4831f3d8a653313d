"""Statistics that are lists of tensors, as SOAP's and Shampoo's one matrix per dimension. Imports no torch."""

from __future__ import annotations

from typing import Any

from optstate.checkpoint.files.tensor_place import Stored

__all__ = ["has_tensors", "take_apart"]

DEEPEST = 4
"""Lists within each other."""


def has_tensors(value: Any, depth: int = 0) -> bool:
    """Whether a value is a list or tuple with a tensor of several numbers in it, or in one of its lists."""
    if isinstance(value, Stored):
        return depth > 0 and value.elements > 1
    return isinstance(value, list | tuple) and depth < DEEPEST and any(has_tensors(item, depth + 1) for item in value)


def take_apart(value: Any) -> tuple[dict[str, Stored], Any]:
    """Return the tensors in lists by their places, as "0" or "1_0", and the lists with None in those places."""
    found: dict[str, Stored] = {}

    def without(item: Any, place: str) -> Any:
        if isinstance(item, Stored):
            found[place] = item
            return None
        if isinstance(item, list | tuple):
            inner = [without(part, f"{place}_{i}" if place else str(i)) for i, part in enumerate(item)]
            return inner if isinstance(item, list) else tuple(inner)
        return item

    return found, without(value, "")
