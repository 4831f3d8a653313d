"""Short text for the frozen dataclasses users compose."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

__all__ = ["HIDDEN", "short"]

HIDDEN = {"hidden": True}
"""Metadata of a dataclass field that the library sets itself, so that it is no part of how a user writes the item."""


def short(item: Any) -> str:
    """`Name(field=value)` with the fields that differ from their defaults."""
    parts = [
        f"{f.name}={getattr(item, f.name)!r}"
        for f in fields(item)
        if "hidden" not in f.metadata
        if f.default is MISSING or getattr(item, f.name) != f.default
    ]
    return f"{type(item).__name__}({', '.join(parts)})"
