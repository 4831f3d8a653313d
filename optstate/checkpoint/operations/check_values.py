"""Whether the numbers in a file can be optimizer state: finite, second moments not negative, means that agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import has_axes, is_plugged, store_name
from optstate.checkpoint.document.document import Document, Parameter, SlotRecord
from optstate.checkpoint.files.issues import Issue
from optstate.checkpoint.files.tensor_bytes import Statistics, all_sound, load_tensor, measure_tensor
from optstate.checkpoint.files.tensor_place import Stored
from optstate.text import shown

__all__ = ["find_plugged_store_issues", "find_uneven_means", "find_value_issues"]

MAGNITUDES, BASIS = {"absmax", "scale"}, "basis"
NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "row_var", "col_var", "variance", "step")
"""Statistics of other formats that are sums or means of squares, or counts, by the names torch's optimizers use."""

SMALL, MOST_TOGETHER = 1 << 12, 1 << 18
"""Elements of a tensor that is looked at together with others, and of all that are."""

MEANS_DIFFER = 1e-4
"""Row and column means are means of the same squares. Measured: equal to 2e-7 in files of six libraries, however many
steps; rounding in long averages of large matrices adds to that."""


def find_value_issues(tensors: Iterable[tuple[str, Stored]], document: Document | None = None) -> Iterator[Issue]:
    """Find what is wrong with the numbers of these tensors, by name. Reads all of them, a few MiB at a time.

    Only fields whose meaning is known are judged: by the document, else by names that end in a slot's.
    """
    unsigned = _never_negative(document) if document is not None else None
    for together in _small_ones_together(tensors):
        if len(together) > 1 and all_sound([stored for _, stored in together]):
            continue
        for name, stored in together:
            found = measure_tensor(stored)
            judged = name in unsigned if unsigned is not None else _counts_or_squares(name)
            for what in _number_problems(stored, found, judged):
                yield Issue("error", shown(name), what)


def _small_ones_together(tensors: Iterable[tuple[str, Stored]]) -> Iterator[list[tuple[str, Stored]]]:
    """Yield the tensors of floating-point numbers in order: small ones several at once, as there may be millions."""
    held: list[tuple[str, Stored]] = []
    count = 0
    for name, stored in tensors:
        if not stored.dtype.startswith(("F", "BF")):
            continue
        small = stored.elements <= SMALL
        if held and (not small or count + stored.elements > MOST_TOGETHER or stored.dtype != held[0][1].dtype):
            yield held
            held, count = [], 0
        held.append((name, stored))
        count += stored.elements
        if not small:
            yield held
            held, count = [], 0
    if held:
        yield held


def find_uneven_means(checkpoint: Checkpoint) -> Iterator[Issue]:
    """Find statistics kept as row and column means that are not means of the same numbers; read those."""
    for param in checkpoint.document.parameters:
        for name, slot in param.slots.items():
            if store_name(slot.store) == "Factored":
                what = _different_means(param, slot, checkpoint.tensors)
                if what:
                    yield Issue("error", shown(f"{param.name}/{name}"), what)


def find_plugged_store_issues(checkpoint: Checkpoint) -> Iterator[Issue]:
    """Find what is wrong with the tensors of stores that other packages offer, which only their classes can judge."""
    plugged = {slot.store for param in checkpoint.document.parameters for slot in param.slots.values()}
    if not any(map(is_plugged, plugged)):
        return
    from optstate.checkpoint.operations.read_values import UnreadableStatisticError, Values, store_of_words

    values = Values(checkpoint)
    for param in checkpoint.document.parameters:
        for name, slot in param.slots.items():
            if param.shape is None or not is_plugged(slot.store):
                continue
            where = shown(f"{param.name}/{name}")
            try:
                store_of_words(slot.store)
            except ValueError as error:
                yield Issue("warning", where, shown(f"{slot.store} cannot be judged here: {error}"))
                continue
            try:
                values.check(param, name)
            except UnreadableStatisticError as error:
                yield Issue("error", where, shown(str(error)))


def _counts_or_squares(name: str) -> bool:
    return name.replace("/", ".").rpartition(".")[2].startswith(NEVER_NEGATIVE)


def _never_negative(document: Document) -> set[str]:
    """Return the tensors that hold magnitudes."""
    return {
        key
        for param in document.parameters
        for name, slot in param.slots.items()
        for field, key in slot.fields.items()
        if field in MAGNITUDES or (field != BASIS and _of_magnitudes(name, slot))
    }


def _of_magnitudes(name: str, slot: SlotRecord) -> bool:
    by_name = not slot.of and name.startswith(NEVER_NEGATIVE)
    return not slot.signed or has_axes(slot) or by_name


def _number_problems(stored: Stored, found: Statistics, unsigned: bool) -> Iterator[str]:
    if found.nan:
        yield f"{found.nan} of {stored.elements} numbers are NaN"
    if found.infinite:
        yield f"{found.infinite} of {stored.elements} numbers are infinite"
    if unsigned and found.negative:
        least = f", the least is {found.minimum:.3g}" if found.minimum is not None else ""
        yield f"{found.negative} of {stored.elements} numbers are negative{least}: here are only magnitudes or counts"


def _different_means(param: Parameter, slot: SlotRecord, tensors: Mapping[str, Stored]) -> str:
    """Where the mean over rows and the mean over columns of one matrix differ, in words; "" if they agree."""
    row, col = (tensors.get(slot.fields.get(field, "")) for field in ("row", "col"))
    batch = math.prod((param.measured_by(slot).shape or ())[:-2])
    if row is None or col is None or not batch or row.elements % batch or col.elements % batch:
        return ""
    if not row.elements or not col.elements:
        return ""
    of_rows, of_cols = (load_tensor(stored).double().view(batch, -1).mean(-1) for stored in (row, col))
    distance = (of_rows - of_cols).abs() / torch.maximum(of_rows.abs(), of_cols.abs()).clamp(min=1e-300)
    worst = int(distance.nan_to_num(0.0).argmax())
    if distance[worst] <= MEANS_DIFFER or not distance[worst].isfinite():
        return ""
    place = f" of matrix {worst}" if batch > 1 else ""
    return f"the means{place} differ: {of_rows[worst]:.6g} over rows, {of_cols[worst]:.6g} over columns"
