"""A transform that leaves out the elements of an update that the gradient disagrees with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optstate import kernels
from optstate.spec import ParamSpec
from optstate.stores import Requests
from optstate.updates.base import Context, State, Transform, Update

__all__ = ["cautious"]


@dataclass(frozen=True)
class cautious(Transform):
    """Keep the elements of the update that have the gradient's sign, enlarged by `numel / (kept + 1)`; zero the others.

    The gradient is that of the step, before any transform. Put the transform behind what makes the update and before
    the weight decay: an earlier decay is carried past as it is. Source: Liang et al. 2024 (arXiv 2411.16085,
    algorithm 1, with xi = 1).
    """

    elementwise: ClassVar[bool] = False

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 2

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        kept = (kernels.values(update) * ctx.grad > 0).to(ctx.spec.accumulator)
        count = yield kept.sum()
        return update.times(kept).rescaled(ctx.spec.numel / (count + 1))
