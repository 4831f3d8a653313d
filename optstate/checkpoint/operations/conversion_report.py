"""What a conversion does and loses: errors of statistics and of updates, added up slot by slot into a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from optstate.checkpoint.operations.plan_conversion import Conversion, Transfer

__all__ = [
    "DROPPED",
    "FROM_ZERO",
    "ConversionReport",
    "ConversionRow",
    "Figures",
    "find_divisor",
    "make_report",
    "make_update",
    "measure_change",
]

DROPPED, FROM_ZERO = "dropped", "zeros"
DIGITS = 4
"""Significant digits of a figure in a file's history."""


# --- figures --------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """Sums over the elements of statistics, from which the errors follow; figures of parts add up.

    `value`, `error`: sums of squares of the statistic and of its error. `update`, `update_error`, `new_update`: of the
    update that it gives, of that update's error, and of the new update. `zeros`: elements that became zero.
    `inflation`: the most that an element's update grew, as a factor.
    """

    elements: int = 0
    value: float = 0.0
    error: float = 0.0
    update: float = 0.0
    update_error: float = 0.0
    new_update: float = 0.0
    zeros: int = 0
    inflation: float = 1.0

    @staticmethod
    def of(elements: int, numbers: Sequence[float]) -> Figures:
        """Make the figures of what `kernels.measure_adam` found of a number of elements."""
        value, error, update, update_error, new_update, zeros, growth = numbers
        inflation = max(1.0, math.sqrt(growth))
        return Figures(elements, value, error, update, update_error, new_update, max(0, int(zeros)), inflation)

    def add(self, other: Figures) -> None:
        """Take in the figures of another part."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, max(mine, theirs) if f.name == "inflation" else mine + theirs)

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error over that of the statistic; 0 for nothing lost, also of zeros."""
        return _ratio(self.error, self.value)

    @property
    def update_relative_error(self) -> float:
        """The same of the update."""
        return _ratio(self.update_error, self.update)

    @property
    def update_cosine(self) -> float:
        """Cosine between the two updates; 1 if both are zero."""
        if self.update == self.new_update == 0.0:
            return 1.0
        if not self.update or not self.new_update:
            return 0.0
        product = (self.update + self.new_update - self.update_error) / 2
        return max(-1.0, min(1.0, product / math.sqrt(self.update * self.new_update)))  # sums round, too


def _ratio(error: float, whole: float) -> float:
    return 0.0 if error == 0.0 else math.sqrt(error / whole) if whole else math.inf


def find_divisor(second: Tensor | None, eps: float) -> Tensor | None:
    """Return what a second moment without bias divides a step by, `sqrt(second) + eps`; None without one."""
    return None if second is None else second.sqrt().add_(eps)


def make_update(first: Tensor, divided_by: Tensor | None) -> Tensor:
    """Return the step that a first moment without bias gives."""
    return first if divided_by is None else first / divided_by


def measure_change(old: Tensor, new: Tensor, old_update: Tensor, new_update: Tensor, squares: bool) -> Figures:
    """Measure one statistic, or a piece of it, flat, and the update that follows from it.

    squares: whether it is a mean of squares that updates are divided by the root of.
    """
    if not old.numel():
        return Figures()
    error = new - old
    figures = Figures(elements=old.numel(), value=_square(old), error=_square(error), zeros=_zeros(old, new))
    figures.update, figures.new_update = _square(old_update), _square(new_update)
    figures.update_error = figures.error if old_update is old else _square(new_update - old_update)
    if squares:
        growth = torch.div(old, new.clamp(min=torch.finfo(new.dtype).tiny), out=error).max()
        figures.inflation = max(1.0, math.sqrt(float(growth)))
    return figures


def _square(flat: Tensor) -> float:
    """Sum up squares; pieces are short enough for fp32 to sum them to a few units in the last place."""
    total = float(torch.dot(flat, flat))
    if math.isfinite(total):
        return total
    flat = flat.double()  # squares of numbers above 1e19
    return float(torch.dot(flat, flat))


def _zeros(old: Tensor, new: Tensor) -> int:
    """Count the elements that became zero; no store makes something of a zero and nothing of another number."""
    kept = int(torch.count_nonzero(new))
    return 0 if kept == new.numel() else max(int(torch.count_nonzero(old)) - kept, 0)


# --- reports --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConversionRow:
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
class ConversionReport:
    """A conversion in numbers. update_relative_error, update_cosine: of the update with every change at once.

    changes: what a step will do otherwise than it did, in words; () where the rule stays.
    """

    lossless: bool
    bytes_before: int
    bytes_after: int
    rows: tuple[ConversionRow, ...]
    update_relative_error: float | None
    update_cosine: float | None
    changes: tuple[str, ...] = ()

    def to_history(self) -> dict[str, Any]:
        """Return what the new file says of its conversion."""
        rows = [{key: _rounded(value) for key, value in asdict(row).items()} for row in self.rows]
        total = {"update_relative_error": self.update_relative_error, "update_cosine": self.update_cosine}
        tree = {"lossless": self.lossless, "slots": rows} | {key: _rounded(value) for key, value in total.items()}
        return {**tree, "changes": list(self.changes)} if self.changes else tree


def make_report(
    conversion: Conversion, figures: Mapping[tuple[str, str, str], Figures] | None = None, total: Figures | None = None
) -> ConversionReport:
    """Make the report: of the plan alone, or with the figures that carrying it out has given."""
    groups: dict[tuple[str, str, str], list[Transfer]] = {}
    for transfer in conversion.all_transfers:
        was = transfer.was.store if transfer.was is not None else FROM_ZERO
        groups.setdefault((transfer.name, was, transfer.record.store), []).append(transfer)
    rows = [_row(conversion, key, made, figures) for key, made in groups.items()] + _dropped(conversion)
    if conversion.keeps_numbers or not _keeps_the_rule(conversion):
        total = Figures() if conversion.lossless else None
    elif total is not None and not total.elements:
        total = None
    return ConversionReport(
        conversion.lossless,
        conversion.bytes_before,
        conversion.bytes_after,
        tuple(rows),
        total.update_relative_error if total is not None else None,
        total.update_cosine if total is not None else None,
        conversion.changes,
    )


def _keeps_the_rule(conversion: Conversion) -> bool:
    """Tell whether updates are still divided by a root if they were: without it the two cannot be compared."""
    params = {param.name: param for param in conversion.checkpoint.document.parameters}
    return not any(params[name].slots[slot].of == "square" for name, slot in conversion.dropped)


def _row(
    conversion: Conversion,
    key: tuple[str, str, str],
    made: list[Transfer],
    figures: Mapping[tuple[str, str, str], Figures] | None,
) -> ConversionRow:
    lossless = all(transfer.exact for transfer in made)
    found = Figures() if lossless else (figures or {}).get(key)
    same_update = not (lossless and conversion.changes)  # else equal numbers say nothing of the steps made of them
    before = sum(
        stored.nbytes
        for transfer in made
        if transfer.was is not None
        for stored in conversion.checkpoint.fields_of(transfer.was).values()
    )
    return ConversionRow(
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


def _dropped(conversion: Conversion) -> list[ConversionRow]:
    sizes: dict[tuple[str, str], list[int]] = {}
    params = {param.name: param for param in conversion.checkpoint.document.parameters}
    for name, slot in conversion.dropped:
        record = params[name].slots[slot]
        nbytes = sum(stored.nbytes for stored in conversion.checkpoint.fields_of(record).values())
        sizes.setdefault((slot, record.store), []).append(nbytes)
    return [
        ConversionRow(slot, store, DROPPED, len(found), sum(found), 0, False, 1.0, None, None, None, None)
        for (slot, store), found in sizes.items()
    ]


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
