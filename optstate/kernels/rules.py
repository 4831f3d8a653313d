"""What whole steps compute, in numbers of the host, or of a device where only that knows them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from optstate.kernels.native import StepRule

__all__ = ["ElementRule", "MatrixRule", "Number", "on_host"]

Number = float | Tensor
"""A number of the host, or a 0-d fp64 tensor on a device: what follows from a learning rate or a count kept there."""


def on_host(number: Number) -> float:
    """Return a number if the host knows it, else zero in its place."""
    return 0.0 if isinstance(number, Tensor) else number


def _stack(numbers: tuple[Number, ...]) -> Tensor | None:
    """Return numbers as one fp32 tensor if a device knows one of them; None if the host knows all."""
    known = [number for number in numbers if isinstance(number, Tensor)]
    if not known:
        return None
    kind = {"dtype": torch.float64, "device": known[0].device}
    return torch.stack([torch.full((), n, **kind) if isinstance(n, float) else n for n in numbers]).float()  # type: ignore[call-overload]


@dataclass(frozen=True)
class ElementRule:
    """What a step makes of a gradient where every element goes its own way, in numbers.

    Attributes:
        rule: the formula; nesterov: whether it looks ahead.
        first_weight, second_weight: shares of the new value in the averages; of a heavy ball what joins the sum.
        mix: Lion's share of the gradient in the direction; the heavy ball's beta.
        inverse_correction, eps: Adam's.
        step, keep: the parameter becomes `param * keep - step * update`.
    """

    rule: StepRule = StepRule.DESCENT
    nesterov: bool = False
    first_weight: Number = 0.0
    second_weight: float = 0.0
    mix: float = 0.0
    inverse_correction: Number = 1.0
    eps: float = 0.0
    step: Number = 0.0
    keep: Number = 1.0

    @cached_property
    def on_device(self) -> Tensor | None:
        """What changes from step to step, fp32 `[4]`, if a device knows it; None if the host does."""
        return _stack((self.first_weight, self.inverse_correction, self.step, self.keep))

    @property
    def first_share(self) -> float:
        """The share of the first moment that one step replaces, which decides how its store rounds."""
        return 1.0 - self.mix if self.rule == StepRule.HEAVY_BALL else on_host(self.first_weight)


@dataclass(frozen=True)
class MatrixRule:
    """The numbers of a step that divides by the root of a second moment and then bounds and scales the update.

    Attributes:
        averaging, eps: weight of the new squares in the moment, and what is added to them.
        threshold: bound on the update's root mean square; None for none.
        least_rms: least root mean square of the weight by which the update is multiplied; None for no such scale.
        step, decay: of the update and of the weight, before the weight's root mean square.
        decay_is_scaled: whether that multiplies the decay, too.
        first_weight, after: of the momentum: share of the new update, and what multiplies the average in the end.
    """

    averaging: Number
    eps: float
    threshold: float | None
    least_rms: float | None
    step: Number
    decay: Number
    decay_is_scaled: bool = False
    first_weight: float = 0.0
    after: Number = 1.0

    @cached_property
    def on_device(self) -> Tensor | None:
        """What changes from step to step, fp32 `[4]`, if a device knows it; None if the host does."""
        return _stack((self.averaging, self.step, self.decay, self.after))
