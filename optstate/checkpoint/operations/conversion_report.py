"""What a conversion does, slot by slot: planned, and measured once it has been carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from optstate.checkpoint.operations.loss_figures import Figures
from optstate.checkpoint.operations.plan_conversion import Conversion
from optstate.checkpoint.operations.transfers import Transfer

__all__ = ["DROPPED", "FROM_ZERO", "Report", "Row", "report_of"]

DROPPED, FROM_ZERO = "dropped", "zeros"
DIGITS = 4
"""Significant digits of a figure in a file's history."""


@dataclass(frozen=True)
class Row:
    """One statistic of all parameters that keep it in the same store before, and the same after.

    was, now: stores in words; "zeros" for a statistic that begins at zero, "dropped" for one that ends. The errors are
    0, and the cosine 1, where nothing is lost; None where they have not been measured, or cannot be: nothing tells
    what gradients a dropped average will be missed by. inflation: the most that the update of an element grows.
    zeros: elements that become zero.
    """

    slot: str
    was: str
    now: str
    parameters: int
    bytes_before: int
    bytes_after: int
    lossless: bool
    relative_error: float | None
    update_relative_error: float | None
    update_cosine: float | None
    inflation: float | None
    zeros: int | None


@dataclass(frozen=True)
class Report:
    """A conversion in numbers. update_relative_error, update_cosine: of the update with every change at once.

    changes: what a step will do otherwise than it did, in words; () where the rule stays.
    """

    lossless: bool
    bytes_before: int
    bytes_after: int
    rows: tuple[Row, ...]
    update_relative_error: float | None
    update_cosine: float | None
    changes: tuple[str, ...] = ()

    def to_history(self) -> dict[str, Any]:
        """What the new file says of it."""
        rows = [{key: _rounded(value) for key, value in asdict(row).items()} for row in self.rows]
        total = {"update_relative_error": self.update_relative_error, "update_cosine": self.update_cosine}
        tree = {"lossless": self.lossless, "slots": rows} | {key: _rounded(value) for key, value in total.items()}
        return {**tree, "changes": list(self.changes)} if self.changes else tree


def report_of(
    conversion: Conversion, figures: Mapping[tuple[str, str, str], Figures] | None = None, total: Figures | None = None
) -> Report:
    """The report: of the plan alone, or with the figures that carrying it out has given."""
    groups: dict[tuple[str, str, str], list[Transfer]] = {}
    for transfer in conversion.all_transfers:
        was = transfer.was.store if transfer.was is not None else FROM_ZERO
        groups.setdefault((transfer.name, was, transfer.record.store), []).append(transfer)
    rows = [_row(conversion, key, made, figures) for key, made in groups.items()] + _dropped(conversion)
    if conversion.keeps_numbers or not _keeps_the_rule(conversion):
        total = Figures() if conversion.lossless else None
    elif total is not None and not total.elements:
        total = None
    return Report(
        conversion.lossless,
        conversion.bytes_before,
        conversion.bytes_after,
        tuple(rows),
        total.update_relative_error if total is not None else None,
        total.update_cosine if total is not None else None,
        conversion.changes,
    )


def _keeps_the_rule(conversion: Conversion) -> bool:
    """Whether updates are still divided by a root if they were: without it the two cannot be compared."""
    params = {param.name: param for param in conversion.checkpoint.document.parameters}
    return not any(params[name].slots[slot].of == "square" for name, slot in conversion.dropped)


def _row(
    conversion: Conversion,
    key: tuple[str, str, str],
    made: list[Transfer],
    figures: Mapping[tuple[str, str, str], Figures] | None,
) -> Row:
    lossless = all(transfer.exact for transfer in made)
    found = Figures() if lossless else (figures or {}).get(key)
    same_update = not (lossless and conversion.changes)  # else equal numbers say nothing of the steps made of them
    before = sum(
        stored.nbytes
        for transfer in made
        if transfer.was is not None
        for stored in conversion.checkpoint.fields_of(transfer.was).values()
    )
    return Row(
        *key,
        parameters=len(made),
        bytes_before=before,
        bytes_after=sum(transfer.nbytes for transfer in made),
        lossless=lossless,
        relative_error=found.relative_error if found else None,
        update_relative_error=found.update_relative_error if found and same_update else None,
        update_cosine=found.update_cosine if found and same_update else None,
        inflation=found.inflation if found and same_update else None,
        zeros=found.zeros if found else None,
    )


def _dropped(conversion: Conversion) -> list[Row]:
    sizes: dict[tuple[str, str], list[int]] = {}
    params = {param.name: param for param in conversion.checkpoint.document.parameters}
    for name, slot in conversion.dropped:
        record = params[name].slots[slot]
        nbytes = sum(stored.nbytes for stored in conversion.checkpoint.fields_of(record).values())
        sizes.setdefault((slot, record.store), []).append(nbytes)
    return [
        Row(slot, store, DROPPED, len(found), sum(found), 0, False, 1.0, None, None, None, None)
        for (slot, store), found in sizes.items()
    ]


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
