"""Whole steps: kernels that do all that a chain does to a parameter, found when the parameter is planned.

Chains that no whole step knows run on the transforms, with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from optstate.kernels.backend import choose_backend
from optstate.optimizer.plan import TRANSFORMS, ParamPlan
from optstate.optimizer.whole_steps.base import WholeStep
from optstate.optimizer.whole_steps.confidence import CompiledConfidence
from optstate.optimizer.whole_steps.elementwise import CompiledElementwise
from optstate.optimizer.whole_steps.factored import CompiledFactored
from optstate.optimizer.whole_steps.fused_by_torch import FusedByTorch
from optstate.optimizer.whole_steps.maxima import CompiledMaxima
from optstate.optimizer.whole_steps.triton_confidence import TritonConfidence
from optstate.optimizer.whole_steps.triton_elementwise import TritonElementwise
from optstate.optimizer.whole_steps.triton_factored import TritonFactored
from optstate.optimizer.whole_steps.triton_maxima import TritonMaxima
from optstate.spec import can_be_stepped

__all__ = ["COMPILED", "FOR_BACKEND", "IN_TRITON", "Found", "FusedByTorch", "WholeStep", "find_whole_step"]


COMPILED = (CompiledFactored, CompiledElementwise, CompiledConfidence, CompiledMaxima)
"""Every compiled step; the first that knows a chain makes its steps."""

IN_TRITON = (TritonFactored, TritonElementwise, TritonConfidence, TritonMaxima)
"""Every step in Triton, in the same way."""

FOR_BACKEND: dict[str, tuple[Any, ...]] = {
    "eager": (FusedByTorch,),
    "native": (FusedByTorch, *COMPILED),
    "triton": (*IN_TRITON, FusedByTorch),
}
"""Backend -> what makes steps; PyTorch's own step cannot be made for several parameters with a flag for each."""


@dataclass(frozen=True)
class Found:
    """What makes the step of a parameter: a whole step, or the transforms, and why."""

    step: WholeStep | None
    why: str = ""

    @property
    def words(self) -> str:
        """What the plan says of it."""
        if self.step is not None:
            return self.step.words
        return f"{TRANSFORMS} ({self.why})" if self.why else ""


def find_whole_step(plan: ParamPlan, device: torch.device, backend: str = "auto") -> Found:
    """Return the whole step for a parameter on this kind of device, or why its transforms are run instead.

    Args:
        plan: of the parameter.
        device: where the parameter is.
        backend: one of `optstate.kernels.backend.BACKENDS`.
    """
    if not can_be_stepped(plan.spec.dtype):
        return Found(None)
    if not _is_known(plan):
        return Found(None, "a part of this chain is not the library's own")
    chosen, why = choose_backend(backend, device)
    step: WholeStep | None
    for kind in FOR_BACKEND[chosen]:
        step = kind.of(plan)
        if step is not None:
            return Found(step)
    if chosen == "eager":
        return Found(None, why)
    return Found(None, "no whole step is written for this chain")


def _is_known(plan: ParamPlan) -> bool:
    """Whether every part of a plan is of a class that a whole step may know, and no subclass that does otherwise."""
    parts = (*plan.chain.transforms, *(slot.store for slot in plan.slots.values()), plan.weights)
    return all(type(part).__module__.partition(".")[0] == "optstate" for part in parts)
