"""What a hyper-parameter of another library says of its rule: a number, a switch at rest, or another rule. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Departure", "OtherRule", "Switch", "departures", "followed", "strays", "visible"]

Hyper = Mapping[str, Any]
"""A param group's hyper-parameters; tensors of one number must have been made plain numbers."""

HOW = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Keys that choose an implementation and change no result."""

ANYWHERE = frozenset(
    {
        *("lr", "params", "param_names", "name", "role", "head_size"),
        *("initial_lr", "base_lr", "max_lr", "min_lr", "swa_lr"),
        *("base_momentum", "max_momentum", "min_momentum"),
    }
)
"""Keys that the optimizers of all libraries and their schedulers keep in a group."""


@dataclass(frozen=True)
class Switch:
    """A hyper-parameter that chooses the rule.

    rest: the values with which the rule is the one that our recipe follows. effect: what any other value does, in a
    clause. absent: the value that counts where a group does not have the key. number: the key of a number that the
    switch is about: where that is 0, it has no effect. chain: a chain of ours, in words, that does what the other
    values do; "" for none. advice: what a person can do.
    """

    rest: tuple[Any, ...]
    effect: str
    absent: Any = None
    number: str = ""
    chain: str = ""
    advice: str = ""

    def has_effect(self, key: str, group: Hyper) -> bool:
        """Whether the group's value makes it another rule."""
        value = group.get(key, self.rest[0] if self.absent is None else self.absent)
        return not _among(value, self.rest) and not self.is_idle(group)

    def is_idle(self, group: Hyper) -> bool:
        """Whether the number that it is about is 0."""
        return bool(self.number) and _among(group.get(self.number), (0,))


def _among(value: Any, values: Sequence[Any]) -> bool:
    """Whether a value is one of several; anything that cannot be compared is none of them."""
    return isinstance(value, bool | int | float | str | None) and value in values


@dataclass(frozen=True)
class OtherRule:
    """What a class of another library does, as far as its param groups tell.

    kind, optimizer: the library and the class, as `Document.source` has them, the class without its bits. recipe: ours
    that does the same while all switches are at rest, "" for none. why: where there is none, what it does otherwise.
    needs and lacks: the keys that tell its groups from those of other classes. numbers: keys that are carried, whatever
    their values. marks: keys of a parameter's own state that are only there under another rule, and what that is.
    untold: what is not in the file and says how weights decay. chain: the recipe's chain in words, where state can come
    without a file.
    """

    kind: str
    optimizer: str
    recipe: str = ""
    why: str = ""
    needs: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()
    switches: Mapping[str, Switch] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)
    untold: str = ""
    chain: str = ""

    def fits(self, keys: set[str]) -> bool:
        """Whether groups with these keys are of this class."""
        return self.needs <= keys and not self.lacks & keys

    def knows(self, key: str) -> bool:
        """Whether the meaning of a key is known."""
        return key in self.numbers or key in self.switches or key in HOW or key in ANYWHERE


@dataclass(frozen=True)
class Departure:
    """A value in a param group that makes the rule another one than our recipe's. chain: as in `Switch`."""

    group: int
    key: str
    value: Any
    effect: str
    chain: str = ""
    advice: str = ""

    def __str__(self) -> str:
        """One clause for a message."""
        return f"param group {self.group} has {visible(self.key)}={_short(self.value)}: {self.effect}"


def followed(rule: OtherRule | None, group: Hyper) -> tuple[bool, set[str]]:
    """Return whether a group follows its rule's recipe, and which chains of ours besides, in words."""
    found = list(_of_group(rule, 0, group))
    if any(not departure.chain for departure in found):
        return False, set()
    if found:
        return False, set.intersection(*({departure.chain} for departure in found))
    idle = rule.switches.values() if rule is not None else ()
    return True, {switch.chain for switch in idle if switch.chain and switch.is_idle(group)}


UNKNOWN = "this flag is not known here, and may change the rule"


def departures(rule: OtherRule | None, groups: Sequence[Hyper]) -> list[Departure]:
    """Everything in the groups that makes the rule another one. A flag that nobody knows counts if it is true."""
    return [departure for place, group in enumerate(groups) for departure in _of_group(rule, place, group)]


def _of_group(rule: OtherRule | None, place: int, group: Hyper) -> Iterator[Departure]:
    for key, switch in rule.switches.items() if rule is not None else ():
        if switch.has_effect(key, group):
            value = group.get(key, switch.absent)
            yield Departure(place, key, value, switch.effect, switch.chain, switch.advice)
    for key, value in group.items():
        if value is True and not (rule.knows(key) if rule is not None else key in HOW | ANYWHERE):
            yield Departure(place, key, value, UNKNOWN)


def strays(rule: OtherRule | None, groups: Sequence[Hyper]) -> list[str]:
    """Return the keys that nobody knows and whose values are no flags that are on, in the order of the groups."""
    known = rule.knows if rule is not None else (HOW | ANYWHERE).__contains__
    return list(dict.fromkeys(key for g in groups for key, value in g.items() if value is not True and not known(key)))


def visible(key: str) -> str:
    """Return a key for a message: control characters as escapes, and not too long."""
    return _short(key)[1:-1] if len(key) > 40 or not key.isprintable() else key


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
