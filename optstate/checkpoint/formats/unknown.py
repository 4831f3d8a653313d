"""Files of optimizers that nobody here knows: every tensor under the name it has. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.list_statistics import has_tensors, taken_apart
from optstate.checkpoint.formats.parameter_reader import Draft, Meaning, Source, checkpoint_of
from optstate.checkpoint.formats.state_dict import StateDict
from optstate.text import shown

__all__ = ["read"]

NOTE = "an optimizer that is not known here: its statistics are kept as they are, and what they mean is not said"


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint:
    """A checkpoint with a slot for every tensor and list of tensors; none of them is taken for a statistic of a known
    meaning. Lists themselves are among the plain values, with None in the place of each tensor.

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
            fields, draft.left[key] = taken_apart(value)
            draft.put(slot, "Unknown()", Meaning(), fields)
        shapes = {stored.shape for stored in tensors.values()}
        for slot, stored in tensors.items():
            if len(shapes) == 1:
                draft.whole(slot, stored, Meaning())
            else:
                draft.unknown(slot, stored)

    more = {"spelling": spelling} if (spelling := _spelling(found)) else None
    return checkpoint_of(found, Source("torch", "unknown", optimizer or "unknown", more=more), say, [NOTE])


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
    """The key, with "_" for what cannot be in the name of a slot."""
    name = "".join(c if c.isidentifier() or (c.isdigit() and c.isascii()) else "_" for c in key)
    return name if name.isidentifier() else f"slot_{name}"
