"""Parts that installed packages add by entry points: recipes, stores, formats. Imports no torch.

A part that cannot be used never stops what works without it: one line says which and why, and it is left out.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from optstate.text import shown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["PluginError", "PluginWarning", "Plugins", "warn_in_a_line"]

T = TypeVar("T")

OURS = "optstate"

_HELD: ContextVar[Mapping[tuple[str, str], Any]] = ContextVar("_HELD", default={})  # noqa: B039 - never written to


class PluginWarning(UserWarning):
    """A part of an installed package is left out, or hidden by another of the same name."""


class PluginError(LookupError):
    """A part that is installed and cannot be used; the message is one line that names it and says why."""


@dataclass(frozen=True)
class Plugins(Generic[T]):
    """The parts of one kind that installed packages offer by entry points.

    kind: what a part is called in messages, "recipe". group: of the entry points, "optstate.recipes".
    taken: names in use that no package can offer. problem: says why a loaded object, by its name, is no such part; ""
    if it is one.
    """

    kind: str
    group: str
    problem: Callable[[str, Any], str]
    taken: frozenset[str] = frozenset()

    def offered(self) -> dict[str, EntryPoint]:
        """Return the entry points by name, nothing imported; one package for each name, this one before others."""
        return _offered(self, tuple(sys.path))

    def __contains__(self, name: str) -> bool:
        """Whether a package offers a part of this name, which may be broken."""
        return (self.group, name) in _HELD.get() or name in self.offered()

    @contextmanager
    def holding(self, name: str, part: T) -> Iterator[None]:
        """Take a part for installed inside the block, for tests of one that is not.

        Raises:
            ValueError: if the object is no such part.
        """
        if problem := self.problem(name, part):
            raise ValueError(f"{part!r}: {problem}")
        token = _HELD.set({**_HELD.get(), (self.group, name): part})
        try:
            yield
        finally:
            _HELD.reset(token)

    def names(self) -> list[str]:
        """Return the names of all parts that can be used, sorted. Imports their packages; warns of the others."""
        held = {name for group, name in _HELD.get() if group == self.group}
        return sorted(held | {name for name in self.offered() if self._usable(name)})

    def get(self, name: str) -> T:
        """Return the part of this name.

        Raises:
            KeyError: if no package offers one.
            PluginError: if it cannot be imported, or is not such a part.
        """
        if (self.group, name) in _HELD.get():
            return _HELD.get()[self.group, name]  # type: ignore[no-any-return]
        loaded = _loaded(self, self.offered()[name])
        if isinstance(loaded, PluginError):
            raise loaded
        return loaded  # type: ignore[no-any-return]

    def _usable(self, name: str) -> bool:
        return not isinstance(_loaded(self, self.offered()[name]), PluginError)

    def named(self, entry: EntryPoint) -> str:
        """Return an entry point in words: "recipe 'mine' (theirs:Mine of the package theirs)"."""
        package = f" of the package {shown(package_of(entry))}" if package_of(entry) else ""
        return f"{self.kind} {shown(entry.name)!r} ({shown(entry.value)}{package})"


def package_of(entry: EntryPoint) -> str:
    """Return the name of the package that an entry point is of, "" if that is unknown."""
    return entry.dist.name if entry.dist else ""


@lru_cache(maxsize=64)
def _offered(plugins: Plugins[Any], path: tuple[str, ...]) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # 30 ms that a look into a file of optstate's own does not need

    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=plugins.group), key=_ours_first):
        if entry.name in plugins.taken:
            warn_in_a_line(f"the {plugins.named(entry)} is hidden by optstate's own of that name")
        elif found.setdefault(entry.name, entry).value != entry.value:
            warn_in_a_line(f"the {plugins.named(entry)} is hidden by the {plugins.named(found[entry.name])}")
    return found


def _ours_first(entry: EntryPoint) -> tuple[bool, str, str]:
    return package_of(entry) != OURS, package_of(entry), entry.value


@lru_cache(maxsize=1024)
def _loaded(plugins: Plugins[Any], entry: EntryPoint) -> Any:
    """Load the object of an entry point, or warn and return the error that says why it cannot be used."""
    try:
        part = entry.load()
        problem = plugins.problem(entry.name, part)
    except (Exception, SystemExit) as error:  # a package may do anything when it is imported
        problem = f"its import fails: {type(error).__name__}: {' '.join(str(error).split())}"
    if not problem:
        return part
    failure = PluginError(f"the {plugins.named(entry)} is left out: {shown(problem)}")
    warn_in_a_line(str(failure))
    return failure


def warn_in_a_line(message: str) -> None:
    """Warn of a part of another package; where in this library the warning arose helps nobody.

    The name in brackets is that of no file, of which `warnings` would show a second line: a script may be `optstate`.
    """
    warnings.warn_explicit(message, PluginWarning, f"<{OURS}>", 1)
