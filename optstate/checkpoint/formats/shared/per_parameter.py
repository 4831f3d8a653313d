"""Optimizers of one parameter each, saved by its name, as torchtune keeps them to update within backward. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optstate.checkpoint.formats.shared.state_dict import NotPlainError, is_state_dict, plain

__all__ = ["NOTE", "is_one_each", "merge_states"]

NOTE = "the file has an optimizer for every parameter: they are read as one, with groups of equal hyper-parameters"


def is_one_each(tree: Any) -> bool:
    """Whether a value is `{name: {'state': {...}, 'param_groups': [{..., 'params': [id]}]}}` for several parameters.

    The optimizers of a GAN, as {"generator": ..., "discriminator": ...}, are no such thing: parameters have a dot in
    their names, all of them but for those of a single layer.
    """
    if not isinstance(tree, dict) or len(tree) < 2 or not all(isinstance(name, str) for name in tree):
        return False
    return any("." in name for name in tree) and all(map(_of_one, tree.values()))


def _of_one(value: Any) -> bool:
    """Whether a value is the state of an optimizer of one parameter."""
    if not is_state_dict(value) or value.keys() != {"state", "param_groups"} or len(value["param_groups"]) != 1:
        return False
    group = value["param_groups"][0]
    ids = group.get("params") if isinstance(group, dict) else None
    return isinstance(ids, list) and len(ids) == 1 and list(value["state"]) in ([], ids)


def merge_states(states: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of one optimizer of all parameters, in the order of the file and, within it, of groups."""
    groups: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for name, found in states.items():
        group = {key: value for key, value in found["param_groups"][0].items() if key not in ("params", "param_names")}
        comparable = _comparable(group)
        if not groups or groups[-1][0] != comparable:
            same = next((members for known, members in groups if known == comparable), None)
            if same is None:
                same = {**group, "params": [], "param_names": []}
                groups.append((comparable, same))
        else:
            same = groups[-1][1]
        same["param_names"].append(name)
    state: dict[int, Any] = {}
    count = 0
    for _, members in groups:
        for name in members["param_names"]:
            state.update((count, kept) for kept in states[name]["state"].values())
            members["params"].append(count)
            count += 1
    return {"state": state, "param_groups": [members for _, members in groups]}


def _comparable(group: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that are equal if their numbers are, not where they lie."""
    found = {}
    for key, value in group.items():
        try:
            found[key] = plain(value)
        except NotPlainError:
            found[key] = value
    return found
