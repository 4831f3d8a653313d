"""Steps in Triton of chains in which every element goes its own way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from optstate.kernels.triton_steps import MomentTensor
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps.elementwise import CompiledElementwise, MovedMoment
from optstate.optimizer.whole_steps.read_rules import read_element_rule
from optstate.optimizer.whole_steps.triton_operands import (
    are_launchable,
    gradient_tensor,
    moment_tensor,
    weight_tensor,
)
from optstate.optimizer.whole_steps.triton_tables import Joined
from optstate.updates import Context

__all__ = ["TritonElementwise"]


@dataclass(frozen=True)
class TritonElementwise:
    """The check of the gradient, then one launch in which each tile is read, stepped and written once."""

    chain: CompiledElementwise

    @staticmethod
    def of(plan: ParamPlan) -> TritonElementwise | None:
        """Return the step of a plan; None if its chain, a store or its way of writing weights is not known."""
        chain = CompiledElementwise.of(plan)
        return None if chain is None else TritonElementwise(chain)

    @cached_property
    def joined(self) -> Joined | None:
        """How the step is made together with those of others; None where sums come before, or of a part."""
        chain = self.chain
        if chain.moved is not None or chain.plan.spec.region is not None or not chain.plan.spec.numel:
            return None
        rule = partial(read_element_rule, chain)
        moments = chain.first, chain.second
        return Joined(chain.plan, chain.clip, chain.penalty, chain.weight, *moments, rule, self.launches)

    @property
    def words(self) -> str:
        """What the plan says of the step."""
        return "Triton" if self.chain.moved is None else "Triton, sums before"

    @property
    def checks_gradient(self) -> bool:
        """Whether the step refuses a gradient that is not finite: of a whole parameter; parts are checked together."""
        return self.chain.plan.spec.region is None

    @property
    def passes(self) -> int:
        """Passes over the parameter: the check of the gradient, or its sums, and the step."""
        return 2

    @property
    def launches(self) -> int:
        """Launches of a step, where no sums come before: the flag, the check, the step."""
        return 3

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written: the gradient twice, the parameter and what is kept for it once each way."""
        plan = self.chain.plan
        return 4 * plan.spec.local_numel * plan.spec.dtype.itemsize + 2 * plan.nbytes

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`."""
        chain, guard = self.chain, ctx.guard
        penalty = 0.0 if chain.penalty is None else ctx.read(chain.penalty.rate)
        bound = None if chain.clip is None else ctx.read(chain.clip.bound)
        rule, gradient = read_element_rule(chain, ctx), gradient_tensor(ctx, bound, penalty)
        weight = weight_tensor(chain.weight, state, ctx)
        if rule is None or gradient is None or weight is None:
            return False
        first = moment_tensor(chain.first, state, ctx, rule.first_share)
        second = moment_tensor(chain.second, state, ctx, rule.second_weight)
        if first is None or second is None:
            return False
        from optstate.kernels.triton_steps.elementwise import launch_elementwise
        from optstate.kernels.triton_steps.finite import launch_finite_check

        if chain.moved is None and not guard.checked:
            guard.check(launch_finite_check(gradient.grad, chain.plan.largest_gradient(ctx.group)))
        moved = None if chain.moved is None else chain.move_second(state, ctx)
        if moved is not None:
            second = _moment_of(moved)
        guard.begin_writing()
        launch_elementwise(weight, gradient, first, second, rule, guard.finite, moves_second=chain.second is not None)
        if moved is not None:
            moved.statistic.commit()
        return True


def _moment_of(moved: MovedMoment) -> MomentTensor:
    assert are_launchable(moved.data)
    return MomentTensor(moved.data, moved.scale, moved.kind, block=moved.block)
