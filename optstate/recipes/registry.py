"""Recipes by name, from every installed package that offers some by entry points of the group `optstate.recipes`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from optstate.optimizer.optimizer import Optimizer
from optstate.plugins import PluginError, Plugins, package_of

__all__ = ["UnknownRecipeError", "describe", "get", "names"]

RecipeFactory = Callable[..., Optimizer]


class UnknownRecipeError(LookupError):
    """Raised where no installed package offers a recipe, that can be used, of the name that was asked for."""


def _problem(name: str, recipe: Any) -> str:
    """Return in words why an object cannot be a recipe; "" if it can."""
    if isinstance(recipe, type) and not issubclass(recipe, Optimizer):
        return "it is a class, but none of optstate.Optimizer's"
    return "" if callable(recipe) else f"it is a {type(recipe).__name__}, which makes no optimizer of parameters"


PLUGINS: Plugins[RecipeFactory] = Plugins("recipe", "optstate.recipes", _problem)


def names() -> list[str]:
    """Return the names of all installed recipes that can be used, sorted: class names in lower case."""
    return PLUGINS.names()


def get(name: str) -> RecipeFactory:
    """Return the installed recipe of a name, which makes an optimizer from parameters and hyper-parameters.

    Raises:
        UnknownRecipeError: if there is no recipe of this name, where the message names the nearest, or if its package
            cannot be used, where the message says why.
    """
    installed = PLUGINS.offered()
    if name not in installed:
        near = difflib.get_close_matches(name.lower(), installed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"installed: {', '.join(sorted(installed))}"
        raise UnknownRecipeError(f"no recipe named {name!r}; {hint}")
    try:
        return PLUGINS.get(name)
    except PluginError as error:
        raise UnknownRecipeError(str(error)) from None


def describe(name: str) -> dict[str, Any]:
    """Return name, class, package and summary (first line of the docstring) of an installed recipe."""
    recipe, entry = get(name), PLUGINS.offered()[name]
    summary = (recipe.__doc__ or "").strip().partition("\n")[0]
    return {"name": name, "class": entry.value, "package": package_of(entry), "summary": summary}
