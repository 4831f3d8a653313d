"""Whole steps: kernels that do all that a chain does to a parameter, found when the parameter is planned.

Chains that no whole step knows run on the transforms, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optstate.kernels.backend import (
    asked_in_words,
    choose_backend,
    fastest_backend,
    named_backend,
    require_device,
    warn_if_slow,
)
from optstate.kernels.native import NUMBERS
from optstate.optimizer.plan import PRIMITIVES, TRANSFORMS, ParamPlan
from optstate.optimizer.whole_steps.base import TableStep, WholeStep
from optstate.optimizer.whole_steps.by_bitsandbytes import SteppedByBitsandbytes, keeps_small_moments
from optstate.optimizer.whole_steps.confidence import CompiledConfidence
from optstate.optimizer.whole_steps.elementwise import CompiledElementwise
from optstate.optimizer.whole_steps.factored import CompiledFactored
from optstate.optimizer.whole_steps.fused_by_torch import FusedByTorch
from optstate.optimizer.whole_steps.maxima import CompiledMaxima
from optstate.optimizer.whole_steps.triton_confidence import TritonConfidence
from optstate.optimizer.whole_steps.triton_elementwise import TritonElementwise
from optstate.optimizer.whole_steps.triton_factored import TritonFactored
from optstate.optimizer.whole_steps.triton_maxima import TritonMaxima
from optstate.spec import can_be_stepped, is_fake

__all__ = [
    "COMPILED",
    "FOR_BACKEND",
    "IN_TRITON",
    "Found",
    "FusedByTorch",
    "TableStep",
    "WholeStep",
    "find_whole_step",
    "require_backend",
]


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
    """What makes the step of a parameter: a whole step, or the transforms, and why; whether their loops are C's."""

    step: WholeStep | None
    why: str = ""
    is_compiled: bool = False

    @property
    def words(self) -> str:
        """What the plan says of it."""
        if self.step is not None:
            return self.step.words
        return f"{PRIMITIVES if self.is_compiled else TRANSFORMS} ({self.why})" if self.why else ""


def find_whole_step(plan: ParamPlan, device: torch.device, backend: str = "auto") -> Found:
    """Return the whole step for a parameter on this kind of device, or why its transforms are run instead.

    Args:
        plan: of the parameter.
        device: where the parameter is.
        backend: one of `optstate.kernels.backend.BACKENDS`.

    Raises:
        ValueError: if bitsandbytes was asked for and cannot step this parameter, or the environment names no backend.
    """
    if not can_be_stepped(plan.spec.dtype):
        return Found(None)
    if named_backend(backend) == "bitsandbytes" and device.type != "meta":
        if not keeps_small_moments(plan):
            return _by_bitsandbytes(plan, device, backend)
        backend = fastest_backend(device)
    chosen, why_not = choose_backend(backend, device)
    is_compiled = chosen == "native" and plan.spec.dtype in NUMBERS
    if not _is_known(plan):
        return Found(None, "a part of this chain is not the library's own", is_compiled)
    step: WholeStep | None
    for kind in FOR_BACKEND[chosen]:
        step = kind.of(plan)
        if step is not None:
            return Found(step)
    if chosen == "eager":
        return Found(None, why_not)
    return Found(None, _why_none(plan), is_compiled)


def _why_none(plan: ParamPlan) -> str:
    """Say why no whole step was found for a chain of the library's own parts."""
    if plan.spec.region is not None:
        return "no whole step is written for this chain on a part of a parameter"
    return "no whole step is written for this chain"


def require_backend(params: Iterable[tuple[ParamPlan, Tensor]], backend: str) -> None:
    """Check that a backend that was asked for by name steps parameters; if none was, say once where steps are slow.

    Args:
        params: plans and parameters. Those that are frozen or without values are not looked at.
        backend: as the optimizer was told.

    Raises:
        ValueError: if it does not, or if the environment names no backend.
    """
    named = named_backend(backend)
    if named == "eager":
        return
    real = [
        (p, param.device) for p, param in params if p.trainable and param.device.type != "meta" and not is_fake(param)
    ]
    for device in dict.fromkeys(device for _, device in real):
        if named == "auto":
            warn_if_slow(device)
        else:
            require_device(backend, device)
    for plan, device in real if named == "bitsandbytes" else ():
        find_whole_step(plan, device, backend)


def _by_bitsandbytes(plan: ParamPlan, device: torch.device, backend: str) -> Found:
    """Return the step of bitsandbytes, which was asked for; none for a parameter that is frozen and does not fit.

    Raises:
        ValueError: if it cannot step the parameter.
    """
    require_device(backend, device)
    step = SteppedByBitsandbytes.of(plan)
    if not isinstance(step, str):
        return Found(step)
    if not plan.trainable:
        return Found(None, step)
    raise ValueError(f"{asked_in_words(backend)} cannot step {plan.spec.name!r}: {step}")


def _is_known(plan: ParamPlan) -> bool:
    """Whether every part of a plan is of a class that a whole step may know, and no subclass that does otherwise."""
    parts = (*plan.chain.transforms, *(slot.store for slot in plan.slots.values()), plan.weights)
    return all(type(part).__module__.partition(".")[0] == "optstate" for part in parts)
