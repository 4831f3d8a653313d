"""Steps in Triton of SM3: the sum of squares bounded by the largest value of each row and column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from optstate.kernels.rules import ElementRule
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps.maxima import CompiledMaxima
from optstate.optimizer.whole_steps.triton_operands import (
    check_gradient,
    fit_plan,
    fits_tiles,
    flag_of,
    gradient_tensor,
    moment_tensor,
    weight_tensor,
)
from optstate.updates import Context

__all__ = ["TritonMaxima"]


@dataclass(frozen=True)
class TritonMaxima:
    """The check of the gradient, the step, and the maxima of all strips."""

    chain: CompiledMaxima

    words: ClassVar[str] = "Triton"
    checks_gradient: ClassVar[bool] = True

    @staticmethod
    def of(plan: ParamPlan) -> TritonMaxima | None:
        """Return the step of a plan; None if its chain, shape, a store or its way of writing weights is not known."""
        chain = CompiledMaxima.of(plan)
        return TritonMaxima(chain) if chain is not None and fits_tiles(plan.spec) else None

    @property
    def passes(self) -> int:
        """Passes over the parameter: the check of the gradient, and the step."""
        return 2

    @property
    def launches(self) -> int:
        """Launches of a step: the flag, the check, the step, the maxima."""
        return 4

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written: the gradient twice, the parameter and its state once each way."""
        return self.chain.moved_bytes

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`."""
        chain = self.chain
        end = chain.tail.read(ctx, on_device=True)
        gradient, weight = gradient_tensor(ctx, None), weight_tensor(chain.weight, state, ctx)
        slot = chain.plan.slots[chain.rss.slot]
        row, col = moments = [state[key] for key in slot.keys.values()]
        if end is None or gradient is None or weight is None or not fit_plan(slot, moments):
            return False
        share = 0.0 if chain.average is None else 1 - ctx.read(chain.average.beta)
        first = moment_tensor(chain.first, state, ctx, share)
        if first is None:
            return False
        from optstate.kernels.triton_steps.maxima import launch_maxima

        rule = ElementRule(first_weight=share, eps=ctx.read(chain.rss.eps), step=end.scale, keep=1.0 - end.decay)
        check_gradient(gradient.grad, chain.plan.largest_gradient(ctx.group), ctx)
        ctx.guard.begin_writing()
        launch_maxima(weight, gradient, first, row, col, rule, flag_of(ctx))
        return True
