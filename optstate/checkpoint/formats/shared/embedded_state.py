"""The optimizer's state within a file that holds more, and what a file looks like that has none. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.pickle_objects import Stranger
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.files.torch_types import type_name
from optstate.checkpoint.formats.shared import per_parameter
from optstate.checkpoint.formats.shared.state_by_name import are_attributes
from optstate.checkpoint.formats.shared.state_dict import is_state_dict
from optstate.text import shown

__all__ = ["choose_state", "find_siblings", "looks_like"]

DEEPEST = 4
"""Containers around an optimizer's state: {'state': {'optimizer_states': [...]}} has two."""

MOST_SHOWN = 8

WEIGHTS = "model weights"


def choose_state(tree: Any, path: str, key: str | None = None, notes: list[str] | None = None) -> Any:
    """Return the one optimizer's state in a file, or that at `key`; many of one parameter each are one together.

    notes: takes what a person should know of how it was found.

    Raises:
        CheckpointError: if there is none, naming what the file looks like; or several, listing their keys.
    """
    places = list(_places(tree))
    found = {place: value for place, value in places if _is_state(value)}
    together = {place: value for place, value in places if per_parameter.is_one_each(value)}
    whole = {**_without_parts(found, together), **together} or dict(_objects(places))
    if key is not None:
        if key not in found and key not in whole:
            raise CheckpointError(path, f"no optimizer state at '{shown(key)}'{_at(tree, key)}", _keys(whole))
    elif len(whole) == 1:
        key = next(iter(whole))
    elif whole:
        raise CheckpointError(path, f"it holds the state of {len(whole)} optimizers", _keys(whole))
    else:
        raise CheckpointError(path, *_without(tree))
    state = whole[key] if key in whole else found[key]
    if key not in together:
        return state
    if notes is not None:
        notes.append(per_parameter.NOTE)
    return per_parameter.merge_states(state)


def find_siblings(tree: Any, state: Any) -> list[tuple[str, Any]]:
    """Return by name what is beside an optimizer's state in its container, and beside the two parts within."""
    within = [(key, value) for key, value in _children(state) if key not in ("state", "param_groups")]
    for _, container in _places(tree):
        children = [] if _is_state(container) else _children(container)
        if any(child is state for _, child in children):
            return within + [(key, child) for key, child in children if child is not state]
    return within


def _objects(places: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Return the state in every optimizer that was saved itself, by where it is."""
    for key, value in places:
        if isinstance(value, Stranger) and is_state_dict(value.state):
            yield key, {part: value.state[part] for part in ("state", "param_groups")}


def _is_state(tree: Any) -> bool:
    return is_state_dict(tree) or are_attributes(tree)


def _without_parts(found: dict[str, Any], together: dict[str, Any]) -> dict[str, Any]:
    """Those that are no parts of a dict of states."""
    parts = {f"{key}.{name}" if key else str(name) for key, states in together.items() for name in states}
    return {key: state for key, state in found.items() if key not in parts}


def _places(tree: Any) -> Iterator[tuple[str, Any]]:
    """Return the containers in up to `DEEPEST` others, by where they are: "optimizer_states.0"; "" for the whole.

    Nothing within an optimizer's state. A container that is there several times is gone into once: what is in a
    stranger may be there any number of times, and contain itself.
    """
    todo, gone = [("", tree, 0)], set[int]()
    while todo:
        key, value, depth = todo.pop()
        value = value.items if isinstance(value, Stranger) and value.items is not None else value
        yield key, value
        if depth < DEEPEST and not _is_state(value) and id(value) not in gone:
            gone.add(id(value))
            todo += [
                (f"{key}.{name}" if key else name, child, depth + 1)
                for name, child in reversed(_children(value))
                if isinstance(child, dict | list | tuple | Stranger)
            ]


def _children(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, Stranger):
        tree = tree.items
    if isinstance(tree, dict):
        return [(str(name), value) for name, value in tree.items() if isinstance(name, str | int)]
    return [(str(i), value) for i, value in enumerate(tree)] if isinstance(tree, list | tuple) else []


def _keys(found: dict[str, Any]) -> str:
    """Return what to do: the keys that could be given."""
    if not found:
        return ""
    if "" in found:
        return "the whole file is the optimizer's state: give no key"
    keys = [f"--key {shown(key)}" for key in list(found)[:MOST_SHOWN]]
    return "give " + " or ".join(keys) + (" ..." if len(found) > MOST_SHOWN else "")


def _at(tree: Any, key: str) -> str:
    """Return what is there instead."""
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
    """Return what a value without optimizer state probably is: "model weights"; "" if nothing tells."""
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
