"""Compiled steps with a factored second moment: AdaLomo and Adafactor, with or without momentum."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optstate import kernels
from optstate.kernels import native
from optstate.kernels.native import StepKind
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps.operands import KeptMoment, WrittenWeight, are_as_planned, gradient, takes
from optstate.optimizer.whole_steps.tail import Tail
from optstate.stores import Factored, Full
from optstate.updates import Context, add_decayed_weights, clip_by_value, momentum, scale_by_rms

__all__ = ["CompiledFactored", "FactoredRoom", "keeps_fp32", "move_statistic", "room_of", "set_matrices"]


@dataclass(frozen=True)
class CompiledFactored:
    """Three passes over the gradient: its sums, the update's root mean square, and the write. Two for a vector.

    Attributes:
        clip: of the gradient's elements, or None.
        rms: the transform that divides by the second moment's root.
        tail: what comes after it, up to the momentum.
        average: the momentum at the end, or None; first: how that is kept.
        is_factored: whether the second moment is factored, and not a vector's, which is kept in full.
    """

    plan: ParamPlan
    clip: clip_by_value | None
    rms: scale_by_rms
    tail: Tail
    weight: WrittenWeight
    average: momentum | None
    first: KeptMoment | None
    is_factored: bool

    @staticmethod
    def of(plan: ParamPlan) -> CompiledFactored | None:
        """Return the step of a plan; None if its chain, a store or its way of writing weights is not known."""
        weight = WrittenWeight.of(plan)
        if weight is None or not takes(plan.spec) or plan.spec.region is not None:
            return None
        transforms = list(plan.chain.transforms)
        clip = transforms.pop(0) if transforms and isinstance(transforms[0], clip_by_value) else None
        rms = transforms.pop(0) if transforms else None
        if not isinstance(rms, scale_by_rms) or rms.floor is not None or rms.slot not in plan.slots:
            return None
        last = transforms[-1] if transforms else None
        average = last if isinstance(last, momentum) else None
        tail = Tail.of(transforms if average is None else transforms[:-1])
        store = plan.slots[rms.slot].store
        if tail is None or not isinstance(store, Factored | Full) or not keeps_fp32(plan, rms.slot):
            return None
        first = None
        if average is not None:
            first = KeptMoment.of(plan.slots[average.slot]) if _is_plain_average(average, tail) else None
            if first is None or first.block > 1:  # rows do not end where blocks do
                return None
        if len(plan.slots) != 1 + (first is not None):
            return None
        return CompiledFactored(plan, clip, rms, tail, weight, average, first, isinstance(store, Factored))  # type: ignore[arg-type]

    @property
    def words(self) -> str:
        """What the plan says of the step."""
        return "compiled"

    @cached_property
    def checks_gradient(self) -> bool:
        """Whether the step refuses a gradient that is not finite: its sums show it."""
        return self.is_factored

    @property
    def passes(self) -> int:
        """Passes over the parameter."""
        return 3

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written: the gradient three times; the parameter twice read and once written; the state."""
        spec = self.plan.spec
        reads_weight = self.tail.least_rms is not None
        return (5 + reads_weight) * spec.local_numel * spec.dtype.itemsize + 2 * self.plan.nbytes

    @property
    def kind(self) -> StepKind:
        """What a table of steps has in the place of the parameter."""
        return StepKind.FACTORED if self.is_factored else StepKind.FULL

    def fill(self, state: Mapping[str, Any], ctx: Context) -> native.FactoredStep | None:
        """Return the structure of a step; see `TableStep.fill`."""
        before = self.tail.read(ctx, ends_chain=self.average is None)
        bound = None if self.clip is None else ctx.read(self.clip.bound)
        grad, weight = gradient(ctx, bound), self.weight.operand(state, ctx)
        slot = self.plan.slots[self.rms.slot]
        moments = [state[key] for key in slot.keys.values()]
        if before is None or grad is None or weight is None or ctx.guard.deferred or not are_as_planned(slot, moments):
            return None
        step = native.FactoredStep(weight=weight, grad=grad, step=before.scale, decay=before.decay)
        if self.is_factored:
            set_matrices(step, moments, ctx.param.shape, native.parts_of(*ctx.param.shape[-2:]))
        else:
            count = ctx.param.numel()
            step.matrices, step.rows, step.cols, step.parts = 1, count, 1, native.parts_of(count, 1)
            step.row = moments[0].data_ptr()
        return step if self._set_numbers(step, state, ctx) else None

    def largest(self, ctx: Context) -> float:
        """Return the largest magnitude of a gradient's element that is not refused; negative where sums show it."""
        if not (self.is_factored or self.plan.guards):
            return self.plan.largest_gradient(ctx.group)
        bound = None if self.clip is None else ctx.read(self.clip.bound)
        return -1.0 if bound is None else math.inf  # a clamp would hide what is infinite

    def room(self, structure: native.FactoredStep) -> int:
        """Return how many numbers of 8 bytes the sums of a step take."""
        return room_of(structure) if self.is_factored else 2 * int(structure.parts)

    def with_names(self, structure: native.FactoredStep, name: str) -> None:
        """Put the keys of random bits into a structure; see `TableStep.with_names`."""
        structure.weight.key = self.weight.name_key(name)
        if self.first is not None:
            structure.first.key = self.first.name_key(name)

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`."""
        step = self.fill(state, ctx)
        if step is None:
            return False
        if step.grad.bound < math.inf and not ctx.guard.checked:  # a clamp would hide what is infinite
            ctx.guard.check(kernels.all_finite(ctx.grad))
        if not self.is_factored:
            self._run_full(step, ctx)
            return True
        room, address = FactoredRoom(step), ctypes.byref(step)
        step.alive = ctx, room
        work = (address,), room.parts, 1, ctx.param.numel()
        native.share(native.function("sum_factored"), *work)
        move_statistic(address, ctx)
        native.share(native.function("measure_factored"), *work)
        native.share(native.function("apply_factored"), *work)
        return True

    def _set_numbers(self, step: native.FactoredStep, state: Mapping[str, Any], ctx: Context) -> bool:
        """Fill in the hyper-parameters and the momentum; return whether C code can read and write the momentum."""
        tail = self.tail
        threshold = None if tail.threshold is None else ctx.read(tail.threshold.threshold)
        step.threshold = float("inf") if threshold is None else threshold
        step.least_rms = -1.0 if tail.least_rms is None else ctx.read(tail.least_rms.eps)
        step.decay_is_scaled = tail.decay_is_scaled
        step.averaging = self.rms.decay.weight(ctx.step, ctx.group)
        step.eps = ctx.read(self.rms.eps) or 0.0
        if self.average is not None and self.first is not None:
            step.first_weight = 1 - ctx.read(self.average.beta)
            first = self.first.operand(state, ctx, step.first_weight)
            end = Tail(None, (), None, False).read(ctx)
            if first is None or end is None:
                return False
            step.first, step.after = first, 1.0 if tail.applies_lr else end.scale
            step.decay *= step.after
        return True

    def _run_full(self, step: native.FactoredStep, ctx: Context) -> None:
        """Run the two passes of a vector, or of a tensor whose second moment is kept in full."""
        squares = torch.empty(2 * step.parts, dtype=torch.float64, device="cpu")
        step.squares = squares.data_ptr()
        step.alive = ctx, squares
        work = (ctypes.byref(step),), step.parts, 1, ctx.param.numel()
        ctx.guard.begin_writing()
        native.share(native.function("move_full"), *work)
        native.share(native.function("apply_full"), *work)


class FactoredRoom:
    """The room for sums and factors that a step needs while it runs, tied to the step; parts: how a matrix is cut."""

    def __init__(self, step: native.FactoredStep) -> None:
        matrices, rows, cols, parts = step.matrices, step.rows, step.cols, step.parts
        self.parts = parts
        count = matrices * (rows + cols) + (parts * cols if matrices == 1 else 0)
        self._numbers = torch.empty(count, dtype=torch.float32, device="cpu")
        self._squares = torch.empty(2 * parts, dtype=torch.float64, device="cpu")
        step.row_factor, step.squares = self._numbers.data_ptr(), self._squares.data_ptr()
        step.col_factor = step.row_factor + self._numbers.element_size() * matrices * rows
        step.col_parts = step.col_factor + self._numbers.element_size() * matrices * cols


def set_matrices(step: native.FactoredStep, moments: Sequence[Tensor], shape: Sequence[int], parts: int) -> None:
    """Tell a step how its parameter is cut, and where the means of rows and columns are. parts: of a single matrix."""
    *batch, rows, cols = shape
    matrices = math.prod(batch)
    step.matrices, step.rows, step.cols = matrices, rows, cols
    step.parts = parts if matrices == 1 else matrices
    step.row, step.col = moments[0].data_ptr(), moments[1].data_ptr()


def room_of(step: native.FactoredStep) -> int:
    """Return how many numbers of 8 bytes the sums and factors of a step take in a table."""
    one_matrix = step.parts * step.cols if step.matrices == 1 else 0
    return int(2 * step.parts + (step.matrices * (step.rows + step.cols) + one_matrix + 1) // 2)


def move_statistic(address: Any, ctx: Context) -> None:
    """Refuse sums of squares that are not finite, and move the row and column means towards them.

    Raises:
        NonFiniteGradientError: if a square, or the sum of all, is not finite. Nothing is written then.
    """
    if not native.function("finish_sums")(address) and not ctx.guard.checked:
        ctx.guard.check(torch.tensor(False, device="cpu"))
    ctx.guard.begin_writing()
    native.function("move_factored")(address)


def keeps_fp32(plan: ParamPlan, slot: str) -> bool:
    """Return whether every tensor of a slot is fp32."""
    return all(field.dtype == torch.float32 for field in plan.slots[slot].fields.values())


def _is_plain_average(average: momentum, tail: Tail) -> bool:
    """Whether the momentum averages finished updates, and leaves the decay out."""
    has_decay = any(isinstance(t, add_decayed_weights) for t in tail.factors)
    return not average.heavy_ball and not average.nesterov and (average.decoupled or not has_decay)
