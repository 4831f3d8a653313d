"""Files of SM3, as torch-SM3 and as pytorch_optimizer have it: one accumulator per dimension. Imports no torch."""

from __future__ import annotations

import re

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.parameter_reader import Draft, Meaning, Source, checkpoint_of, hyper, without
from optstate.checkpoint.formats.state_dict import StateDict, number_of

__all__ = ["read"]

ACCUMULATOR = re.compile(r"accumulator_(\d{1,2})")
SUMS = Meaning("square_sum", signed=False)
MAXIMA = Meaning(signed=False)


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of SM3; None if it is not its layout."""
    known = {key for key in found.kept if ACCUMULATOR.fullmatch(key)} | {"step", "momentum_buffer"}
    if not {"momentum", "beta", "eps"} <= found.keys or not found.kept <= known:
        return None
    tool = "pytorch_optimizer" if "foreach" in found.keys else "torch-SM3"
    return checkpoint_of(found, Source(tool, tool, "SM3", "sm3"), _say)


def _say(draft: Draft) -> None:
    if draft.left and "step" not in draft.left:
        draft.take_group_step("step")
    draft.take_step()
    parts = [draft.tensor(f"accumulator_{i}") for i in range(_count(draft))]
    meaning = SUMS if number_of(draft.hyper["beta"]) == 0 else MAXIMA
    if len(parts) == 1:
        draft.whole("accumulator", parts[0], meaning, "accumulator_0")
    elif parts:
        _axes(draft, parts, meaning)
    if isinstance(draft.left.get("momentum_buffer"), Stored):  # torch-SM3 has a number there without momentum
        draft.whole("momentum_buffer", draft.tensor("momentum_buffer"), _momentum(draft))


def _momentum(draft: Draft) -> Meaning:
    """Without momentum pytorch_optimizer keeps zeros."""
    return Meaning("update", beta=hyper("momentum")) if number_of(draft.hyper["momentum"]) else Meaning()


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
