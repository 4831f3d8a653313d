"""Files of lomo-optim, and AdaLomo's statistics beside `state`, by parameter name. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.files.torch_types import type_name
from optstate.checkpoint.formats import tables
from optstate.checkpoint.formats.parameter_reader import Meaning
from optstate.checkpoint.formats.state_dict import Id, StateDict
from optstate.checkpoint.formats.tables import Kept, Layout
from optstate.other_libraries import libraries
from optstate.text import shown

__all__ = ["are_attributes", "read", "read_attributes", "read_by_name"]

STATISTICS = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
FACTORED = Kept(Meaning("square", signed=False), *STATISTICS)

ADALOMO = Layout("AdaLomo", libraries.ADALOMO, {"exp_avg_sq": FACTORED})
LOMO = Layout("Lomo", libraries.LOMO, {})

LOST = (
    "AdaLomo's second moments and its step count are not in the file: lomo-optim keeps them in attributes of the "
    "optimizer (exp_avg_sq, exp_avg_sq_row, exp_avg_sq_col, step_num), which state_dict() leaves out"
)
UNORDERED = "parameters are in no order: the file gives their names, and not which of the optimizer's they are"
NO_GROUPS = "hyper-parameters are not in the file"


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of lomo-optim's LOMO, which has no state, or of what is left of its AdaLomo; None for others."""
    if found.state:
        return None
    if ADALOMO.fits(found):
        return tables.read(found, ADALOMO, "lomo-optim", "lomo-optim", [LOST])
    if LOMO.fits(found):
        return tables.read(found, LOMO, "lomo-optim", "lomo-optim")
    return None


def are_attributes(tree: Any) -> bool:
    """Whether a value holds AdaLomo's attributes: dicts of tensors by name."""
    if not isinstance(tree, dict) or not set(STATISTICS) <= tree.keys() or "param_groups" in tree:
        return False
    return all(isinstance(tree[key], dict) for key in STATISTICS)


def read_attributes(tree: Any, path: str) -> Checkpoint | None:
    """A checkpoint of `{'exp_avg_sq': {...}, 'exp_avg_sq_row': {...}, 'exp_avg_sq_col': {...}, 'step_num': n}`."""
    if not are_attributes(tree):
        return None
    rest = {key: value for key, value in tree.items() if key not in STATISTICS}
    names = _by_name(tree, path)
    found = StateDict(
        path, ({"params": list(names)},), (tuple(names),), {}, {}, rest | {k: tree[k] for k in STATISTICS}
    )
    return read_by_name(found, found.rest, "step_num", "lomo-optim", "AdaLomo", [NO_GROUPS])


def read_by_name(
    found: StateDict, tree: Mapping[str, Any], step: str, tool: str, optimizer: str, notes: list[str] | None = None
) -> Checkpoint:
    """A checkpoint of statistics that lie beside `state` by name. step: the key of the count of updates.

    Raises:
        CheckpointError: if there are several groups, or as many names as parameters are not there.
    """
    state = _by_name(tree, found.path)
    count = sum(map(len, found.ids))
    if len(found.groups) != 1 or len(state) != count:
        reason = (
            f"statistics are kept for {len(state)} names, and {len(found.groups)} param groups have {count} parameters"
        )
        raise CheckpointError(found.path, f"{reason}: one group with as many as names is needed to bring them together")
    if step in tree:
        state = {name: {"step": tree[step], **kept} for name, kept in state.items()}
    rest = {key: value for key, value in found.rest.items() if key not in (*STATISTICS, step)}
    by_id: dict[Id, dict[str, Any]] = dict(state.items())
    named = replace(found, ids=(tuple(state),), names={name: name for name in state}, state=by_id, rest=rest)
    about = {"keys": "attributes", "ordered": False}
    return tables.read(named, ADALOMO, tool, tool, [*(notes or []), UNORDERED], optimizer=optimizer, more=about)


def _by_name(tree: Mapping[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """What is kept for every name."""
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
