"""State of this library's own optimizers as `state_dict()` gives it: `<slot>` or `<slot>.<field>`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from optstate.checkpoint.checkpoint import Checkpoint
from optstate.checkpoint.foreign.drafts import FIRST, SECOND, Draft, Meaning, Source, checkpoint_of
from optstate.checkpoint.foreign.trees import StateDict
from optstate.checkpoint.stored import Stored

__all__ = ["read"]

NOTE = "the stores are told by their tensors alone: optstate.save writes what each of them is"

FIELDS = frozenset(("codes", "absmax", "row", "col", "mean", "compensation", "correction"))
UNSIGNED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "accumulator")


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of state in fields as our stores have them; None if it has none.

    Raises:
        CheckpointError: naming the first parameter whose tensors contradict each other.
    """
    if not any(key.partition(".")[2] in FIELDS for key in found.kept):
        return None
    adam = {key.partition(".")[0] for key in found.kept} <= {"step", "exp_avg", "exp_avg_sq"} and _has_two_betas(found)
    meanings = {"exp_avg": FIRST, "exp_avg_sq": SECOND} if adam else {}

    def say(draft: Draft) -> None:
        draft.take_step()
        for slot, fields in _by_slot(draft).items():
            _say(draft, slot, fields, meanings.get(slot, Meaning(signed=slot not in UNSIGNED)))

    return checkpoint_of(found, Source("optstate", "optstate", optimizer or ""), say, [NOTE])


def _has_two_betas(found: StateDict) -> bool:
    return all(isinstance(group.get("betas"), tuple | list) and len(group["betas"]) == 2 for group in found.groups)


def _by_slot(draft: Draft) -> dict[str, dict[str, Stored]]:
    slots: dict[str, dict[str, Stored]] = {}
    for key in [key for key, value in draft.left.items() if isinstance(value, Stored)]:
        slot, _, field = key.partition(".")
        slots.setdefault(slot, {})[field] = draft.tensor(key)
    return slots


def _say(draft: Draft, slot: str, fields: Mapping[str, Stored], meaning: Meaning) -> None:
    match sorted(fields):
        case [""]:
            draft.whole(slot, fields[""], meaning)
        case ["absmax", "codes"]:
            _codes(draft, slot, dict(fields), meaning)
        case ["col", "row"] if slot != "accumulator":
            draft.factors(slot, fields["row"], fields["col"], meaning)
        case _:
            draft.put(slot, "AxisMax()" if slot == "accumulator" else "Unknown()", meaning, fields)


def _codes(draft: Draft, slot: str, fields: dict[str, Stored], meaning: Meaning) -> None:
    """Codes of 8 bits in the parameter's shape, or of 4 bits, two to a byte."""
    codes, scales = fields["codes"], fields["absmax"].elements
    shape = draft.shape
    packed = codes.dtype == "U8" and shape is not None and codes.shape != shape
    store = "Float8" if codes.dtype == "F8_E4M3" else "Block4" if packed else "Block8"
    shape = shape if packed and shape is not None else codes.shape
    draft.codes(slot, store, fields, meaning, shape, draft.block_of(slot, prod(shape), scales))
