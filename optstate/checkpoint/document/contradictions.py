"""Whether the tensors of a checkpoint are what its document says. Imports no torch."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import pairwise

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Document, Parameter, SlotRecord
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import TORCH_NAMES
from optstate.checkpoint.files.issues import Issue
from optstate.checkpoint.files.safetensors_check import CONTROLS
from optstate.checkpoint.files.tensor_place import Stored
from optstate.store_layouts import ACCUMULATOR, PARAMETER, Shape, layouts_of
from optstate.text import has_controls, shown

__all__ = ["contradictions", "has_axes", "inconsistencies", "is_plugged", "refuse_contradictions", "store_name"]

NO_STORES = ("Projected", "Unknown")
"""What readers of other tools' files call what is in no store."""

LARGEST_FP32 = (2 - 2**-23) * 2.0**127


def store_name(store: str) -> str:
    """Return the kind of a store given in words: "Block8" of "Block8(signed=False)"."""
    return store.partition("(")[0]


def is_plugged(words: str) -> bool:
    """Return whether words name a store that is not this library's: only its class, if installed, can judge it."""
    return store_name(words) not in NO_STORES and layouts_of(words, ()) is None


def has_axes(slot: SlotRecord) -> bool:
    """Whether codes are scaled by maxima along every dimension instead of blocks."""
    return {"codes", "row", "col"} <= slot.fields.keys()


def inconsistencies(checkpoint: Checkpoint) -> list[Issue]:
    """Every difference between the document and the tensors beside it, by names, shapes and dtypes alone."""
    claimed = {key for param in checkpoint.document.parameters for key in param.keys}
    stray = [key for key in checkpoint.tensors if key not in claimed]
    issues = [Issue("error", shown(key), "belongs to no statistic in the document") for key in stray]
    return contradictions(checkpoint) + issues + _odd_names(checkpoint.document) + _uneven_steps(checkpoint.document)


def _odd_names(document: Document) -> list[Issue]:
    """Names that a person cannot trust to be what is shown: of parameters, and of what groups hold."""
    names = [name for param in document.parameters for name in (param.name, *param.tied)]
    issues = [Issue("error", f"parameter '{shown(name)}'", CONTROLS) for name in names if has_controls(name)]
    keys = dict.fromkeys(key for group in document.groups for key in group.hyper)
    return issues + [Issue("error", f"hyper-parameter '{shown(key)}'", CONTROLS) for key in keys if has_controls(key)]


def contradictions(checkpoint: Checkpoint) -> list[Issue]:
    """Return what of the document cannot be, by the tensors that it names: their numbers would not be what it says."""
    issues = []
    for param in checkpoint.document.parameters:
        for name, slot in param.slots.items():
            where = shown(f"{param.name}/{name}")
            issues += [Issue("error", where, what) for what in _slot_problems(param, slot, checkpoint.tensors)]
    return issues + _wrong_codebooks(checkpoint.document)


def refuse_contradictions(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the tensors that a document names cannot be what it says of them."""
    for issue in contradictions(checkpoint):
        hint = "`optstate check` tells all that is wrong with it"
        raise CheckpointError(checkpoint.path, f"{issue.where}: {issue.what}", hint)


def _wrong_codebooks(document: Document) -> list[Issue]:
    """Return maps of codes that are not what their ids say, or are not there."""
    problems = {key: _codebook_problem(key, values) for key, values in document.codebooks.items()}
    used = {slot.codebook for param in document.parameters for slot in param.slots.values()} - {""}
    problems |= dict.fromkeys(sorted(used - problems.keys()), "is used, but its values are not in the file")
    return [Issue("error", f"codebook {shown(key)}", what) for key, what in problems.items() if what]


def _codebook_problem(key: str, values: tuple[float, ...]) -> str:
    """Return what is wrong with the values of codes, "" for nothing."""
    finite = sum(abs(value) <= LARGEST_FP32 for value in values)
    if len(values) not in (16, 256) or finite < len(values):
        return f"has {len(values)} values, {finite} of them fp32 numbers: codes stand for 16 or 256"
    if any(a > b for a, b in pairwise(values)):
        return "its values are not ascending"
    # 16 digits of the SHA-256 of the values as little-endian fp32 are part of the id.
    digest = sha256(struct.pack(f"<{len(values)}f", *values)).hexdigest()[:16]
    return "" if key.rpartition(":")[2] == digest else f"its values are those of another map, {digest}"


def _uneven_steps(document: Document) -> list[Issue]:
    steps = Counter(param.step for param in document.parameters if param.step is not None)
    if len(steps) < 2:
        return []
    usual, count = steps.most_common(1)[0]
    odd = next(param for param in document.parameters if param.step not in (None, usual))
    what = (
        f"{count} parameters were updated {usual} times, {sum(steps.values()) - count} another number of times, such "
        f"as '{shown(odd.name)}': {odd.step}"
    )
    return [Issue("warning", "step", what)]


def _slot_problems(param: Parameter, slot: SlotRecord, tensors: Mapping[str, Stored]) -> Iterator[str]:
    param = param.measured_by(slot)
    expected = _expected(param, slot)
    if expected == {}:
        yield f"{slot.store} cannot be kept of {_sizes(param)}"
        return
    for field, key in slot.fields.items():
        stored = tensors.get(key)
        if stored is None:
            yield f"the tensor '{shown(key)}' is missing"
        elif expected is not None and field in expected:
            shape, dtypes = expected[field]
            if stored.shape != shape:
                here = f"{slot.store} of {_sizes(param)} has {list(shape)}"
                yield f"{field or 'it'} has shape {list(stored.shape)}, {here}"
            if stored.dtype not in dtypes:
                yield f"{field or 'it'} has dtype {stored.dtype}, {slot.store} has {' or '.join(sorted(dtypes))}"
    if expected is not None:
        for field in sorted(expected.keys() - slot.fields.keys()):
            yield f"{slot.store} without {field or 'its tensor'}"
        for field in sorted(slot.fields.keys() - expected.keys()):
            yield f"{slot.store} has no field {shown(field)!r}"


def _sizes(param: Parameter) -> str:
    return "x".join(map(str, param.shape or ())) or "a scalar"


# --- what each store keeps ----------------------------------------------------------------------------------------

Expected = dict[str, tuple[Shape, set[str]]]
"""Field name -> its shape, and the dtypes that it may have."""

DTYPES = {name: {dtype} for dtype, name in TORCH_NAMES.items()}
DTYPES |= {ACCUMULATOR: {"F32", "F64"}, PARAMETER: {"F16", "BF16"}}
"""By the words of a layout. What is kept for writing a weight is kept for parameters of 16 bits."""

ALSO_IN_BF16 = "AxisMax"
"""SM3 of other libraries keeps its maxima in the parameter's dtype."""


def _expected(param: Parameter, slot: SlotRecord) -> Expected | None:
    """Return what a store of optstate's own keeps, {} for what cannot be; None for stores that this cannot judge."""
    layouts = layouts_of(slot.store, param.shape, slot.block) if param.shape is not None else None
    if layouts is None:
        return None
    if "scale" in slot.fields and "absmax" in layouts:  # torchao's 8-bit floats have the maximum / 448
        layouts = {"codes": layouts["codes"], "scale": layouts["absmax"]}
    more = {"BF16"} if store_name(slot.store) == ALSO_IN_BF16 else set()
    return {name: (layout.shape, DTYPES[layout.dtype] | more) for name, layout in layouts.items()}
