"""JSON of unknown origin, by Python's own decoder: equal names are seen, and no value is built that is not bounded.

`parse_json` decodes a whole text, `parse_python_json` one that Python's `json` may have written. `members` goes through
an object of any length: usual members are decoded many at a time, all others alone and only up to a length, since a
list of empty lists takes twenty times its text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

from optstate.text import shown

__all__ = ["NotJSONError", "Pairs", "as_plain_dicts", "members", "parse_json", "parse_python_json"]

MAX_VALUE = 1 << 18  # characters of a value that is decoded alone; that of a usual tensor has a hundred
STRIDE = 1 << 14
"""Characters that are decoded at a time, and a member more."""

_SPACE = re.compile(r"[ \t\n\r]*")
_MINUS_ZERO = re.compile(r"[\[:,\s]-0")


class NotJSONError(Exception):
    """Text that is not JSON, with the place."""


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written: in order, with its duplicates."""

    __slots__ = ()


class _RefusedNumberError(ValueError):
    """A number that Python's decoder takes and JSON does not have."""


def _integer(text: str) -> int | float:
    # -0 is no unsigned integer for the library either; more than 20 digits are above 2**64, and slow to convert.
    return int(text) if len(text) <= 20 and text != "-0" else float(text)


def _float(text: str) -> float:
    if math.isinf(value := float(text)):
        raise _RefusedNumberError("a number is out of range")
    return value


def _constant(text: str) -> float:
    raise _RefusedNumberError(f"{text} is not JSON")


def _exact_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # thousands of digits
        raise _RefusedNumberError("an integer is too long") from None


_decoder = partial(json.JSONDecoder, parse_int=_integer, parse_float=_float, parse_constant=_constant)
_PAIRS = _decoder(object_pairs_hook=Pairs)
_USUAL = json.JSONDecoder(object_pairs_hook=Pairs, parse_float=_float, parse_constant=_constant)
"""Converts integers without a call to Python: for text in which none is -0 and none has thousands of digits."""

_EXPECTED = {
    "Expecting property name enclosed in double quotes": "a string in double quotes expected",
    "Illegal trailing comma before end of object": "a string in double quotes expected",
}
"""Our words for those of Python's decoder, which differ from version to version."""


def _decode(text: str, at: int, before: int = 0, decoder: json.JSONDecoder = _PAIRS) -> tuple[Any, int]:
    """Decode the value at `at` of a text that has `before` characters before it; return where the value ends, too."""
    value, end = _raw_decode(text, at, before, decoder)
    # Escapes may spell half of a surrogate pair, which no encoding can hold; other text came from UTF-8.
    if text.find("\\", at, end) >= 0 and "\\ud" in text[at:end].lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise NotJSONError(f"half of a surrogate pair in the value at character {before + at}") from None
    return value, end


def _raw_decode(text: str, at: int, before: int, decoder: json.JSONDecoder) -> tuple[Any, int]:
    """Decode as `_decode` does, but let any text pass that escapes spell."""
    try:
        return decoder.raw_decode(text, at)
    except RecursionError:
        raise NotJSONError(f"nested too deeply in the value at character {before + at}") from None
    except json.JSONDecodeError as error:
        raise NotJSONError(f"{_EXPECTED.get(error.msg, error.msg)} at character {before + error.pos}") from None
    except _RefusedNumberError as error:
        raise NotJSONError(f"{error}, in the value at character {before + at}") from None


def _skip(text: str, at: int) -> int:
    """Return where the white space at `at` ends."""
    if at < len(text) and text[at] not in " \t\n\r":
        return at
    match = _SPACE.match(text, at)
    assert match is not None  # the pattern matches an empty string
    return match.end()


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] = Pairs) -> Any:
    """Decode a whole text, whose length the caller bounds.

    Args:
        text: one JSON value with white space around it.
        pairs: makes of an object's members what stands for the object, such as `dict`. What it raises passes.

    Raises:
        NotJSONError: if the text is anything else, NaN and numbers beyond the range of doubles included.
    """
    decoder = _PAIRS if pairs is Pairs else _decoder(object_pairs_hook=pairs)
    value, end = _decode(text, _skip(text, 0), decoder=decoder)
    _check_end(text, end)
    return value


def parse_python_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] = dict, *, nan: bool = True) -> Any:
    """Decode a whole text to the values that Python's `json` wrote it from.

    Integers of any size are exact, text may hold half of a surrogate pair, and NaN and the infinities are numbers.

    Args:
        text: one value with white space around it, whose length the caller bounds.
        pairs: makes of an object's members what stands for the object. What it raises passes.
        nan: False to take NaN and the infinities for no JSON, as `parse_json` does.

    Raises:
        NotJSONError: if the text is anything else, or has an integer of more digits than Python converts.
    """
    constant = None if nan else _constant
    decoder = json.JSONDecoder(object_pairs_hook=pairs, parse_int=_exact_integer, parse_constant=constant)
    value, end = _raw_decode(text, _skip(text, 0), 0, decoder)
    _check_end(text, end)
    return value


def _check_end(text: str, at: int) -> None:
    if (end := _skip(text, at)) != len(text):
        raise NotJSONError(f"'{shown(text[end])}' after its end, at character {end}")


def members(text: str, streamed: Container[str] = ()) -> Iterator[tuple[str, Any]]:
    """Return an iterator of the name and the value of each member of the object that a text is, with duplicates.

    Objects within are `Pairs`. An object under a name in `streamed` may be of any length: its value is `Pairs`, or an
    iterator of such pairs, to be used up before the next member is asked for.

    Raises:
        NotJSONError: when the place is reached where the text is not JSON, or a value has more than `MAX_VALUE`
            characters.
    """
    return _Walk(text, streamed).members(whole=True)


class _Walk:
    """A way through a text. at: the character that is read next. alone: up to which members are decoded alone."""

    def __init__(self, text: str, streamed: Container[str]) -> None:
        self.text = text
        self.streamed = streamed
        self.at = self.alone = 0

    def members(self, whole: bool = False) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        self.at = _skip(self.text, self.at)
        while not self.text.startswith("}", self.at):
            while self.at >= self.alone:
                yield from self._several()
            name = self._string()
            self._expect(":")
            self.at = _skip(self.text, self.at)
            if name in self.streamed and self.text.startswith("{", self.at):
                yield name, self.members()
            else:
                yield name, self._value()
            self.at = _skip(self.text, self.at)
            if not self.text.startswith("}", self.at):
                self._expect(",")
                self.at = _skip(self.text, self.at)
                if self.text.startswith("}", self.at):
                    raise NotJSONError(f"a string in double quotes expected at character {self.at}")
        self.at += 1
        if whole:
            _check_end(self.text, self.at)

    def _several(self) -> Pairs | tuple[()]:
        """Decode the members up to an object's end that is followed by a comma, if this is that of the last of them."""
        cut = self.text.find("},", self.at + STRIDE, self.at + 2 * STRIDE)
        part = f"{{{self.text[self.at : cut + 1]}}}"
        if cut >= 0 and "\\" not in part and _MINUS_ZERO.search(part) is None:
            found: Pairs
            try:
                found, end = _USUAL.raw_decode(part)
            except (ValueError, RecursionError):
                end = 0  # wherever the fault is, it is found when members are decoded alone
            if end == len(part):
                self.at = cut + 2
                return found
        self.alone = max(self.at + STRIDE, cut) + 1
        return ()

    def _expect(self, character: str) -> None:
        """Go past white space and `character`."""
        at = _skip(self.text, self.at)
        if not self.text.startswith(character, at):
            found = f"'{shown(self.text[at])}'" if at < len(self.text) else "the end"
            raise NotJSONError(f"'{character}' expected at character {at}, found {found}")
        self.at = at + 1

    def _string(self) -> str:
        """Decode a string of any length."""
        self.at = _skip(self.text, self.at)
        if not self.text.startswith('"', self.at):
            raise NotJSONError(f"a string in double quotes expected at character {self.at}")
        string: str
        string, self.at = _decode(self.text, self.at)
        return string

    def _value(self) -> Any:
        """Decode a string, or another value of at most MAX_VALUE characters."""
        if self.text.startswith('"', self.at):
            return self._string()
        length = 1 << 9
        while True:
            part = self.text[self.at : self.at + length]
            whole = self.at + length >= len(self.text)
            try:
                value, end = _decode(part, 0, self.at)
            except NotJSONError as error:
                if whole:
                    raise
                if length >= MAX_VALUE:
                    raise NotJSONError(f"{error}, or this value has more than {MAX_VALUE} characters") from None
            else:
                if whole or end < length:  # a number that ends with the part may go on behind it
                    self.at += end
                    return value
            length *= 2


def as_plain_dicts(value: Any) -> Any:
    """Replace `Pairs` by ordinary dicts; the last of equal names counts."""
    if isinstance(value, Pairs):
        return {name: as_plain_dicts(item) for name, item in value}
    return [as_plain_dicts(item) for item in value] if isinstance(value, list) else value
