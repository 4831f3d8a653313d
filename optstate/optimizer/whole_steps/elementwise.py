"""Compiled steps of chains in which every element goes its own way: descent, Adam, Lion, momentum."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from optstate.kernels import native
from optstate.kernels.native import MomentKind, StepKind, StepRule
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps.operands import KeptMoment, WrittenWeight, gradient, takes
from optstate.optimizer.whole_steps.tail import Tail
from optstate.stores import Factored, Grouped, Statistic, run_alone
from optstate.updates import (
    Context,
    Transform,
    Update,
    add_decayed_weights,
    clip_by_value,
    momentum,
    scale_by_adam,
    scale_by_rss,
    sign_momentum,
)

__all__ = ["CompiledElementwise", "MovedMoment"]


@dataclass(frozen=True)
class MovedMoment:
    """A second moment that was moved before the kernel runs, as it needs sums; to be committed afterwards.

    Attributes:
        statistic: the moment.
        kind, data, scale, block: how a kernel reads it: one number per `block` elements; or one per row of `block`
            elements, times one per column.
    """

    statistic: Statistic
    kind: MomentKind
    data: Tensor
    scale: Tensor | None
    block: int


@dataclass(frozen=True)
class CompiledElementwise:
    """A step over tiles, each of which is read, stepped and written once.

    Attributes:
        clip: of the gradient's elements, or None.
        penalty: a weight decay that is added to the gradient, or None.
        rule: what makes the update; None for the gradient itself.
        tail: what comes after the rule.
        first, second: the moments of the rule that the kernel moves; None without.
        moved: a second moment that is moved before the kernel runs, as it needs sums; None without.
    """

    plan: ParamPlan
    clip: clip_by_value | None
    penalty: add_decayed_weights | None
    rule: Transform | None
    tail: Tail
    weight: WrittenWeight
    first: KeptMoment | None = None
    second: KeptMoment | None = None
    moved: str | None = None

    @staticmethod
    def of(plan: ParamPlan) -> CompiledElementwise | None:
        """Return the step of a plan; None if its chain, a store or its way of writing weights is not known."""
        weight = WrittenWeight.of(plan)
        if weight is None or not takes(plan.spec):
            return None
        transforms = list(plan.chain.transforms)
        clip = transforms.pop(0) if transforms and isinstance(transforms[0], clip_by_value) else None
        penalty = None
        if len(transforms) > 1 and isinstance(transforms[0], add_decayed_weights) and _takes_penalty(transforms[1]):
            penalty = transforms.pop(0)
        before = []
        while transforms and isinstance(transforms[0], add_decayed_weights):
            before.append(transforms.pop(0))
        rule = transforms.pop(0) if transforms and isinstance(transforms[0], RULES) else None
        if isinstance(rule, scale_by_adam) and rule.eps_hat:
            return None
        if rule is not None and before and not (isinstance(rule, momentum) and rule.decoupled):
            return None
        tail = Tail.of([*before, *transforms])
        if tail is None or tail.least_rms is not None or tail.threshold is not None:
            return None
        step = CompiledElementwise(plan, clip, penalty, rule, tail, weight)  # type: ignore[arg-type]
        return step._with_moments()

    def _with_moments(self) -> CompiledElementwise | None:
        """Return this step with the moments of its rule; None if one is kept in a format that is not known."""
        slots = list(self.plan.slots.values())
        kept = [KeptMoment.of(slot) for slot in slots]
        match self.rule:
            case None:
                return self if not slots else None
            case scale_by_adam():
                return self._with_adams(kept)
            case scale_by_rss():
                exact = len(kept) == 1 and kept[0] is not None and kept[0].kind == MomentKind.FULL32
                return _replaced(self, second=kept[0]) if exact else None
        return _replaced(self, first=kept[0]) if len(kept) == 1 and kept[0] is not None else None

    def _with_adams(self, kept: list[KeptMoment | None]) -> CompiledElementwise | None:
        if list(self.plan.slots) != ["exp_avg", "exp_avg_sq"] or kept[0] is None:
            return None
        if kept[1] is not None:
            return _replaced(self, first=kept[0], second=kept[1])
        store, spec = self.plan.slots["exp_avg_sq"].store, self.plan.spec
        spreads = isinstance(store, Grouped) or (isinstance(store, Factored) and spec.ndim == 2)
        return _replaced(self, first=kept[0], moved="exp_avg_sq") if spreads and spec.region is None else None

    @cached_property
    def _kernel(self) -> Callable[..., Any]:
        return native.function("step_elementwise")

    @property
    def words(self) -> str:
        """What the plan says of the step."""
        return "compiled" if self.moved is None else "compiled, sums before"

    @cached_property
    def checks_gradient(self) -> bool:
        """Whether the step refuses a gradient that is not finite: only where sums of it come first."""
        return self.moved is not None

    @property
    def passes(self) -> int:
        """Passes over the parameter: the check of the gradient, or its sums, and the step."""
        return 2

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written: the gradient twice, the parameter and what is kept for it once each way."""
        spec = self.plan.spec
        return 4 * spec.local_numel * spec.dtype.itemsize + 2 * self.plan.nbytes

    @property
    def kind(self) -> StepKind | None:
        """What a table of steps has in the place of the parameter."""
        return StepKind.ELEMENTWISE if self.moved is None else None

    def fill(self, state: Mapping[str, Any], ctx: Context) -> native.Elementwise | None:
        """Return the structure of a step, without a moment that is moved beforehand; see `TableStep.fill`."""
        coefficients = self.tail.read(ctx)
        grad = gradient(ctx, None if self.clip is None else ctx.read(self.clip.bound))
        weight = self.weight.operand(state, ctx)
        if coefficients is None or grad is None or weight is None or ctx.guard.deferred:
            return None
        step = native.Elementwise(weight=weight, grad=grad, step=coefficients.scale, keep=1.0 - coefficients.decay)
        if self.penalty is not None:
            step.grad.penalty = ctx.read(self.penalty.rate)
        return step if self._set_rule(step, state, ctx) else None

    def largest(self, ctx: Context) -> float:
        """Return the largest magnitude of a gradient's element that is not refused; negative for none."""
        return -1.0 if self.plan.guards else self.plan.largest_gradient(ctx.group)

    def room(self, structure: native.Elementwise) -> int:
        """Return how many numbers of 8 bytes the sums of a step take: there are none."""
        return 0

    def with_names(self, structure: native.Elementwise, name: str) -> None:
        """Put the keys of random bits into a structure; see `TableStep.with_names`."""
        structure.weight.key = self.weight.name_key(name)
        if self.first is not None:
            structure.first.key = self.first.name_key(name)
        if self.second is not None:
            structure.second.key = self.second.name_key(name)

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`."""
        step = self.fill(state, ctx)
        if step is None:
            return False
        statistic = None if self.moved is None else self._move(step, state, ctx)
        ctx.guard.begin_writing()
        step.alive, count = (ctx, step.alive), ctx.param.numel()
        if count < native.WORTH_SHARING:  # as `share` would, one call sooner
            self._kernel(ctypes.byref(step), 0, count)
        else:
            native.share(self._kernel, (ctypes.byref(step),), count, native.TILE, count)
        if statistic is not None:
            statistic.commit()
        return True

    def _set_rule(self, step: native.Elementwise, state: Mapping[str, Any], ctx: Context) -> bool:
        """Fill in what makes the update; return whether C code can read and write the moments."""
        share = second_share = 0.0
        match self.rule:
            case scale_by_adam() as adam:
                beta1, beta2 = map(ctx.read, adam.betas)
                step.rule, share, second_share = StepRule.ADAM, 1 - beta1, 1 - beta2
                step.eps = ctx.read(adam.eps)
                step.inverse_correction = 1 / math.sqrt(1 - beta2**ctx.step)
                step.step /= 1 - beta1**ctx.step
            case scale_by_rss() as rss:
                step.rule, step.eps = StepRule.ROOT_OF_SUM, ctx.read(rss.eps)
            case sign_momentum() as lion:
                beta1, beta2 = map(ctx.read, lion.betas)
                step.rule, share, step.mix = StepRule.LION, 1 - beta2, 1 - beta1
            case momentum(heavy_ball=True) as ball:
                step.rule, step.mix, step.nesterov = StepRule.HEAVY_BALL, ctx.read(ball.beta), ball.nesterov
                share = 1 - step.mix
            case momentum() as average:
                step.rule, share, step.nesterov = StepRule.AVERAGE, 1 - ctx.read(average.beta), average.nesterov
            case _:
                step.rule = StepRule.DESCENT
        step.first_weight, step.second_weight = share, second_share
        if isinstance(self.rule, momentum) and self.rule.heavy_ball:
            step.first_weight = 1.0 if ctx.step == 1 else 1 - ctx.read(self.rule.dampening)
        if self.first is not None:
            first = self.first.operand(state, ctx, share)
            if first is None:
                return False
            step.first = first
        if self.second is not None:
            second = self.second.operand(state, ctx, second_share)
            if second is None:
                return False
            step.second, step.moves_second = second, 1
        return True

    def _move(self, step: native.Elementwise, state: Mapping[str, Any], ctx: Context) -> Statistic | None:
        """Move a second moment that needs sums, and hand it to the kernel; return it, to be written afterwards."""
        if self.moved is None:
            return None
        moved = self.move_second(state, ctx)
        scale = None if moved.scale is None else moved.scale.data_ptr()
        step.second = native.MomentOperand(moved.data.data_ptr(), scale, kind=moved.kind, block=moved.block)
        step.alive = moved
        return moved.statistic

    def move_second(self, state: Mapping[str, Any], ctx: Context) -> MovedMoment:
        """Move the second moment that needs sums; return how a kernel reads it.

        Raises:
            NonFiniteGradientError: if the gradient is not finite, and the host can know.
        """
        assert self.moved is not None
        slot, spec = self.plan.slots[self.moved], ctx.spec
        fields = {field: state[key] for field, key in slot.keys.items()}
        statistic = Statistic(slot.store, fields, spec, ctx.guard, ctx.param.shape)
        update = Update(ctx.grad, scale=ctx.grad_scale)
        if self.clip is not None:
            bounded = self.clip(update, {}, ctx)
            update = run_alone(bounded)
        if self.penalty is not None:
            update = self.penalty(update, {}, ctx)
        assert isinstance(self.rule, scale_by_adam)
        run_alone(self.rule.prepare(update, {self.moved: statistic}, ctx))
        if isinstance(slot.store, Factored):
            share, col = (factor.contiguous() for factor in statistic.factors())
            return MovedMoment(statistic, MomentKind.OUTER, share, col, spec.shape[-1])
        mean = statistic.current["mean"].contiguous()
        return MovedMoment(statistic, MomentKind.SPREAD, mean, None, spec.numel // mean.numel())


RULES = (scale_by_adam, sign_momentum, momentum, scale_by_rss)


def _takes_penalty(transform: Transform) -> bool:
    """Whether a decay before this transform becomes a part of the gradient."""
    return isinstance(transform, RULES) and not (isinstance(transform, momentum) and transform.decoupled)


def _replaced(step: CompiledElementwise, **changes: Any) -> CompiledElementwise:
    return replace(step, **changes)
