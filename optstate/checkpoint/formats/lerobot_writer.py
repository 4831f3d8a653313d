"""LeRobot's two files: tensors as `state/<id>/<slot>` in safetensors, the groups as JSON. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from optstate.checkpoint.document.document import Document
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.files.torch_pickle_writer import Constant, NewTensor
from optstate.checkpoint.formats import hyper_tables
from optstate.checkpoint.formats.full_writers import as_lion_pytorch, as_torch, as_transformers
from optstate.checkpoint.formats.pytorch_optimizer_writer import as_pytorch_optimizer
from optstate.checkpoint.formats.tree_writer import Given, LayoutError, Tree, numbers

__all__ = ["LEROBOT", "LeRobot", "lerobot_of"]

LEROBOT = "lerobot"


@dataclass(frozen=True)
class LeRobot:
    """What the two files hold.

    tensors: by key of the document, name, dtype and shape in `optimizer_state.safetensors`. constants: tensors whose
    bytes are known, by name there. groups: the text of `optimizer_param_groups.json`. notes: as `notes_of`.
    """

    tensors: dict[str, NewEntry]
    constants: dict[str, Constant]
    groups: str
    notes: tuple[str, ...]


def lerobot_of(document: Document, entries: Mapping[str, NewEntry]) -> LeRobot:
    """The state that torch's class would have, as LeRobot keeps it: every value a tensor, steps too.

    Raises:
        LayoutError: for what torch's classes do not keep.
    """
    groups = tuple(replace(g, hyper={key: numbers(value) for key, value in g.hyper.items()}) for g in document.groups)
    document = replace(document, groups=groups)
    if document.source.get("kind") != LEROBOT:  # it compares the groups with those of an optimizer without names
        document = replace(document, source={**document.source, "named": False})
    given = Given(LEROBOT, document, entries)
    if not given.same:
        hyper_tables.check(given)
    tree = _tree(given)
    given.warn_of_rest(tree)
    tensors: dict[str, NewEntry] = {}
    constants: dict[str, Constant] = {}
    for place, state in tree["state"].items():
        for key, value in state.items():
            name = f"state/{place}/{key}"
            if isinstance(value, Constant):
                constants[name] = value
            elif isinstance(value, NewTensor):
                tensors[value.key] = NewEntry(name, value.dtype, value.shape)
            else:
                raise LayoutError(f"{key}={value!r} is no tensor, and LeRobot keeps nothing else per parameter")
    text = json.dumps(tree["param_groups"], indent=4, ensure_ascii=False)
    return LeRobot(tensors, constants, text, tuple(given.notes))


def _tree(given: Given) -> Tree:
    """The `state_dict` of the library whose optimizer it is; of torch's, if it was not LeRobot's file."""
    makers = {
        "lion-pytorch": as_lion_pytorch,
        "transformers": as_transformers,
        "pytorch_optimizer": as_pytorch_optimizer,
    }
    return makers.get(given.tool if given.same else "", as_torch)(given)
