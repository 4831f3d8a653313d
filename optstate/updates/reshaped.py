"""A transform around a chain that works on the gradient as a nearly square matrix (SMMF)."""

from __future__ import annotations

from dataclasses import dataclass

from optstate import kernels
from optstate.spec import ParamSpec
from optstate.store_layouts import square_shape
from optstate.stores import Requests, Whole
from optstate.updates.around import Around
from optstate.updates.base import Context, State, Update

__all__ = ["as_square"]


@dataclass(frozen=True)
class as_square(Around):
    """Run a chain on the gradient as the matrix, of as many elements, whose sides differ least; rows are the longer.

    Rows and columns of a square are as few numbers as those of any shape can be, and vectors have some as well. A
    parameter that is split is gathered, and every device keeps all statistics of the inner chain. Source: SMMF (arXiv
    2412.08894, algorithm 2).

    Args:
        inner: the chain that sees the matrix.
    """

    def space(self, spec: ParamSpec) -> ParamSpec:
        return spec.like(square_shape(spec.numel), (None, None))

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        whole = yield Whole(update.values(ctx), ctx.spec)
        step = yield from self.inside(whole.reshape(self.space(ctx.spec).shape), state, ctx)
        made = kernels.multiply_out(step).view(ctx.spec.shape)
        return Update(ctx.spec.part(made).contiguous(), finite=update.finite)
