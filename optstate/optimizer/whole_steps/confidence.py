"""Compiled steps of CAME: updates averaged, and divided by how far they stray from their average."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from optstate.kernels import native
from optstate.kernels.native import StepKind
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps.factored import FactoredRoom, keeps_fp32, move_statistic, room_of, set_matrices
from optstate.optimizer.whole_steps.operands import WrittenWeight, are_as_planned, gradient, takes
from optstate.optimizer.whole_steps.tail import Tail
from optstate.stores import Factored, Full
from optstate.updates import Context, clip_by_rms, scale_by_confidence, scale_by_rms

__all__ = ["CompiledConfidence", "ConfidenceChain"]


class ConfidenceChain(NamedTuple):
    """The transforms of CAME's chain; see `CompiledConfidence`."""

    rms: scale_by_rms
    clip: clip_by_rms | None
    confidence: scale_by_confidence
    tail: Tail

    @staticmethod
    def of(plan: ParamPlan) -> ConfidenceChain | None:
        """Return the parts of a plan's chain; None if the chain is another one."""
        rest = list(plan.chain.transforms)
        rms = rest.pop(0) if rest else None
        clip = rest.pop(0) if rest and isinstance(rest[0], clip_by_rms) else None
        confidence = rest.pop(0) if rest else None
        tail = Tail.of(rest)
        if not isinstance(rms, scale_by_rms) or rms.floor is not None or tail is None:
            return None
        if not isinstance(confidence, scale_by_confidence) or tail.threshold is not None or tail.least_rms is not None:
            return None
        return ConfidenceChain(rms, clip, confidence, tail)  # type: ignore[arg-type]


_Pair = native.FactoredStep * 2


@dataclass(frozen=True)
class CompiledConfidence:
    """Four passes: sums of the gradient, of the update, of its distance from the average, and the write.

    Attributes:
        rms: the transform that divides by the second moment's root.
        clip: of the update's root mean square, or None.
        confidence: the transform that averages and divides once more.
        tail: what comes after it.
    """

    plan: ParamPlan
    rms: scale_by_rms
    clip: clip_by_rms | None
    confidence: scale_by_confidence
    tail: Tail
    weight: WrittenWeight

    checks_gradient: ClassVar[bool] = True

    @staticmethod
    def of(plan: ParamPlan) -> CompiledConfidence | None:
        """Return the step of a plan; None if its chain, a store or its way of writing weights is not known."""
        weight = WrittenWeight.of(plan)
        if weight is None or not takes(plan.spec) or plan.spec.region is not None or plan.spec.ndim < 2:
            return None
        chain = ConfidenceChain.of(plan)
        if chain is None:
            return None
        rms, clip, confidence, tail = chain
        stores = {name: type(slot.store) for name, slot in plan.slots.items()}
        if stores != {rms.slot: Factored, "exp_avg": Full, "exp_avg_res": Factored}:
            return None
        if not all(keeps_fp32(plan, slot) for slot in plan.slots):
            return None
        return CompiledConfidence(plan, rms, clip, confidence, tail, weight)

    @property
    def words(self) -> str:
        """What the plan says of the step."""
        return "compiled"

    @property
    def passes(self) -> int:
        """Passes over the parameter."""
        return 4

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written: the gradient and the average three times, the parameter and the rest each way."""
        spec = self.plan.spec
        average = self.plan.slots["exp_avg"].nbytes
        return 5 * spec.local_numel * spec.dtype.itemsize + 2 * self.plan.nbytes + average

    @property
    def kind(self) -> StepKind:
        """What a table of steps has in the place of the parameter."""
        return StepKind.CONFIDENCE

    def fill(self, state: Mapping[str, Any], ctx: Context) -> ctypes.Array[native.FactoredStep] | None:
        """Return the structures of a step, of the second moment and of the distances; see `TableStep.fill`."""
        end = self.tail.read(ctx)
        grad, weight = gradient(ctx, None), self.weight.operand(state, ctx)
        first, second = self._moments(state, self.rms.slot), self._moments(state, "exp_avg_res")
        (average,) = self._moments(state, "exp_avg")
        if end is None or grad is None or weight is None or ctx.guard.deferred:
            return None
        slots = self.plan.slots
        if not are_as_planned(slots["exp_avg"], [average]) or not are_as_planned(slots[self.rms.slot], first):
            return None
        if not are_as_planned(slots["exp_avg_res"], second):
            return None
        threshold = None if self.clip is None else ctx.read(self.clip.threshold)
        beta1, beta3 = map(ctx.read, self.confidence.betas)
        step = native.FactoredStep(weight=weight, grad=grad, step=end.scale, decay=end.decay, least_rms=-1.0)
        step.threshold = float("inf") if threshold is None else threshold
        step.averaging = self.rms.decay.weight(ctx.step, ctx.group)
        step.eps, step.first_weight = ctx.read(self.rms.eps) or 0.0, 1 - beta1
        step.first = native.MomentOperand(average.data_ptr(), kind=native.MomentKind.FULL32)
        residual = native.FactoredStep(averaging=1 - beta3, eps=ctx.read(self.confidence.eps))
        for each, moments in ((step, first), (residual, second)):
            set_matrices(each, moments, ctx.param.shape, native.parts_of(*ctx.param.shape[-2:]))
        return _Pair(step, residual)

    def largest(self, ctx: Context) -> float:
        """Return the largest magnitude of a gradient's element that is not refused: the sums show what is infinite."""
        return -1.0

    def room(self, structure: ctypes.Array[native.FactoredStep]) -> int:
        """Return how many numbers of 8 bytes the sums of a step take."""
        return room_of(structure[0]) + room_of(structure[1])

    def with_names(self, structure: ctypes.Array[native.FactoredStep], name: str) -> None:
        """Put the keys of random bits into a structure; see `TableStep.with_names`."""
        structure[0].weight.key = self.weight.name_key(name)

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`."""
        structures = self.fill(state, ctx)
        if structures is None:
            return False
        self._run(structures[0], structures[1], ctx)
        return True

    def _moments(self, state: Mapping[str, Any], slot: str) -> list[Tensor]:
        return [state[key] for key in self.plan.slots[slot].keys.values()]

    @staticmethod
    def _run(step: native.FactoredStep, residual: native.FactoredStep, ctx: Context) -> None:
        rooms = FactoredRoom(step), FactoredRoom(residual)
        address, other = ctypes.byref(step), ctypes.byref(residual)
        step.alive = residual.alive = ctx, rooms
        work = rooms[0].parts, 1, ctx.param.numel()  # both statistics are of one shape, and cut alike
        native.share(native.function("sum_factored"), (address,), *work)
        move_statistic(address, ctx)
        if step.threshold < float("inf"):
            native.share(native.function("measure_factored"), (address,), *work)
        native.share(native.function("average_updates"), (address, other), *work)
        native.function("finish_sums")(other)
        native.function("move_factored")(other)
        native.share(native.function("apply_average"), (address, other), *work)
