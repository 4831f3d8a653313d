"""Steps in Triton of CAME: updates averaged, and divided by how far they stray from their average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from optstate.kernels.native import MomentKind
from optstate.kernels.rules import MatrixRule
from optstate.kernels.triton_steps import GradientTensor, MomentTensor, WeightTensor
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps.confidence import ConfidenceChain
from optstate.optimizer.whole_steps.factored import keeps_fp32
from optstate.optimizer.whole_steps.operands import KeptMoment, WrittenWeight, takes
from optstate.optimizer.whole_steps.read_rules import weight_of
from optstate.optimizer.whole_steps.triton_operands import (
    check_gradient,
    fit_plan,
    fits_tiles,
    flag_of,
    gradient_tensor,
    weight_tensor,
)
from optstate.optimizer.whole_steps.triton_tables import Joined, joins
from optstate.stores import Factored, Full
from optstate.updates import Context

__all__ = ["TritonConfidence"]

MATRIX, VECTOR = (Factored, Full, Factored), (Full, Full)
"""Stores of the second moment, the average of updates, and their distance from it, which a vector does not keep."""


@dataclass(frozen=True)
class TritonConfidence:
    """Sums, statistic, size, average, statistic, write; for a vector the check, the moment, the write.

    Attributes:
        chain: the transforms.
        is_factored: whether the second moments are factored, and not a vector's, which is kept in full.
    """

    plan: ParamPlan
    chain: ConfidenceChain
    weight: WrittenWeight
    is_factored: bool

    words: ClassVar[str] = "Triton"
    checks_gradient: ClassVar[bool] = True

    @staticmethod
    def of(plan: ParamPlan) -> TritonConfidence | None:
        """Return the step of a plan; None if its chain, shape, a store or its way of writing weights is not known."""
        weight, chain, spec = WrittenWeight.of(plan), ConfidenceChain.of(plan), plan.spec
        if weight is None or chain is None or not takes(spec) or spec.region is not None:
            return None
        names = (chain.rms.slot, "exp_avg", "exp_avg_res")
        stores = tuple(type(plan.slots[name].store) for name in names if name in plan.slots)
        if stores not in (MATRIX, VECTOR) or len(stores) != len(plan.slots):
            return None
        if not all(keeps_fp32(plan, slot) for slot in plan.slots) or (stores == MATRIX and not fits_tiles(spec)):
            return None
        return TritonConfidence(plan, chain, weight, stores == MATRIX)

    @cached_property
    def joined(self) -> Joined | None:
        """How the step of a vector is made together with those of others; None for matrices and large vectors."""
        slots = self.plan.slots
        if self.is_factored or not joins(self.plan.spec):
            return None
        first, second = KeptMoment.of(slots["exp_avg"]), KeptMoment.of(slots[self.chain.rms.slot])
        return Joined(self.plan, None, None, self.weight, first, second, self._read_rule, self.launches)

    def _read_rule(self, ctx: Context) -> MatrixRule | None:
        """Return the numbers of a step up to the second statistic, and those of the write of a vector."""
        chain = self.chain
        end = chain.tail.read(ctx, on_device=True)
        averaging = weight_of(chain.rms.decay, ctx)
        if end is None or averaging is None:
            return None
        return MatrixRule(
            averaging=averaging,
            eps=ctx.read(chain.rms.eps) or 0.0,
            threshold=None if chain.clip is None else ctx.read(chain.clip.threshold),
            least_rms=None,
            step=1.0,
            decay=end.decay,
            first_weight=1 - ctx.read(chain.confidence.betas[0]),
            after=end.scale,
        )

    @property
    def passes(self) -> int:
        """Passes over the parameter: sums, size, average and write; or the check, the moment and the write."""
        return 3 + (self.chain.clip is not None) if self.is_factored else 3

    @property
    def launches(self) -> int:
        """Launches of a step: the flag, the passes, and two statistics between them."""
        return 1 + self.passes + 2 * self.is_factored

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written: the gradient in every pass but the last; the average three times; the rest each way.

        Of a vector the gradient three times, the parameter each way, the moment three times, the average twice.
        """
        spec, average = self.plan.spec, self.plan.slots["exp_avg"].nbytes
        own = spec.local_numel * spec.dtype.itemsize
        if not self.is_factored:
            return 5 * own + 2 * self.plan.nbytes + self.plan.slots[self.chain.rms.slot].nbytes
        return (self.passes + 1) * own + 2 * self.plan.nbytes + average

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`."""
        chain, slots = self.chain, self.plan.slots
        first = self._read_rule(ctx)
        gradient, weight = gradient_tensor(ctx, None), weight_tensor(self.weight, state, ctx)
        moments = {name: [state[key] for key in slot.keys.values()] for name, slot in slots.items()}
        if first is None or gradient is None or weight is None:
            return False
        if not all(fit_plan(slot, moments[name]) for name, slot in slots.items()):
            return False
        if not self.is_factored:
            self._run_full(weight, gradient, moments, first, ctx)
            return True
        share, eps = 1 - ctx.read(chain.confidence.betas[1]), ctx.read(chain.confidence.eps)
        second = MatrixRule(share, eps, None, None, step=first.after, decay=first.decay)
        self._run_factored(weight, gradient, moments, (first, second), ctx)
        return True

    def _run_factored(
        self,
        weight: WeightTensor,
        gradient: GradientTensor,
        moments: Mapping[str, list[Tensor]],
        rules: tuple[MatrixRule, MatrixRule],
        ctx: Context,
    ) -> None:
        """Step a matrix, or several of them."""
        from optstate.kernels.triton_steps.confidence import write_by_confidence
        from optstate.kernels.triton_steps.factored import FactoredLaunches

        clears = not ctx.guard.checked
        row, col = moments[self.chain.rms.slot]
        launches = FactoredLaunches(weight, gradient, MomentTensor(), row, col, rules[0], flag_of(ctx), clears)
        launches.sum_and_move()
        if clears:
            ctx.guard.check(launches.finite)
        ctx.guard.begin_writing()
        row, col = moments["exp_avg_res"]
        write_by_confidence(launches, moments["exp_avg"][0], row, col, rules[1])

    def _run_full(
        self,
        weight: WeightTensor,
        gradient: GradientTensor,
        moments: Mapping[str, list[Tensor]],
        rule: MatrixRule,
        ctx: Context,
    ) -> None:
        """Step a vector, which keeps no second average."""
        from optstate.kernels.triton_steps.unfactored import launch_unfactored

        check_gradient(gradient.grad, self.plan.largest_gradient(ctx.group), ctx)
        ctx.guard.begin_writing()
        average, second = MomentTensor(moments["exp_avg"][0], kind=MomentKind.FULL32), moments[self.chain.rms.slot][0]
        launch_unfactored(weight, gradient, average, second, rule, flag_of(ctx))
