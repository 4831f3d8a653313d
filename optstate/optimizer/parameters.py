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
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps import Found, find_whole_step
from optstate.optimizer.whole_steps.triton_tables import Joined

__all__ = ["Leaf", "batches", "replacements"]


@dataclass
class Leaf:
    """One parameter: its plan, the index of its group, and how it lies on several devices if it does.

    backend: what may make its steps; see `optstate.kernels.backend`.
    """

    plan: ParamPlan
    group: int
    placement: Placement | None = None
    backend: str = "auto"
    last_found: tuple[ParamPlan, str, Found] | None = None

    def found_step(self, device: torch.device) -> Found:
        """Return the whole step of the parameter on this kind of device, or why there is none."""
        if self.last_found is None or self.last_found[0] is not self.plan or self.last_found[1] != device.type:
            self.last_found = self.plan, device.type, find_whole_step(self.plan, device, self.backend)
        return self.last_found[2]

    def joined_step(self, device: torch.device) -> Joined | None:
        """Return how the parameter is stepped in launches that it shares with others; None if it is stepped alone."""
        return None if self.placement is not None else getattr(self.found_step(device).step, "joined", None)

    def use_backend(self, backend: str) -> None:
        """Have the steps made by another backend from now on."""
        self.backend, self.last_found = backend, None

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


def batches(params: Iterable[tuple[Tensor, Leaf]]) -> Iterator[list[Tensor]]:
    """Yield parameters in order: whole ones one by one, split ones in batches that share their rounds of sums.

    A batch is as large as it can be without much memory.
    """
    batch: list[Tensor] = []
    held = 0
    for param, leaf in params:
        if batch and (not leaf.is_split or held + leaf.held > kernels.chunk_elements(param.device)):
            yield batch
            batch, held = [], 0
        if leaf.is_split:
            batch.append(param)
            held += leaf.held
        else:
            yield [param]
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
