"""What a pickle becomes: plain data, and stand-ins for everything else that can do nothing. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from optstate.text import shown

__all__ = [
    "BUILDERS",
    "NAMES",
    "Global",
    "Object",
    "PickleError",
    "Stranger",
    "Unread",
    "called",
    "check_tree",
    "checked_key",
    "weight",
]

MOST_IN_KEY = 64
"""Values in a tuple that is a key: Python hashes a tuple anew each time, and twice what it refers to twice."""
MOST_VALUES = 1 << 24
"""Values of a tree that is to be gone through."""
DEEPEST = 100
"""Containers within each other in a tree that is to be gone through."""


class PickleError(ValueError):
    """A pickle that is malformed, over a limit, or asks for what is not plain data."""


@dataclass(frozen=True, slots=True)
class Global:
    """A reference to a class, function or constant of Python by its name, as "torch.float32"; nothing is imported."""

    name: str


@dataclass(eq=False, slots=True)
class Object:
    """An instance of a class that is known by name only: what the pickle gave to make it, and nothing done with it.

    Each is a dict key of its own, since how its class compares is not known.
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None


@dataclass(eq=False, slots=True)
class Stranger:
    """An instance of a class, or the result of a call, of which nobody here knows more than the name.

    What the pickle gave is kept and never looked at, so it may contain itself: `check_tree` does not go into it.
    items: what the pickle filled it with, if it is derived from a list or a dict.
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] | dict[Any, Any] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Unread:
    """A value that is sound and has no form here; `what` says it in words, as "a sparse tensor"."""

    what: str


def called(value: Any) -> str:
    """How a message calls a value of a pickle."""
    if isinstance(value, Global | Object | Stranger):
        return f"'{shown(value.name)}'"
    if isinstance(value, Unread):
        return value.what
    return "None" if value is None else f"a value of type {type(value).__name__}"


def weight(value: Any) -> int:
    """How many values a copy of `value` counts for, besides itself."""
    if isinstance(value, str | bytes):
        return len(value) // 32
    return len(value) if isinstance(value, list | tuple | dict | set | frozenset) else 0


def checked_key(key: Any) -> Any:
    """`key` itself; raises PickleError unless it has a hash, and one that is soon computed and rarely that of another.

    Python's hash of an integer is its remainder, so of very long ones there are any number that have the same.
    """
    if type(key) is str:
        return key
    todo = [key]
    seen = 0
    while todo:
        value = todo.pop()
        seen += 1
        if isinstance(value, tuple | frozenset):
            if seen + len(todo) + len(value) > MOST_IN_KEY:
                raise PickleError(f"a key of more than {MOST_IN_KEY} values")
            todo.extend(value)
        elif type(value).__hash__ is None:
            raise PickleError(f"{called(value)} in a key")
        elif isinstance(value, int) and value.bit_length() > 64:
            raise PickleError(f"an integer of {value.bit_length()} bits in a key")
    return key


# What stands for the calls by which plain containers are pickled.


def _items(items: Any) -> Iterable[Any]:
    if not isinstance(items, list | tuple | set | frozenset):
        raise PickleError(f"a malformed pickle: {called(items)} instead of items")
    return items


def _set(items: Any = ()) -> set[Any]:
    return set(map(checked_key, _items(items)))


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(map(checked_key, _items(items)))


def _dict(items: Any = ()) -> dict[Any, Any]:
    """OrderedDict(items) and Counter(dict)."""
    if isinstance(items, dict):
        return dict(items)
    result = {}
    for pair in _items(items):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise PickleError(f"a malformed pickle: {called(pair)} instead of a key and a value")
        result[checked_key(pair[0])] = pair[1]
    return result


def _default_dict(factory: Any = None) -> dict[Any, Any]:
    return {}


def _complex(real: Any, imaginary: Any) -> complex:
    if not isinstance(real, float | int) or not isinstance(imaginary, float | int):
        raise PickleError(f"a malformed pickle: a complex number of {called(real)} and {called(imaginary)}")
    return complex(real, imaginary)


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocols before 3 write bytes: as the text that has these bytes in Latin-1."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise PickleError(f"a malformed pickle: bytes of {called(text)} in {called(encoding)}")
    return text.encode("latin1")


def _bytes(data: Any = b"", encoding: Any = "latin1") -> bytes:
    return data if isinstance(data, bytes) else _encoded(data, encoding)


BUILDERS: dict[str, Callable[..., Any]] = {
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.complex": _complex,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _default_dict,
    "_codecs.encode": _encoded,
}
"""What is called in the place of Python's own functions; each copies no more than it is given."""

NAMES = frozenset(f"builtins.{name}" for name in ("object", "dict", "list", "tuple", "int", "float", "str", "bool"))
"""Names that plain data have besides: the base of an instance, the factory of a defaultdict."""


# Going through what was built.


def check_tree(tree: Any) -> None:
    """Raise PickleError if going through `tree` would not end, take long, or need deep recursion.

    A pickle may refer to a list from within it, and double a tree a hundred times with a hundred references.
    """
    done: dict[int, _Visit] = {}  # the containers that were gone through, by id
    path = [_Visit(tree)]
    within = {id(tree)}
    while path:
        visit = path[-1]
        if not visit.containers:
            path.pop()
            within.remove(id(visit.value))
            done[id(visit.value)] = visit
            if path:
                path[-1].add(visit)
            continue
        child = visit.containers.pop()
        if id(child) in within:
            raise PickleError("a value that contains itself")
        if id(child) in done:
            visit.add(done[id(child)])
            continue
        path.append(_Visit(child))
        within.add(id(child))
        if len(path) > DEEPEST:
            raise PickleError(f"values nested more than {DEEPEST} deep")


class _Visit:
    """A container on the way through a tree: the containers in it that are still to be seen, and what was seen."""

    def __init__(self, value: Any) -> None:
        items = _items_of(value)
        self.value = value
        self.containers = [item for item in items if isinstance(item, list | tuple | dict | set | frozenset | Object)]
        self.values = 1 + len(items) + sum(weight(item) for item in items if isinstance(item, str | bytes))
        self.depth = 1

    def add(self, child: _Visit) -> None:
        """Take note of a container in it that was gone through."""
        self.values += child.values
        self.depth = max(self.depth, child.depth + 1)
        if self.values > MOST_VALUES:
            raise PickleError(f"more than {MOST_VALUES} values, most of them the same ones again")
        if self.depth > DEEPEST:
            raise PickleError(f"values nested more than {DEEPEST} deep")


def _items_of(value: Any) -> list[Any]:
    """Return what is directly in a container or an object; nothing for other values."""
    if isinstance(value, Object):
        return [value.args, value.kwargs, value.state]
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple | set | frozenset) else []
