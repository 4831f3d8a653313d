"""AdaLomo's statistics, which lie beside `state` by the names of parameters. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.files.torch_types import type_name
from optstate.checkpoint.formats.shared.state_dict import Id, StateDict
from optstate.checkpoint.formats.shared.statistics import SQUARE
from optstate.checkpoint.formats.shared.tables import Layout, factored, read_table
from optstate.other_libraries import libraries
from optstate.text import shown

__all__ = ["ADALOMO", "are_attributes", "find_attributes", "is_by_name", "read_by_name"]

ADALOMO = Layout("AdaLomo", libraries.ADALOMO, factored("exp_avg_sq", SQUARE))
STATISTICS = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")

UNORDERED = "parameters are in no order: the file gives their names, and not which of the optimizer's they are"


def are_attributes(tree: Any) -> bool:
    """Whether a value holds AdaLomo's attributes: dicts of tensors by name."""
    if not isinstance(tree, dict) or not set(STATISTICS) <= tree.keys() or "param_groups" in tree:
        return False
    return all(isinstance(tree[key], dict) for key in STATISTICS)


def find_attributes(tree: Any, path: str) -> StateDict | None:
    """Return AdaLomo's attributes as a state_dict of one group without hyper-parameters; None for anything else.

    tree: `{'exp_avg_sq': {...}, 'exp_avg_sq_row': {...}, 'exp_avg_sq_col': {...}, 'step_num': n}`.
    """
    if not are_attributes(tree):
        return None
    names = _by_name(tree, path)
    return StateDict(path, ({"params": list(names)},), (tuple(names),), {}, {}, dict(tree))


def is_by_name(found: StateDict, step: str) -> bool:
    """Whether the statistics lie beside `state`. step: the key of the count of updates."""
    return {step, "exp_avg_sq_row", "exp_avg_sq_col"} <= found.rest.keys()


def read_by_name(
    found: StateDict, step: str, library: str, optimizer: str, notes: list[str] | None = None
) -> Checkpoint:
    """Return a checkpoint of statistics that lie beside `state` by name. step: the key of the count of updates.

    Raises:
        CheckpointError: if there are several groups, or as many names as parameters are not there.
    """
    state = _by_name(found.rest, found.path)
    count = sum(map(len, found.ids))
    if len(found.groups) != 1 or len(state) != count:
        reason = (
            f"statistics are kept for {len(state)} names, and {len(found.groups)} param groups have {count} parameters"
        )
        raise CheckpointError(found.path, f"{reason}: one group with as many as names is needed to bring them together")
    if step in found.rest:
        state = {name: {"step": found.rest[step], **kept} for name, kept in state.items()}
    rest = {key: value for key, value in found.rest.items() if key not in (*STATISTICS, step)}
    by_id: dict[Id, dict[str, Any]] = dict(state.items())
    named = replace(found, ids=(tuple(state),), names={name: name for name in state}, state=by_id, rest=rest)
    about = {"keys": "attributes", "ordered": False}
    return read_table(named, ADALOMO, library, [*(notes or []), UNORDERED], optimizer=optimizer, more=about)


def _by_name(tree: Mapping[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """Return what is kept for every name."""
    found: dict[str, dict[str, Any]] = {}
    for statistic in ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"):
        by_name = tree.get(statistic, {})
        if not isinstance(by_name, dict):
            raise CheckpointError(path, f"'{statistic}' is {type_name(by_name)}, not a dict of tensors by name")
        for name, value in by_name.items():
            if not isinstance(name, str) or not isinstance(value, Stored):
                raise CheckpointError(path, f"'{statistic}' holds '{shown(repr(name))}', which is no tensor by name")
            found.setdefault(name, {})[statistic] = value
    return found
