"""The optimizer's state within a file that holds more, and what a file looks like that has none. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optstate.checkpoint.errors import CheckpointError, shown
from optstate.checkpoint.foreign.lomo_optim import are_attributes
from optstate.checkpoint.foreign.trees import is_state_dict, type_name
from optstate.checkpoint.stored import Stored

__all__ = ["chosen", "looks_like"]

DEEPEST = 4
"""Containers around an optimizer's state: {'state': {'optimizer_states': [...]}} has two."""

MOST_SHOWN = 8

WEIGHTS = "model weights"


def chosen(tree: Any, path: str, key: str | None = None) -> Any:
    """The one optimizer's state in a file, or that at `key`.

    Raises:
        CheckpointError: if there is none, naming what the file looks like; or several, listing their keys.
    """
    found = dict(_optimizers(tree))
    if key is not None:
        if key not in found:
            raise CheckpointError(path, f"no optimizer state at '{shown(key)}'{_at(tree, key)}", _keys(found))
        return found[key]
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise CheckpointError(path, f"it holds the state of {len(found)} optimizers", _keys(found))
    raise CheckpointError(path, *_without(tree))


def _optimizers(tree: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every optimizer's state, by where it is: "optimizer_states.0"; "" for the whole."""
    if is_state_dict(tree) or are_attributes(tree):
        yield key, tree
        return
    if depth < DEEPEST:
        for name, value in _children(tree):
            yield from _optimizers(value, f"{key}.{name}" if key else name, depth + 1)


def _children(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [(str(name), value) for name, value in tree.items() if isinstance(name, str | int)]
    return [(str(i), value) for i, value in enumerate(tree)] if isinstance(tree, list | tuple) else []


def _keys(found: dict[str, Any]) -> str:
    """What to do: the keys that could be given."""
    if not found:
        return ""
    if "" in found:
        return "the whole file is the optimizer's state: give no key"
    keys = [f"--key {shown(key)}" for key in list(found)[:MOST_SHOWN]]
    return "give " + " or ".join(keys) + (" ..." if len(found) > MOST_SHOWN else "")


def _at(tree: Any, key: str) -> str:
    """What is there instead."""
    for name in key.split("."):
        children = dict(_children(tree))
        if name not in children:
            return ""
        tree = children[name]
    return f": it looks like {looks_like(tree)}" if looks_like(tree) else f": there is {type_name(tree)}"


def _without(tree: Any) -> tuple[str, str]:
    """Why a file has no optimizer state, and what to do."""
    kind = looks_like(tree)
    if kind:
        return f"looks like {kind}, not optimizer state", "give the optimizer's own file" if kind != WEIGHTS else ""
    if isinstance(tree, dict):
        parts = [
            f"'{shown(name)}'" + (f" ({kind})" if (kind := looks_like(value)) else "")
            for name, value in _children(tree)
        ]
        more = " ..." if len(parts) > MOST_SHOWN else ""
        return f"no optimizer state in it: it holds {', '.join(parts[:MOST_SHOWN]) or 'nothing'}{more}", ""
    return f"no optimizer state in it: it is {type_name(tree)}", ""


def looks_like(tree: Any) -> str:
    """What a value without optimizer state probably is: "model weights"; "" if nothing tells."""
    if not isinstance(tree, dict) or not tree:
        return ""
    keys = {key for key in tree if isinstance(key, str)}
    if len(keys) == len(tree) and all(isinstance(value, Stored) for value in tree.values()):
        return WEIGHTS
    if "last_epoch" in keys and keys & {"_step_count", "base_lrs"}:
        return "a learning rate scheduler's state"
    if keys & {"torch_manual_seed", "random_state"} or ({"python", "cpu"} <= keys and "numpy" in keys):
        return "states of random number generators"
    if {"scale", "growth_factor", "backoff_factor"} <= keys:
        return "a gradient scaler's state"
    return ""
