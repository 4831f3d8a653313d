"""A checkpoint with what its folder says besides the optimizer's own state: of weights, and in which files.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Parameter, SlotRecord, tensor_key
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import TORCH_NAMES
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.shared.parameter_reader import FULL
from optstate.text import shown

__all__ = ["MASTER", "Weight", "complete_checkpoint"]

MASTER = "master"
"""The slot of an fp32 copy of the weight itself, which is no statistic."""


@dataclass(frozen=True)
class Weight:
    """What is known of a parameter's weight. dtype: the safetensors format's word, "" if unknown. master: its copy."""

    shape: tuple[int, ...]
    dtype: str = ""
    master: Stored | None = None
    tied: tuple[str, ...] = ()


def complete_checkpoint(
    checkpoint: Checkpoint,
    weights: Mapping[str, Weight],
    source: Mapping[str, Any],
    files: Iterable[str | os.PathLike[str]],
    notes: Iterable[str],
) -> Checkpoint:
    """Return the checkpoint of a folder, of one that was made of its optimizer's state.

    weights: by the parameters' names, as far as they are known. source: as in `Document.source`, with the kind.

    Raises:
        CheckpointError: if a weight's shape is not that of its statistics or of its copy.
    """
    tensors, parameters = dict(checkpoint.tensors), []
    for param in checkpoint.document.parameters:
        weight = weights.get(param.name)
        if weight is not None:
            param = _with_weight(checkpoint.path, param, weight)
            if weight.master is not None:
                tensors[param.slots[MASTER].fields[""]] = weight.master
        parameters.append(param)
    own = checkpoint.document.source
    about = {**own, "layout": own["kind"], "named": True, **source}
    document = replace(checkpoint.document, parameters=tuple(parameters), source=about)
    said = (*checkpoint.notes, *notes, *_about_masters(weights))
    paths = tuple(os.fspath(path) for path in files)
    return replace(checkpoint, kind=str(source["kind"]), document=document, tensors=tensors, files=paths, notes=said)


def _with_weight(path: str, param: Parameter, weight: Weight) -> Parameter:
    copy = weight.master.shape if weight.master is not None else None
    for whose, shape in (("its statistics have", param.shape), (f"its copy '{MASTER}' has", copy)):
        if shape is not None and shape != weight.shape:
            what = f"{whose} shape {list(shape)}, its weight {list(weight.shape)}"
            raise CheckpointError(path, f"parameter '{shown(param.name)}': {what}")
    slots = dict(param.slots)
    if weight.master is not None:
        store = FULL.get(weight.master.dtype, "Unknown()")
        slots[MASTER] = SlotRecord(store=store, signed=True, fields={"": tensor_key(param.name, MASTER)})
    return replace(
        param, shape=weight.shape, dtype=TORCH_NAMES.get(weight.dtype, weight.dtype), slots=slots, tied=weight.tied
    )


def _about_masters(weights: Mapping[str, Weight]) -> tuple[str, ...]:
    kept = any(weight.master is not None for weight in weights.values())
    return (f"the slot '{MASTER}' is the fp32 copy of the weight, no statistic",) if kept else ()
