"""What whole steps compute, in numbers that the host knows: the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass

from optstate.kernels.native import StepRule

__all__ = ["ElementRule", "MatrixRule"]


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
    first_weight: float = 0.0
    second_weight: float = 0.0
    mix: float = 0.0
    inverse_correction: float = 1.0
    eps: float = 0.0
    step: float = 0.0
    keep: float = 1.0

    @property
    def first_share(self) -> float:
        """The share of the first moment that one step replaces, which decides how its store rounds."""
        return 1.0 - self.mix if self.rule == StepRule.HEAVY_BALL else self.first_weight


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

    averaging: float
    eps: float
    threshold: float | None
    least_rms: float | None
    step: float
    decay: float
    decay_is_scaled: bool = False
    first_weight: float = 0.0
    after: float = 1.0
