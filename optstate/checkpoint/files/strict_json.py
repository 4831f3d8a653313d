"""JSON as a file of unknown origin needs it: duplicates are seen, and a huge value is never built.

Python's own decoder keeps the last of two equal names, takes NaN for a number and builds whatever is written: a list
of empty lists takes twenty times its text. Here the caller goes through an object member by member and decodes a
value at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from optstate.text import shown

__all__ = ["NotJSONError", "Pairs", "decode", "decode_string", "members", "only_object", "plain"]

MAX_VALUE = 1 << 18  # characters of one value; that of a usual tensor has a hundred


def _integer(text: str) -> int | float:
    # -0 is no unsigned integer for the library either; more than 20 digits are above 2**64, and slow to convert.
    return int(text) if len(text) <= 20 and text != "-0" else float("nan")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is out of range")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written: in order, with its duplicates."""

    __slots__ = ()


_DECODER = json.JSONDecoder(
    object_pairs_hook=Pairs, parse_int=_integer, parse_float=_float, parse_constant=_constant, strict=True
)
_SPACE = re.compile(r"[ \t\n\r]*")


class NotJSONError(Exception):
    """Text that is not JSON, with the place."""


def _skip(text: str, at: int) -> int:
    if at < len(text) and text[at] not in " \t\n\r":
        return at
    match = _SPACE.match(text, at)
    assert match is not None  # the pattern matches an empty string
    return match.end()


def _expect(text: str, at: int, character: str) -> int:
    """Past white space and `character`."""
    at = _skip(text, at)
    if not text.startswith(character, at):
        found = f"'{shown(text[at])}'" if at < len(text) else "the end"
        raise NotJSONError(f"'{character}' expected at character {at}, found {found}")
    return at + len(character)


Member = Callable[[str, int], int]


def members(text: str, at: int, member: Member) -> int:
    """Go through the object at `at`: `member(name, at)` reads one value and returns where it ends, as this does."""
    at = _expect(text, at, "{")
    if text.startswith("}", end := _skip(text, at)):
        return end + 1
    while True:
        name, at = decode_string(text, _skip(text, at))
        at = _skip(text, member(name, _skip(text, _expect(text, at, ":"))))
        if text.startswith("}", at):
            return at + 1
        at = _expect(text, at, ",")


def only_object(text: str, member: Member) -> None:
    """Go through the one object that `text` consists of."""
    end = _skip(text, members(text, 0, member))
    if end != len(text):
        raise NotJSONError(f"'{shown(text[end])}' after its end, at character {end}")


def decode_string(text: str, at: int) -> tuple[str, int]:
    """The string at `at`, of any length, and where it ends."""
    if not text.startswith('"', at):
        raise NotJSONError(f"a string in double quotes expected at character {at}")
    string: str
    string, end = _decode(text, at)
    _check_surrogates(text[at:end], string, at)
    return string, end


def decode(text: str, at: int) -> tuple[Any, int]:
    """The value at `at`, of at most MAX_VALUE characters, and where it ends."""
    length = 1 << 9
    while True:
        part = text[at : at + length]
        whole = at + length >= len(text)
        try:
            value, end = _decode(part, 0, at)
        except NotJSONError as error:
            if whole:
                raise
            if length >= MAX_VALUE:
                raise NotJSONError(f"{error}, or this value has more than {MAX_VALUE} characters") from None
        else:
            if whole or end < length:  # a number that ends with the part may go on behind it
                _check_surrogates(part[:end], value, at)
                return value, at + end
        length *= 2


def _decode(text: str, at: int, before: int = 0) -> tuple[Any, int]:
    """The value at `at` of a text that has `before` characters before it."""
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise NotJSONError(f"nested too deeply in the value at character {before + at}") from None
    except json.JSONDecodeError as error:
        raise NotJSONError(f"{error.msg} at character {before + error.pos}") from None
    except ValueError as error:
        raise NotJSONError(f"{error}, in the value at character {before + at}") from None


def _check_surrogates(written: str, value: Any, at: int) -> None:
    """Escapes may spell half of a surrogate pair, which no encoding can hold; other text came from UTF-8."""
    if "\\" in written and "\\ud" in written.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise NotJSONError(f"half of a surrogate pair in the value at character {at}") from None


def plain(value: Any) -> Any:
    """Decoded JSON with ordinary dicts; the last of equal names counts."""
    if isinstance(value, Pairs):
        return {name: plain(item) for name, item in value}
    return [plain(item) for item in value] if isinstance(value, list) else value
