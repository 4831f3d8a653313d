"""What an optimizer knows of each of its parameters besides the state, and which of them it updates together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optstate import kernels
from optstate.distributed.placement import Placement, is_distributed
from optstate.kernels.backend import choose_backend
from optstate.optimizer.compiled_chain import ChainCompiler, CompiledChain
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps import Found, TableStep, find_whole_step
from optstate.optimizer.whole_steps.triton_tables import Joined
from optstate.spec import is_fake

__all__ = ["HELD_ELEMENTS", "SMALL_ELEMENTS", "Leaf", "batches", "replacements"]

SMALL_ELEMENTS = 1 << 16
"""The most elements of a parameter that is stepped together with others: a call costs little of a larger one."""

HELD_ELEMENTS = 1 << 19
"""The most elements of gradients that wait in a fused backward pass, so that small parameters are stepped together."""


@dataclass
class Leaf:
    """One parameter: its plan, the index of its group, and how it lies on several devices if it does.

    backend: what may make its steps; see `optstate.kernels.backend`. compiler: of steps that no whole step makes; None
    where they are not to be compiled. last_found: what `found_step` gave last, and for which plan and kind of device.
    small: what `is_small` gave last, and for which plan.
    """

    plan: ParamPlan
    group: int
    placement: Placement | None = None
    backend: str = "auto"
    compiler: ChainCompiler | None = None
    last_found: tuple[ParamPlan, str, Found] | None = None
    small: tuple[ParamPlan, bool] | None = None

    def found_step(self, device: torch.device) -> Found:
        """Return the whole step of the parameter on this kind of device, or why there is none."""
        if self.last_found is None or self.last_found[0] is not self.plan or self.last_found[1] != device.type:
            found = find_whole_step(self.plan, device, self.backend)
            if found.step is None and found.why and self.compiler is not None:
                found = CompiledChain.of(self.plan, self.compiler, found.why)
            self.last_found = self.plan, device.type, found
        return self.last_found[2]

    def use_backend(self, backend: str, compiler: ChainCompiler | None) -> None:
        """Have the steps made by another backend from now on, or by what a compiler makes of the chain."""
        self.backend, self.compiler, self.last_found, self.small = backend, compiler, None, None

    def is_small(self, param: Tensor) -> bool:
        """Return whether the parameter is one of those that are stepped together, each wholly on this device."""
        if self.small is None or self.small[0] is not self.plan:
            device = param.device
            step = self.found_step(device).step
            known = isinstance(step, TableStep) and step.kind is not None and self.placement is None
            known = known and not is_fake(param)
            small = known and 0 < self.plan.spec.numel <= SMALL_ELEMENTS
            self.small = self.plan, small and choose_backend(self.backend, device)[0] == "native"
        return self.small[1]

    def joined_step(self, device: torch.device) -> Joined | None:
        """Return how the parameter is stepped in launches that it shares with others; None if it is stepped alone."""
        return None if self.placement is not None else getattr(self.found_step(device).step, "joined", None)

    @property
    def name(self) -> str:
        """The parameter's name, or what stands for one."""
        return self.plan.spec.name

    @cached_property
    def is_split(self) -> bool:
        """Whether this device has only a part of it, so that all devices must step it together."""
        return self.plan.spec.region is not None

    @property
    def on_devices(self) -> Placement:
        """How a parameter that is split lies on its devices."""
        assert self.placement is not None
        return self.placement

    @cached_property
    def processes(self) -> tuple[Any, ...]:
        """The process groups whose devices have the other parts of it."""
        return () if self.placement is None else self.placement.groups()

    @property
    def held(self) -> int:
        """Number of elements of temporaries that a step keeps while it waits for sums.

        Those of the largest part count, so that all devices decide alike.
        """
        plan, spec = self.plan, self.plan.spec
        if spec.region is None or plan.knows_no_shape:
            return 0
        sums = [slot for slot in plan.slots.values() if slot.store.exact_sums]
        dense = plan.chain.temporaries(spec) or len(sums) < len(plan.slots)  # what is no sum is held until the end
        vectors = sum(plan.layouts[key].largest_part(spec) for slot in sums for key in slot.keys.values())
        return vectors + (-(-spec.numel // math.prod(spec.region.parts)) if dense else 0)


def batches(params: Iterable[tuple[Leaf, Tensor]]) -> Iterator[list[tuple[Leaf, Tensor]]]:
    """Yield parameters in order: large ones one by one, split ones in batches that share their rounds of sums.

    A batch is as large as it can be without much memory. Small ones come in batches, too, which share calls.
    """
    batch: list[tuple[Leaf, Tensor]] = []
    held, are_split = 0, False
    for each in params:
        leaf, param = each
        is_split = leaf.is_split
        is_alone = not is_split and not leaf.is_small(param)
        size = leaf.held if is_split else leaf.plan.spec.numel
        room = kernels.chunk_elements(param.device) if is_split else HELD_ELEMENTS
        if batch and (is_alone or is_split is not are_split or held + size > room):
            yield batch
            batch, held = [], 0
        if is_alone:
            yield [each]
            continue
        batch.append(each)
        held, are_split = held + size, is_split
    if batch:
        yield batch


def replacements(ours: Sequence[Tensor], now: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Return our parameters that were replaced by distributed ones of the same shape and dtype, with these.

    The result is empty if something else was put in the place of a parameter.
    """
    found = {}
    known = set(ours)
    for old, param in zip(ours, now, strict=False):
        if param is not old:
            fits = is_distributed(param) and param.shape == old.shape and param.dtype == old.dtype
            if not fits or param in known:
                return {}
            found[old] = param
    return found
