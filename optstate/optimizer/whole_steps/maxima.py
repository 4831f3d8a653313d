"""Compiled steps of SM3: one pass, which bounds the sum of squares by the largest value of each row and column."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from optstate.kernels import native
from optstate.kernels.native import StepKind
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps.operands import KeptMoment, WrittenWeight, are_as_planned, gradient, takes
from optstate.optimizer.whole_steps.tail import Tail
from optstate.stores import AxisMax
from optstate.updates import Context, momentum, scale_by_rss

__all__ = ["CompiledMaxima"]


@dataclass(frozen=True)
class CompiledMaxima:
    """A step of a matrix whose sum of squares is kept as maxima.

    Attributes:
        rss: the transform that divides by the root of the sum.
        average: the momentum after it, or None; first: how that is kept.
        tail: what comes at the end.
    """

    plan: ParamPlan
    rss: scale_by_rss
    average: momentum | None
    first: KeptMoment | None
    tail: Tail
    weight: WrittenWeight

    checks_gradient: ClassVar[bool] = False

    @staticmethod
    def of(plan: ParamPlan) -> CompiledMaxima | None:
        """Return the step of a plan; None if its chain, a store or its way of writing weights is not known."""
        weight, spec = WrittenWeight.of(plan), plan.spec
        rest = list(plan.chain.transforms)
        if weight is None or not takes(spec) or spec.region is not None or spec.ndim != 2 or not rest:
            return None
        rss = rest.pop(0)
        if not isinstance(rss, scale_by_rss) or not isinstance(plan.slots[rss.slot].store, AxisMax):
            return None
        average = rest.pop(0) if rest and isinstance(rest[0], momentum) else None
        first = None
        if isinstance(average, momentum):
            first = KeptMoment.of(plan.slots[average.slot])
            plain = not average.heavy_ball and not average.nesterov
            if first is None or not plain or first.block > 1:  # rows do not end where blocks do
                return None
        tail = Tail.of(rest)
        if tail is None or tail.threshold is not None or tail.least_rms is not None:
            return None
        return CompiledMaxima(plan, rss, average if isinstance(average, momentum) else None, first, tail, weight)

    @property
    def words(self) -> str:
        """What the plan says of the step."""
        return "compiled"

    @property
    def passes(self) -> int:
        """Passes over the parameter: the check of the gradient, and the step."""
        return 2

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written: the gradient twice, the parameter and its state once each way."""
        return 4 * self.plan.spec.local_numel * self.plan.spec.dtype.itemsize + 2 * self.plan.nbytes

    @property
    def kind(self) -> StepKind:
        """What a table of steps has in the place of the parameter."""
        return StepKind.MAXIMA

    def fill(self, state: Mapping[str, Any], ctx: Context) -> native.MaximaStep | None:
        """Return the structure of a step; see `TableStep.fill`."""
        end = self.tail.read(ctx)
        grad, weight = gradient(ctx, None), self.weight.operand(state, ctx)
        slot = self.plan.slots[self.rss.slot]
        row, col = moments = [state[key] for key in slot.keys.values()]
        if end is None or grad is None or weight is None or ctx.guard.deferred or not are_as_planned(slot, moments):
            return None
        rows, cols = ctx.param.shape
        parts = native.parts_of(rows, cols)
        step = native.MaximaStep(weight=weight, grad=grad, rows=rows, cols=cols, parts=parts)
        step.row, step.col = row.data_ptr(), col.data_ptr()
        step.eps, step.step, step.keep = ctx.read(self.rss.eps), end.scale, 1.0 - end.decay
        if self.average is not None and self.first is not None:
            step.first_weight = 1 - ctx.read(self.average.beta)
            first = self.first.operand(state, ctx, step.first_weight)
            if first is None:
                return None
            step.first = first
        return step

    def largest(self, ctx: Context) -> float:
        """Return the largest magnitude of a gradient's element that is not refused; negative for none."""
        return -1.0 if self.plan.guards else self.plan.largest_gradient(ctx.group)

    def room(self, structure: native.MaximaStep) -> int:
        """Return how many numbers of 8 bytes the maxima of the parts take."""
        return int(structure.parts * structure.cols + 1) // 2

    def with_names(self, structure: native.MaximaStep, name: str) -> None:
        """Put the keys of random bits into a structure; see `TableStep.with_names`."""
        structure.weight.key = self.weight.name_key(name)
        if self.first is not None:
            structure.first.key = self.first.name_key(name)

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`."""
        step = self.fill(state, ctx)
        if step is None:
            return False
        room = torch.empty(step.parts * step.cols, dtype=torch.float32, device="cpu")
        step.col_parts = room.data_ptr()
        step.alive = ctx, room
        ctx.guard.begin_writing()
        native.share(native.function("step_maxima"), (ctypes.byref(step),), step.parts, 1, ctx.param.numel())
        native.function("finish_maxima")(ctypes.byref(step))
        return True
