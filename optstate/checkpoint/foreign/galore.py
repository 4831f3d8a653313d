"""Files of galore-torch's AdamW, whose moments are those of projected gradients. Imports no torch."""

from __future__ import annotations

from typing import Any

from optstate.checkpoint.checkpoint import Checkpoint
from optstate.checkpoint.foreign.drafts import FIRST, SECOND, Draft, Source, checkpoint_of
from optstate.checkpoint.foreign.trees import NotPlainError, StateDict, plain
from optstate.checkpoint.pickled import Object
from optstate.checkpoint.stored import Stored

__all__ = ["read"]

MOMENTS = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
NOTE = (
    "moments of projected parameters are those of the projected gradient: they have no values for the parameter itself"
)


def _is_projector(value: Any) -> bool:
    return isinstance(value, Object) and value.name.rpartition(".")[2] == "GaLoreProjector"


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of GaLoreAdamW; None if no parameter has a projector, or its state is that of another rule."""
    projected = any(_is_projector(state.get("projector")) for state in found.state.values())
    if not projected or not found.kept <= {"step", "projector", *MOMENTS}:
        return None
    return checkpoint_of(found, Source("galore", "galore-torch", "GaLoreAdamW"), _say, [NOTE])


def _say(draft: Draft) -> None:
    draft.take_step()
    projector = draft.left.pop("projector", None)
    if projector is None:
        for slot, meaning in MOMENTS.items():
            if slot in draft.left:
                draft.whole(slot, draft.tensor(slot), meaning)
        return
    if not _is_projector(projector) or not isinstance(projector.state, dict):
        raise draft.error("its projector is not one of GaLore's")
    moments = {slot: draft.tensor(slot) for slot in MOMENTS}
    first, second = (moments[slot].shape for slot in MOMENTS)
    if first != second or len(first) != 2:
        raise draft.error(f"exp_avg has shape {list(first)}, exp_avg_sq {list(second)}: they must be of one matrix")
    _project(draft, moments, projector.state)


def _project(draft: Draft, moments: dict[str, Stored], projector: dict[str, Any]) -> None:
    basis, rank = projector.get("ortho_matrix"), projector.get("rank")
    words = f"Projected(rank={rank})" if type(rank) is int else "Projected()"
    shape = moments["exp_avg"].shape
    bases = {"basis": basis} if isinstance(basis, Stored) else {}
    if isinstance(basis, list | tuple) and len(basis) == 2 and all(isinstance(part, Stored) for part in basis):
        bases = {"basis": basis[0], "basis_right": basis[1]}
    draft.has_shape(_full_shape(draft, shape, list(bases.values())), "exp_avg")
    # The second moment is never projected back, so the basis is that of the first.
    draft.put("exp_avg", words, FIRST, {"": moments["exp_avg"], **bases})
    draft.put("exp_avg_sq", words, SECOND, {"": moments["exp_avg_sq"]})
    try:
        draft.extra["projector"] = plain({key: value for key, value in projector.items() if key != "ortho_matrix"})
    except NotPlainError as error:
        raise draft.error(f"its projector cannot be read: {error}") from None


def _full_shape(draft: Draft, moment: tuple[int, ...], bases: list[Stored]) -> tuple[int, ...]:
    """The parameter's shape. A moment is `gradient @ right.T` with a basis `[rank, m]`, or `left.T @ gradient`."""
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
