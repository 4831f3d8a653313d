"""Short text for the frozen dataclasses users compose."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

__all__ = ["HIDDEN", "from_words", "short"]

T = TypeVar("T")

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


def from_words(text: str, kinds: Mapping[str, type[T]]) -> T:
    """The item that `text` names as `short` prints it, or by its class alone; `kinds` by their names in lower case.

    Only constants are taken as arguments; nothing is evaluated.

    Raises:
        ValueError: if it names none of them, or its arguments are not possible ones.
    """
    try:
        call = ast.parse(text.strip() if "(" in text else f"{text.strip()}()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        arguments: list[Any] = [ast.literal_eval(item) for item in call.args]
        named: dict[str, Any] = {item.arg: ast.literal_eval(item.value) for item in call.keywords if item.arg}
        kind = kinds[call.func.id.lower()]
    except (ValueError, SyntaxError, KeyError, RecursionError, MemoryError):
        known = ", ".join(sorted(kind.__name__ for kind in kinds.values()))
        raise ValueError(f"{text[:60]!r} is none of {known}") from None
    try:
        return kind(*arguments, **named)
    except TypeError as error:
        raise ValueError(f"{text[:60]!r}: {error}") from None
