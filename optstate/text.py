"""Text for people: how items that users compose are printed and parsed, and names made safe to show."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar
from unicodedata import category

__all__ = ["HIDDEN", "escaped", "has_controls", "parse_item", "parsed_call", "short", "shown"]

T = TypeVar("T")

HIDDEN = {"hidden": True}
"""Metadata of a dataclass field that the library sets itself and `short` therefore leaves out."""


def short(item: Any) -> str:
    """Return `Name(field=value)` of a dataclass instance, with the fields that differ from their defaults."""
    parts = [
        f"{f.name}={getattr(item, f.name)!r}"
        for f in fields(item)
        if "hidden" not in f.metadata
        if f.default is MISSING or getattr(item, f.name) != f.default
    ]
    return f"{type(item).__name__}({', '.join(parts)})"


def parsed_call(text: str) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Parse text such as "Block8(block=64)", or "block8", into a name in lower case, arguments and named arguments.

    Only constants are taken as arguments; nothing is evaluated.

    Raises:
        ValueError: if the text is not a name, or a call of one with constants.
    """
    try:
        call = ast.parse(text.strip() if "(" in text else f"{text.strip()}()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        arguments = tuple(ast.literal_eval(item) for item in call.args)
        named = {item.arg: ast.literal_eval(item.value) for item in call.keywords if item.arg}
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{text[:60]!r} is no name with constants") from None
    return call.func.id.lower(), arguments, named


def parse_item(text: str, kinds: Mapping[str, type[T]]) -> T:
    """Make the item that `text` describes, such as "Block8(block=64)" as `short` prints it, or "block8".

    Args:
        text: a class name in any case, with or without arguments.
        kinds: the possible classes by their names in lower case; nothing else is called.

    Raises:
        ValueError: if the class is none of `kinds` or does not take the arguments.
    """
    try:
        name, arguments, named = parsed_call(text)
        kind = kinds[name]
    except (ValueError, KeyError):
        known = ", ".join(sorted(kind.__name__ for kind in kinds.values()))
        raise ValueError(f"{text[:60]!r} is none of {known}") from None
    try:
        return kind(*arguments, **named)
    except TypeError as error:
        raise ValueError(f"{text[:60]!r}: {error}") from None


LONGEST = 200  # characters of one name or path in a message
LONGEST_REASON, LONGEST_HINT = 500, 250

CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that change how the text around them is shown."""


def has_controls(text: str) -> bool:
    """Return whether a name has characters that no name needs and that change how the text around it is shown.

    These characters are control and formatting characters, halves of surrogate pairs, and separators of lines and
    paragraphs.
    """
    return not text.isprintable() and any(category(c) in CONTROLS for c in text)


def escaped(text: str) -> str:
    """Return `text` on one line, with control, formatting and surrogate characters escaped as in a Python string.

    A tensor may be called "\\x1b[31mred\\n" in a file that every reader accepts; "\\u202e" reverses what follows.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text: str) -> str:
    """Return `text` escaped, with its middle left out if it has more than 200 characters."""
    return limited(text, LONGEST)


def limited(text: str, most: int) -> str:
    """Return `text` escaped, with its middle left out if it has more than `most` characters, escapes included."""
    return _shortened(escaped(_shortened(text, most)), most)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}...{text[len(text) - most // 2 :]}"
