"""A checkpoint with the names and groups that an optimizer knows: without wrappers' words, and empty groups alike.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Group, Parameter, tensor_key
from optstate.naming import canonical_names

__all__ = ["rename_parameter", "with_canonical_names", "with_groups_of"]


def with_canonical_names(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the names that optimizers know parameters by, if these differ from each other."""
    before = [param.name for param in checkpoint.document.parameters]
    names = canonical_names(before)
    if names == before or len(set(names)) < len(names):
        return checkpoint
    parameters = tuple(map(rename_parameter, checkpoint.document.parameters, names))
    tensors = {
        new: checkpoint.tensors[old]
        for param, other in zip(checkpoint.document.parameters, parameters, strict=True)
        for old, new in zip(param.keys, other.keys, strict=True)
    }
    return checkpoint.with_parameters(parameters, tensors)


def rename_parameter(param: Parameter, name: str) -> Parameter:
    """Return a parameter, and the tensors kept for it, under another name."""
    slots = {
        key: replace(slot, fields={field: tensor_key(name, key, field) for field in slot.fields})
        for key, slot in param.slots.items()
    }
    return replace(param, name=name, slots=slots)


def with_groups_of(checkpoint: Checkpoint, counts: Sequence[int]) -> Checkpoint:
    """Return the checkpoint with empty groups where an optimizer has them, and nowhere else.

    Trainers make an empty group or leave it out, as parameters happen to need it. Where other groups differ, too, the
    checkpoint stays as it is.

    counts: how many parameters each of the optimizer's groups has.
    """
    document = checkpoint.document
    theirs = [len(group.parameters) for group in document.groups]
    if theirs == list(counts) or [n for n in theirs if n] != [n for n in counts if n]:
        return checkpoint
    filled = iter([place for place, count in enumerate(theirs) if count])
    places = [next(filled) if count else None for count in counts]
    nothing = Group(hyper={}, parameters=())
    groups = tuple(nothing if place is None else document.groups[place] for place in places)
    new = {place: i for i, place in enumerate(places) if place is not None}
    parameters = tuple(replace(param, group=new[param.group]) for param in document.parameters)
    return replace(checkpoint, document=replace(document, groups=groups, parameters=parameters))
