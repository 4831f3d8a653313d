"""Whether the numbers in a file can be optimizer state: finite, second moments not negative, means that agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from optstate.checkpoint.consistency import store_name
from optstate.checkpoint.container import Entry, Header, Issue
from optstate.checkpoint.document import Document, Parameter, SlotRecord
from optstate.checkpoint.errors import shown
from optstate.checkpoint.tensors import Statistics, pieces, statistics

__all__ = ["value_issues"]

FIELDS_OF_MAGNITUDES = {"absmax"}
NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "row_var", "col_var", "variance", "step")
"""Statistics of other formats that are sums or means of squares, or counts, by the names torch's optimizers use."""

MEANS_DIFFER = 1e-4
"""Row and column means are means of the same squares. Measured: equal to 2e-7 in files of six libraries, however many
steps; rounding in long averages of large matrices adds to that."""


def value_issues(header: Header, document: Document | None = None) -> list[Issue]:
    """What is wrong with the numbers themselves. Reads the whole file, a few MiB at a time.

    Only fields whose meaning is known are judged: by the document, else by names that end in a slot's.
    """
    entries = {entry.name: entry for entry in header.tensors}
    unsigned = _never_negative(header, document)
    issues: list[Issue] = []
    with open(header.path, "rb", buffering=0) as file:
        for entry in header.tensors:
            if entry.dtype.startswith(("F", "BF")):
                found = statistics(file, entry)
                problems = _number_problems(entry, found, entry.name in unsigned)
                issues += [Issue("error", shown(entry.name), what) for what in problems]
        for param in document.parameters if document is not None else ():
            for name, slot in param.slots.items():
                if store_name(slot.store) == "Factored":
                    what = _different_means(file, param, slot, entries)
                    issues += [Issue("error", shown(f"{param.name}/{name}"), what)] if what else []
    return issues


def _never_negative(header: Header, document: Document | None) -> set[str]:
    if document is None:
        last = {entry.name: entry.name.replace("/", ".").rpartition(".")[2] for entry in header.tensors}
        return {name for name, slot in last.items() if slot.startswith(NEVER_NEGATIVE)}
    found = set()
    for param in document.parameters:
        for slot in param.slots.values():
            for field, key in slot.fields.items():
                if field in FIELDS_OF_MAGNITUDES or not slot.signed or store_name(slot.store) == "RankOne4":
                    found.add(key)
    return found


def _number_problems(entry: Entry, found: Statistics, unsigned: bool) -> Iterator[str]:
    if found.nan:
        yield f"{found.nan} of {entry.elements} numbers are NaN"
    if found.infinite:
        yield f"{found.infinite} of {entry.elements} numbers are infinite"
    if unsigned and found.negative:
        least = f", the least is {found.minimum:.3g}" if found.minimum is not None else ""
        yield f"{found.negative} of {entry.elements} numbers are negative{least}: here are only magnitudes or counts"


def _different_means(file: Any, param: Parameter, slot: SlotRecord, entries: Mapping[str, Entry]) -> str:
    """Where the mean over rows and the mean over columns of one matrix differ, in words; "" if they agree."""
    row, col = (entries.get(slot.fields.get(field, "")) for field in ("row", "col"))
    batch = math.prod((param.shape or ())[:-2])
    if row is None or col is None or not batch or row.elements % batch or col.elements % batch:
        return ""
    if not row.elements or not col.elements:
        return ""
    of_rows, of_cols = (_whole(file, entry).view(batch, -1).mean(-1) for entry in (row, col))
    distance = (of_rows - of_cols).abs() / torch.maximum(of_rows.abs(), of_cols.abs()).clamp(min=1e-300)
    worst = int(distance.nan_to_num(0.0).argmax())
    if distance[worst] <= MEANS_DIFFER or not distance[worst].isfinite():
        return ""
    place = f" of matrix {worst}" if batch > 1 else ""
    return f"the means{place} differ: {of_rows[worst]:.6g} over rows, {of_cols[worst]:.6g} over columns"


def _whole(file: Any, entry: Entry) -> Tensor:
    return torch.cat(list(pieces(file, entry)))
