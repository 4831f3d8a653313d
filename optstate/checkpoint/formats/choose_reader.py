"""Whose state_dict it is: the readers of all libraries, asked in turn. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import torch_archive_reader
from optstate.checkpoint.files.pickle_objects import PickleError, check_tree
from optstate.checkpoint.formats import (
    adam_mini,
    bitsandbytes,
    came_pytorch,
    galore,
    lion_pytorch,
    lomo_optim,
    own_state_dict,
    pytorch_optimizer,
    schedulefree,
    sm3,
    torch_optim,
    torchao,
    transformers,
    unknown,
)
from optstate.checkpoint.formats.embedded_state import chosen, siblings
from optstate.checkpoint.formats.master_weights import masters_note
from optstate.checkpoint.formats.state_dict import StateDict, state_dict_of
from optstate.text import shown

__all__ = ["read", "read_file"]

MOST_NAMES = 6
"""Names listed before a count."""

READERS: tuple[Callable[[StateDict, str | None], Checkpoint | None], ...] = (
    own_state_dict.read,
    bitsandbytes.read,
    torchao.read,
    galore.read,
    adam_mini.read,
    schedulefree.read,
    pytorch_optimizer.read,
    came_pytorch.read,
    transformers.read,
    lomo_optim.read,
    sm3.read,
    torch_optim.read,
    lion_pytorch.read,
    unknown.read,
)


def read_file(path: str | os.PathLike[str], key: str | None = None, optimizer: str | None = None) -> Checkpoint:
    """A checkpoint of what torch.save wrote.

    key: where in the file the optimizer's state is, as "optimizer" or "optimizer_states.0"; found if there is one only.
    optimizer: its name, where the file does not tell it.

    Raises:
        CheckpointError: if the file cannot be read, or holds no optimizer state or several.
    """
    text = os.fspath(path)
    strangers: dict[str, None] = {}
    notes: list[str] = []
    tree = torch_archive_reader.read(path, strangers)
    state = chosen(tree, text, key, notes)
    if strangers:  # it may have been in one of them, into which nobody has looked
        try:
            check_tree(state)
        except PickleError as error:
            raise CheckpointError(text, str(error)) from None
        notes.append(f"of Python objects in the file only the names are read: {_listed(strangers)}")
    if note := masters_note(siblings(tree, state)):
        notes.append(note)
    checkpoint = read(state, text, optimizer)
    return replace(checkpoint, notes=(*checkpoint.notes, *notes))


def _listed(names: Iterable[str]) -> str:
    first, *others = (shown(name) for name in names)
    listed = ", ".join([first, *others[: MOST_NAMES - 1]])
    return f"{listed} and {len(others) - MOST_NAMES + 1} more" if len(others) >= MOST_NAMES else listed


def read(tree: Any, path: str, optimizer: str | None = None) -> Checkpoint:
    """A checkpoint of one optimizer's state, as plain data with `Stored` tensors.

    Raises:
        CheckpointError: naming the first parameter whose state is not what its library writes.
    """
    found = state_dict_of(tree, path)
    checkpoint = lomo_optim.read_attributes(tree, path) if found is None else _first(found, optimizer)
    if checkpoint is None:
        raise CheckpointError(path, "not optimizer state: it lacks 'state' and 'param_groups'")
    return checkpoint


def _first(found: StateDict, optimizer: str | None) -> Checkpoint | None:
    checkpoints = (reader(found, optimizer) for reader in READERS)
    return next((checkpoint for checkpoint in checkpoints if checkpoint is not None), None)
