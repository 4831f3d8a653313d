"""SM3's accumulators: the maxima along every dimension, in shapes that broadcast. Imports no torch."""

from __future__ import annotations

import re

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Parameter, SlotRecord
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.shared.parameter_reader import Draft, Source, build_checkpoint, without
from optstate.checkpoint.formats.shared.state_dict import StateDict, number_of
from optstate.checkpoint.formats.shared.statistics import SM3, UNKNOWN, Meaning
from optstate.checkpoint.formats.shared.tree_writer import Tree, TreeWriter

__all__ = ["is_sm3", "read_sm3", "write_accumulators"]

ACCUMULATOR = re.compile(r"accumulator_(\d{1,2})")
MAXIMA = Meaning(signed=False)


def is_sm3(found: StateDict) -> bool:
    """Whether the groups have SM3's hyper-parameters and nothing else than its statistics is kept."""
    known = {key for key in found.kept if ACCUMULATOR.fullmatch(key)} | {"step", "momentum_buffer"}
    return {"momentum", "beta", "eps"} <= found.keys and found.kept <= known


def read_sm3(found: StateDict, library: str) -> Checkpoint:
    """Return a checkpoint of SM3 as a library has it."""
    return build_checkpoint(found, Source(library, library, "SM3", "sm3"), _say)


def _say(draft: Draft) -> None:
    if draft.left and "step" not in draft.left:
        draft.take_group_step("step")
    draft.take_step()
    parts = [draft.tensor(f"accumulator_{i}") for i in range(_count(draft))]
    meaning = SM3["accumulator"] if number_of(draft.hyper["beta"]) == 0 else MAXIMA
    if len(parts) == 1:
        draft.whole("accumulator", parts[0], meaning, "accumulator_0")
    elif parts:
        _axes(draft, parts, meaning)
    if isinstance(draft.left.get("momentum_buffer"), Stored):  # torch-SM3 has a number there without momentum
        draft.whole("momentum_buffer", draft.tensor("momentum_buffer"), _momentum(draft))


def _momentum(draft: Draft) -> Meaning:
    """Without momentum pytorch_optimizer keeps zeros."""
    return SM3["exp_avg"] if number_of(draft.hyper["momentum"]) else UNKNOWN


def _count(draft: Draft) -> int:
    return sum(1 for key in draft.left if ACCUMULATOR.fullmatch(key))


def _axes(draft: Draft, parts: list[Stored], meaning: Meaning) -> None:
    """Accumulator i has shape `[1, ..., n, ..., 1]` with n in the place i."""
    ndim = len(parts)
    names = [*(f"axis{i}" for i in range(ndim - 2)), "row", "col"]
    fields = {}
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        if len(part.shape) != ndim or any(size != 1 for d, size in enumerate(part.shape) if d != i):
            shape = f"accumulator_{i} has shape {list(part.shape)}"
            raise draft.error(f"{shape}: of {ndim} dimensions all but the one in place {i} must be 1")
        for dim in reversed([d for d in range(ndim) if d != i]):
            part = without(part, dim)
        fields[name] = part
    draft.has_shape(tuple(part.shape[0] for part in fields.values()), "accumulator")
    draft.put("accumulator", "AxisMax()", meaning, fields)


# --- writing ------------------------------------------------------------------------------------------------------

AXIS_MAX = "AxisMax()"


def write_accumulators(writer: TreeWriter, param: Parameter, record: SlotRecord) -> Tree:
    """Return the maxima along every dimension, each in a shape that broadcasts against the parameter."""
    if record.store != AXIS_MAX:
        whole = writer.full(param, "accumulator", record)
        if len(whole.shape) > 1:
            raise writer.misfit(param, "accumulator", record, "the maxima of rows and columns", "axismax")
        return {"accumulator_0": whole}
    leading = sorted(name for name in record.fields if name.startswith("axis"))
    names, state = [*leading, "row", "col"], {}
    for i, name in enumerate(names):
        size = writer.entries[record.fields[name]].shape[0]
        shape = tuple(size if d == i else 1 for d in range(len(names)))
        state[f"accumulator_{i}"] = writer.tensor(record.fields[name], shape)
    return state
