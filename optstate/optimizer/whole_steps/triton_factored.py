"""Steps in Triton with a factored second moment: AdaLomo and Adafactor, with or without momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from optstate.kernels.rules import MatrixRule
from optstate.kernels.triton_steps import GradientTensor, MomentTensor, WeightTensor
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps.factored import CompiledFactored
from optstate.optimizer.whole_steps.operands import KeptMoment
from optstate.optimizer.whole_steps.read_rules import read_matrix_rule
from optstate.optimizer.whole_steps.triton_operands import (
    check_gradient,
    fit_plan,
    fits_tiles,
    flag_of,
    gradient_tensor,
    moment_tensor,
    weight_tensor,
)
from optstate.optimizer.whole_steps.triton_tables import Joined, joins
from optstate.updates import Context

__all__ = ["TritonFactored"]


@dataclass(frozen=True)
class TritonFactored:
    """Sums, the statistic, the size of the update, the write; for a vector the check, the moment, the write."""

    chain: CompiledFactored

    @staticmethod
    def of(plan: ParamPlan) -> TritonFactored | None:
        """Return the step of a plan; None if its chain, shape, a store or its way of writing weights is not known."""
        chain = CompiledFactored.of(plan)
        fits = chain is not None and (not chain.is_factored or fits_tiles(plan.spec))
        return TritonFactored(chain) if chain is not None and fits else None

    @cached_property
    def joined(self) -> Joined | None:
        """How the step of a vector is made together with those of others; None for matrices and large vectors."""
        chain = self.chain
        second = KeptMoment.of(chain.plan.slots[chain.rms.slot])
        if chain.is_factored or not joins(chain.plan.spec):
            return None
        rule = partial(read_matrix_rule, chain)
        return Joined(chain.plan, chain.clip, None, chain.weight, chain.first, second, rule, self.launches)

    @property
    def words(self) -> str:
        """What the plan says of the step."""
        return "Triton"

    @property
    def checks_gradient(self) -> bool:
        """Whether the step refuses a gradient that is not finite: its sums show it, or a check that it makes."""
        return True

    @property
    def measures(self) -> bool:
        """Whether the write needs the size of the update or of the weight."""
        return self.chain.tail.threshold is not None or self.chain.tail.least_rms is not None

    @property
    def passes(self) -> int:
        """Passes over the parameter: its sums, or the check and the moment; the measurement; the write."""
        return 2 + self.measures if self.chain.is_factored else 3

    @property
    def launches(self) -> int:
        """Launches of a step without a clamp: the flag, the passes, and the statistic between them."""
        return 1 + self.passes + self.chain.is_factored

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written: the gradient in every pass, the parameter as it is read and written, the state."""
        plan, tail = self.chain.plan, self.chain.tail
        reads_gradient = 2 + (tail.threshold is not None) if self.chain.is_factored else 3
        reads_weight = 1 + (tail.least_rms is not None)
        own = (reads_gradient + reads_weight + 1) * plan.spec.local_numel * plan.spec.dtype.itemsize
        return own + (2 if self.chain.is_factored else 3) * plan.nbytes

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`."""
        chain = self.chain
        bound = None if chain.clip is None else ctx.read(chain.clip.bound)
        rule, gradient = read_matrix_rule(chain, ctx), gradient_tensor(ctx, bound)
        weight = weight_tensor(chain.weight, state, ctx)
        slot = chain.plan.slots[chain.rms.slot]
        moments = [state[key] for key in slot.keys.values()]
        if rule is None or gradient is None or weight is None or not fit_plan(slot, moments):
            return False
        first = moment_tensor(chain.first, state, ctx, rule.first_weight)
        if first is None:
            return False
        if chain.is_factored:
            self._run_factored(weight, gradient, first, moments, rule, ctx)
        else:
            self._run_full(weight, gradient, first, moments[0], rule, ctx)
        return True

    def _run_factored(
        self,
        weight: WeightTensor,
        gradient: GradientTensor,
        first: MomentTensor,
        moments: list[Tensor],
        rule: MatrixRule,
        ctx: Context,
    ) -> None:
        """Step a matrix, or several of them."""
        from optstate.kernels.triton_steps.factored import FactoredLaunches

        if gradient.bound is not None:  # a clamp would hide what is infinite
            check_gradient(gradient.grad, math.inf, ctx)
        clears = not ctx.guard.checked
        row, col = moments
        launches = FactoredLaunches(weight, gradient, first, row, col, rule, flag_of(ctx), clears)
        launches.sum_and_move()
        if clears:
            ctx.guard.check(launches.finite)
        ctx.guard.begin_writing()
        launches.write()

    def _run_full(
        self,
        weight: WeightTensor,
        gradient: GradientTensor,
        first: MomentTensor,
        second: Tensor,
        rule: MatrixRule,
        ctx: Context,
    ) -> None:
        """Step a vector, or a tensor whose second moment is kept in full."""
        from optstate.kernels.triton_steps.unfactored import launch_unfactored

        check_gradient(gradient.grad, self.chain.plan.largest_gradient(ctx.group), ctx)
        ctx.guard.begin_writing()
        launch_unfactored(weight, gradient, first, second, rule, flag_of(ctx))
