"""Hyper-parameters: numbers of a transform that live in the param groups, where schedulers and users change them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

__all__ = ["Hyper", "Rule", "hyper"]

RESERVED = {"lr", "params", "param_names", "role", "head_size"}
"""Keys of param groups that the optimizer itself uses."""


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter: its key in the param groups, its default and its valid range.

    Attributes:
        name: the key.
        value: the default.
        index: place of the number where the group's entry is a tuple, as in `betas`; None where it is a number.
        low, high: closed range of valid values.
        below: open upper end of the range.
        optional: whether None is valid, too, and switches the transform off.

    Raises:
        ValueError: if the optimizer itself uses the key.
    """

    name: str
    value: float | None
    index: int | None = None
    low: float = -math.inf
    high: float = math.inf
    below: float = math.inf
    optional: bool = False

    def __post_init__(self) -> None:
        if self.name in RESERVED:
            raise ValueError(f"hyper({self.name!r}, ...) takes a key the optimizer itself uses: choose another name")

    def get(self, group: Mapping[str, Any]) -> Any:
        """Return the value in `group`, or the default if the group has no such key."""
        return self.read(group) if self.name in group else self.value

    def read(self, group: Mapping[str, Any]) -> Any:
        """Return the value in `group`, which must have the key."""
        entry = group[self.name]
        return entry if self.index is None else entry[self.index]

    def check(self, group: Mapping[str, Any]) -> None:
        """Check the value in `group`.

        Raises:
            TypeError: if the value is no number, or the entry no tuple with this place.
            ValueError: if the value is missing or out of range.
        """
        label = self.name if self.index is None else f"{self.name}[{self.index}]"
        try:
            value = self.read(group)
        except (IndexError, TypeError, KeyError):
            if self.name not in group:
                raise ValueError(f"{self.name} is missing in the param group: give it a value") from None
            raise TypeError(
                f"{self.name}={group[self.name]!r} has no entry {self.index}: give a tuple of numbers"
            ) from None
        if value is None and self.optional:
            return
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{label}={value!r} is a {type(value).__name__}: it must be a number")
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{label} is too large for a number: it must be {self._bounds()}") from None
        if not (self.low <= number <= self.high and number < self.below and math.isfinite(number)):
            raise ValueError(f"{label}={value!r} is out of range: it must be {self._bounds()}")

    def _bounds(self) -> str:
        if self.below < math.inf:
            return f"at least {self.low:g} and below {self.below:g}"
        if self.high < math.inf:
            return f"from {self.low:g} to {self.high:g}"
        return f"at least {self.low:g} and finite"


@dataclass(frozen=True)
class Rule:
    """The rule by which a transform's field becomes a hyper-parameter: its default key and its valid range.

    Attributes:
        name, index, low, high, below, optional: as in `Hyper`.
        omittable: whether None leaves the number out of the param groups altogether.
    """

    name: str
    index: int | None = None
    low: float = 0.0
    high: float = math.inf
    below: float = math.inf
    optional: bool = False
    omittable: bool = False

    def bind(self, value: float | Hyper | None) -> Hyper | None:
        """Return a field's value as a checked hyper-parameter, under the key chosen with `hyper`, else this rule's.

        Raises:
            TypeError, ValueError: if the value is not valid; see `Hyper.check`.
        """
        if value is None and self.omittable:
            return None
        chosen = value if isinstance(value, Hyper) else Hyper(self.name, value, self.index)
        bound = replace(chosen, low=self.low, high=self.high, below=self.below, optional=self.optional)
        entry = (None,) * (bound.index or 0) + (bound.value,)
        bound.check({bound.name: bound.value if bound.index is None else entry})
        return bound


def hyper(name: str, value: float | None, index: int | None = None) -> Hyper:
    """Give a transform's number a key of its own in the param groups, or one place in a tuple there.

    Two transforms of a chain that use the same key must agree on its default; another key tells them apart::

        updates.clip_by_rms(updates.hyper("first_clip", 1.0))

    Args:
        name: the key.
        value: the default.
        index: place in the tuple under this key; None if the key holds the number itself.

    Raises:
        ValueError: if the optimizer itself uses the key.
    """
    return Hyper(name, value, index)
