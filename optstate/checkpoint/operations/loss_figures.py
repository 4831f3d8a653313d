"""What a conversion loses: errors of statistics, and of the updates that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["Figures", "compared", "divisor", "update"]


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


def divisor(second: Tensor | None, eps: float) -> Tensor | None:
    """What a second moment without bias divides a step by, `sqrt(second) + eps`; None without one."""
    return None if second is None else second.sqrt().add_(eps)


def update(first: Tensor, divided_by: Tensor | None) -> Tensor:
    """The step that a first moment without bias gives."""
    return first if divided_by is None else first / divided_by


def compared(old: Tensor, new: Tensor, old_update: Tensor, new_update: Tensor, squares: bool) -> Figures:
    """Figures of one statistic, or a piece of it, flat and of its update.

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
    """Sum of squares; pieces are short enough for fp32 to sum them to a few units in the last place."""
    total = float(torch.dot(flat, flat))
    if math.isfinite(total):
        return total
    flat = flat.double()  # squares of numbers above 1e19
    return float(torch.dot(flat, flat))


def _zeros(old: Tensor, new: Tensor) -> int:
    """How many elements became zero; no store makes something of a zero and nothing of another number."""
    kept = int(torch.count_nonzero(new))
    return 0 if kept == new.numel() else max(int(torch.count_nonzero(old)) - kept, 0)
