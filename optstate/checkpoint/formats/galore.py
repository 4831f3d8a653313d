"""State of galore-torch's AdamW and Adafactor, read only: statistics of projected gradients. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.files.pickle_machine import Object
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.parameter_reader import Draft, Source, build_checkpoint
from optstate.checkpoint.formats.shared.state_dict import NotPlainError, StateDict, plain
from optstate.checkpoint.formats.shared.statistics import ADAFACTOR, FIRST, SECOND
from optstate.other_libraries import libraries

__all__ = ["FORMAT"]

MOMENTS = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
UPDATES, SQUARES = ADAFACTOR["exp_avg"], ADAFACTOR["exp_avg_sq"]
ROW, COL = "exp_avg_sq_row", "exp_avg_sq_col"

NOTE = (
    "moments of projected parameters are those of the projected gradient: they have no values for the parameter itself"
)


def _is_projector(value: Any) -> bool:
    return isinstance(value, Object) and value.name.rpartition(".")[2] == "GaLoreProjector"


def read_galore(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of GaLoreAdamW or GaLoreAdafactor; None if no parameter has a projector of theirs.

    Adafactor's second moment is in means over the rows and columns of the projected gradient.
    """
    if not any(_is_projector(state.get("projector")) for state in found.state.values()):
        return None
    if found.kept <= {"step", "projector", *MOMENTS}:
        return build_checkpoint(found, Source("galore", "galore-torch", "GaLoreAdamW"), _adamw, [NOTE])
    if libraries.GALORE_ADAFACTOR.fits(found.keys) and found.kept <= {
        *("step", "projector", "RMS", "exp_avg", "exp_avg_sq"),
        *(ROW, COL),
    }:
        return build_checkpoint(found, Source("galore", "galore-torch", "GaLoreAdafactor"), _adafactor, [NOTE])
    return None


def _adamw(draft: Draft) -> None:
    _say(draft, _whole_moments, _projected_moments)


def _adafactor(draft: Draft) -> None:
    _say(draft, _whole_squares, _projected_squares)


Projection = tuple[str, dict[str, Stored]]
"""The store in words, and the basis by field."""


def _say(
    draft: Draft, whole: Callable[[Draft], None], projected: Callable[[Draft, Projection], tuple[int, ...]]
) -> None:
    """Return a parameter with or without a projector. projected: takes the statistics, and returns the shape of one."""
    draft.take_step()
    projector = draft.left.pop("projector", None)
    if projector is None:
        whole(draft)
        return
    if not _is_projector(projector) or not isinstance(projector.state, dict):
        raise draft.error("its projector is not one of GaLore's")
    basis, rank = projector.state.get("ortho_matrix"), projector.state.get("rank")
    words = f"Projected(rank={rank})" if type(rank) is int else "Projected()"
    bases = {"basis": basis} if isinstance(basis, Stored) else {}
    if isinstance(basis, list | tuple) and len(basis) == 2 and all(isinstance(part, Stored) for part in basis):
        bases = {"basis": basis[0], "basis_right": basis[1]}
    shape = projected(draft, (words, bases))
    draft.has_shape(_full_shape(draft, shape, list(bases.values())), "its projected gradient")
    try:
        draft.extra["projector"] = plain({k: value for k, value in projector.state.items() if k != "ortho_matrix"})
    except NotPlainError as error:
        raise draft.error(f"its projector cannot be read: {error}") from None


# --- AdamW --------------------------------------------------------------------------------------------------------


def _whole_moments(draft: Draft) -> None:
    for slot, meaning in MOMENTS.items():
        if slot in draft.left:
            draft.whole(slot, draft.tensor(slot), meaning)


def _projected_moments(draft: Draft, projection: Projection) -> tuple[int, ...]:
    words, bases = projection
    moments = {slot: draft.tensor(slot) for slot in MOMENTS}
    first, second = (moments[slot].shape for slot in MOMENTS)
    if first != second or len(first) != 2:
        raise draft.error(f"exp_avg has shape {list(first)}, exp_avg_sq {list(second)}: they must be of one matrix")
    # The second moment is never projected back, so the basis is that of the first.
    draft.put("exp_avg", words, FIRST, {"": moments["exp_avg"], **bases})
    draft.put("exp_avg_sq", words, SECOND, {"": moments["exp_avg_sq"]})
    return first


# --- Adafactor ----------------------------------------------------------------------------------------------------


def _whole_squares(draft: Draft) -> None:
    if "exp_avg" in draft.left:
        draft.whole("exp_avg", draft.tensor("exp_avg"), UPDATES)
    if ROW in draft.left or COL in draft.left:
        row, col = draft.tensor(ROW), draft.tensor(COL)
        draft.factors("exp_avg_sq", row, col, SQUARES)
    elif "exp_avg_sq" in draft.left:
        draft.whole("exp_avg_sq", draft.tensor("exp_avg_sq"), SQUARES)


def _projected_squares(draft: Draft, projection: Projection) -> tuple[int, ...]:
    words, bases = projection
    row, col = draft.tensor(ROW), draft.tensor(COL)
    shape = (*row.shape, *col.shape)
    if len(row.shape) != 1 or len(col.shape) != 1:
        raise draft.error(f"{ROW} has shape {list(row.shape)}, {COL} {list(col.shape)}: they must be of one matrix")
    fields = {"row": row, "col": col}
    if "exp_avg" not in draft.left:
        draft.put("exp_avg_sq", words, SQUARES, fields | bases)
        return shape
    first = draft.tensor("exp_avg")
    if first.shape != shape:
        raise draft.error(f"exp_avg has shape {list(first.shape)}, {ROW} and {COL} are of a matrix {list(shape)}")
    draft.put("exp_avg", words, UPDATES, {"": first, **bases})
    draft.put("exp_avg_sq", words, SQUARES, fields)
    return shape


# --- shapes -------------------------------------------------------------------------------------------------------


def _full_shape(draft: Draft, moment: tuple[int, ...], bases: list[Stored]) -> tuple[int, ...]:
    """Return the parameter's shape: moments are `grad @ right.T` with a basis `[rank, m]`, or `left.T @ grad`."""
    shapes = [basis.shape for basis in bases]
    rows, columns = moment
    if all(len(shape) == 2 for shape in shapes):
        if len(shapes) == 2 and (shapes[0][1], shapes[1][0]) == moment:
            return shapes[0][0], shapes[1][1]
        if len(shapes) == 1 and shapes[0][0] == columns and columns <= rows:
            return rows, shapes[0][1]
        if len(shapes) == 1 and shapes[0][1] == rows:
            return shapes[0][0], columns
    theirs = " and ".join(str(list(shape)) for shape in shapes) or "none"
    raise draft.error(f"the moments have shape {list(moment)}, which does not fit the projector's basis: {theirs}")


FORMAT = Format(
    name="galore", read=read_galore, names_itself=True, rules=(libraries.GALORE, libraries.GALORE_ADAFACTOR)
)
