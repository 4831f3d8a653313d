"""Weights in fp32 that mixed precision keeps beside an optimizer's state: said, as they are not read. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from optstate.checkpoint.files.pickle_objects import PickleError, check_tree
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.shared.list_statistics import has_tensors
from optstate.text import shown

__all__ = ["describe_masters", "notes_of_masters"]

NAMES = re.compile(r"fp32|float32|master", re.IGNORECASE)
"""As in `fp32_from_fp16_params` (Megatron), `fp32_groups_flat` (apex, DeepSpeed), `master_params`."""

NOTE = "weights in fp32 beside the optimizer's state are not read"


def describe_masters(siblings: Iterable[tuple[str, Any]]) -> str:
    """Return a note about those of some values that are copies of weights; "" if none is.

    siblings: what is beside the optimizer's state, or in it beside its two parts, by name.
    """
    found = [name for name, value in siblings if NAMES.search(name) and _are_weights(value)]
    if not found:
        return ""
    names = ", ".join(f"'{shown(name)}'" for name in found)
    return f"{NOTE} ({names}): a run goes on with the weights of its model, which may be rounded copies of them"


def notes_of_masters(notes: Iterable[str]) -> list[str]:
    """Those of a checkpoint's notes that are about such weights: a run that loads it must know."""
    return [note for note in notes if note.startswith(NOTE)]


def _are_weights(value: Any) -> bool:
    if not isinstance(value, Stored | list | tuple | dict):
        return False
    try:
        check_tree(value)  # what comes from a stranger was not gone through yet
    except PickleError:
        return False
    return has_tensors([list(value.values()) if isinstance(value, dict) else value])
