"""State of an optimizer that nobody here knows: every tensor under the name it has. Imports no torch."""

from __future__ import annotations

from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Parameter
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.shared.list_statistics import has_tensors, take_apart
from optstate.checkpoint.formats.shared.parameter_reader import Draft, Source, build_checkpoint
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.statistics import UNKNOWN
from optstate.checkpoint.formats.shared.tree_writer import Tree, TreeWriter
from optstate.text import shown

__all__ = ["read_any", "write_any"]

NOTE = "an optimizer that is not known here: its statistics are kept as they are, and what they mean is not said"


def read_any(found: StateDict, optimizer: str | None = None) -> Checkpoint:
    """Return a checkpoint with a slot for every tensor and list of tensors, whose meanings are not known.

    Lists themselves are among the plain values, with None in the place of each tensor.

    Raises:
        CheckpointError: naming the parameter and the value, if any is neither a tensor nor plain.
    """
    numbers = _numbers(found)

    def say(draft: Draft) -> None:
        if draft.left and "step" not in draft.left and "step" in draft.hyper:
            draft.take_group_step("step")
        draft.take_step()
        keys = [key for key, value in draft.left.items() if isinstance(value, Stored) and key not in numbers]
        tensors: dict[str, Stored] = {}
        for key in keys:
            slot = _identifier(key)
            if slot in tensors or (slot != key and slot in draft.left):
                raise draft.error(f"two of its values would both be called '{slot}', one of them '{shown(key)}'")
            tensors[slot] = draft.tensor(key)
        lists = {key: value for key, value in draft.left.items() if has_tensors(value)}
        for key, value in lists.items():
            slot = _identifier(key)
            if slot in tensors or slot in draft.slots or (slot != key and slot in draft.left):
                raise draft.error(f"two of its values would both be called '{slot}', one of them '{shown(key)}'")
            fields, draft.left[key] = take_apart(value)
            draft.put(slot, "Unknown()", UNKNOWN, fields)
        shapes = {stored.shape for stored in tensors.values()}
        for slot, stored in tensors.items():
            if len(shapes) == 1:
                draft.whole(slot, stored, UNKNOWN)
            else:
                draft.unknown(slot, stored)

    more = {"spelling": spelling} if (spelling := _spelling(found)) else None
    return build_checkpoint(found, Source("torch", "unknown", optimizer or "unknown", more=more), say, [NOTE])


def _numbers(found: StateDict) -> set[str]:
    """Keys that are one number each where others are not: no statistics, but counts and products."""
    dims: dict[str, int] = {}
    for state in found.state.values():
        for key, value in state.items():
            if isinstance(value, Stored):
                dims[key] = max(dims.get(key, 0), len(value.shape))
    return {key for key, most in dims.items() if most == 0} if any(dims.values()) else set()


def _spelling(found: StateDict) -> dict[str, str]:
    """Slot -> key, where a key cannot be the name of a slot."""
    return {_identifier(key): key for key in sorted(found.kept) if not key.isidentifier()}


def _identifier(key: str) -> str:
    """Return the key, with "_" for what cannot be in the name of a slot."""
    name = "".join(c if c.isidentifier() or (c.isdigit() and c.isascii()) else "_" for c in key)
    return name if name.isidentifier() else f"slot_{name}"


# --- writing ------------------------------------------------------------------------------------------------------


def write_any(writer: TreeWriter, param: Parameter, slot: str, extra: Tree) -> Tree:
    """One statistic under the key that it had in the file. extra: the parameter's plain values, which take lists."""
    record, key = param.slots[slot], _spelled(writer, slot)
    if not writer.same or key not in extra or "" in record.fields:
        return {key: writer.full(param, slot, record)}
    extra[key] = _filled(writer, param, slot, extra[key])
    return {}


def _spelled(writer: TreeWriter, slot: str) -> str:
    """Return the key of a statistic: as it was in the file, if that names no slot."""
    spelling = writer.document.source.get("spelling") if writer.same else None
    key = spelling.get(slot, slot) if isinstance(spelling, dict) else slot
    return key if isinstance(key, str) else slot


def _filled(writer: TreeWriter, param: Parameter, slot: str, lists: Any) -> Any:
    """Return lists that a file had, with the tensors in their places again."""
    record, left = param.slots[slot], dict(param.slots[slot].fields)

    def fill(value: Any, place: str) -> Any:
        if value is None and place in left:
            return writer.tensor(left.pop(place))
        if isinstance(value, list | tuple):
            return type(value)(fill(part, f"{place}_{i}" if place else str(i)) for i, part in enumerate(value))
        return value

    filled = fill(lists, "")
    if left:
        raise writer.misfit(param, slot, record, "tensors, and lists of tensors as they were", "fp32")
    return filled
