"""Recipes by name, from every installed package that offers some."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from optstate.optimizer.optimizer import Optimizer

__all__ = ["UnknownRecipeError", "describe", "get", "names"]

GROUP = "optstate.recipes"


class UnknownRecipeError(LookupError):
    """Raised where no installed package offers a recipe of the name that was asked for."""


def names() -> list[str]:
    """Return the names of all installed recipes, sorted: class names in lower case."""
    return sorted(_installed())


def get(name: str) -> Callable[..., Optimizer]:
    """Return the installed recipe of a name, which makes an optimizer from parameters and hyper-parameters.

    A package adds recipes by entry points of the group `optstate.recipes`.

    Raises:
        UnknownRecipeError: if there is no recipe of this name; the message names the nearest.
    """
    installed = _installed()
    if name not in installed:
        near = difflib.get_close_matches(name.lower(), installed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"installed: {', '.join(sorted(installed))}"
        raise UnknownRecipeError(f"no recipe named {name!r}; {hint}")
    return cast("Callable[..., Optimizer]", installed[name].load())


def _installed() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise RuntimeError(f"two packages offer the recipe {entry.name!r}: {other.value} and {entry.value}")
    return found


def describe(name: str) -> dict[str, Any]:
    """Return name, class, package and summary (first line of the docstring) of an installed recipe."""
    entry = _installed()[name]
    recipe = get(name)
    summary = (recipe.__doc__ or "").strip().partition("\n")[0]
    return {"name": name, "class": entry.value, "package": entry.dist.name if entry.dist else "", "summary": summary}
