"""A non-negative statistic kept as row and column means (Shazeer and Stern 2018, section 3; AdaLomo, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from optstate import kernels
from optstate.kernels import Product, Scalar
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores.base import Fields, Partial, Requests, Store, square_of
from optstate.stores.full import Full
from optstate.stores.statistic import Statistic

__all__ = ["Factored"]


@dataclass(frozen=True)
class Factored(Store):
    """The rank-1 non-negative factorisation `row x col / mean(row)` of the last two dimensions, in fp32.

    row `[..., m]` holds the means over the last dimension, col `[..., n]` those over the one before; leading
    dimensions (experts, kernel positions) each have their own. Both are averaged over time exactly, as means are
    linear. Bytes: `4 (m + n)` per matrix. Relative error of an element: unbounded in general (it is a rank-1
    model), none where the statistic has rank one.

    Parameters with fewer than two dimensions keep the statistic in full.

    Raises:
        ValueError: when a chain puts a statistic into it that can be negative.
    """

    elementwise = False

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        if spec.ndim < 2:
            return Full(), f"{spec.ndim}-D: nothing to factor, kept in full"
        return self, ""

    def check(self, signed: bool, smallest_weight: float) -> None:
        if signed:
            raise ValueError(
                "Factored() holds row and column means of a statistic that is never negative, such as a second "
                "moment; keep a first moment or momentum in Full()"
            )

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        *batch, rows, cols = spec.shape
        dims = tuple(range(spec.ndim))
        return {
            "row": FieldSpec((*batch, rows), spec.accumulator, dims[:-1]),
            "col": FieldSpec((*batch, cols), spec.accumulator, (*dims[:-2], dims[-1])),
        }

    def read(self, fields: Fields) -> Tensor:
        row, col = fields["row"], fields["col"]
        share = row / row.mean(-1, keepdim=True)
        return rearrange(share, "... m -> ... m 1") * rearrange(col, "... n -> ... 1 n")

    def write(self, fields: Fields, value: Tensor) -> None:
        fields["row"].copy_(value.mean(-1))
        fields["col"].copy_(value.mean(-2))

    def ema(self, statistic: Statistic, value: Product, weight: Scalar) -> Requests[None]:
        dense = kernels.evaluate(value)
        rows, cols = yield Partial(dense.sum(-1, keepdim=True), -1), Partial(dense.sum(-2, keepdim=True), -2)
        self._hold(statistic, rows, cols, weight, eps=0.0)

    def ema_of_square(self, statistic: Statistic, value: Product, weight: Scalar, eps: float) -> Requests[None]:
        rows, cols = kernels.sums(value)
        rows, cols = yield Partial(rows, -1), Partial(cols, -2)
        guard = statistic.guard
        if not guard.checked:  # squares that overflow count as infinite: they would never leave the averages
            totals = rows if statistic.spec.is_sharded(-1) else cols  # whole on every device, so that all agree
            guard.check(torch.isfinite(totals.sum()))
            weight = guard.masked(weight)
        self._hold(statistic, rows, cols, weight, eps)

    def inverse_root(self, statistic: Statistic, floor: float) -> tuple[Tensor, ...]:
        row, col = statistic.current["row"], statistic.current["col"]
        # Both means are the statistic's overall mean, so take the one whose vector is whole on this shard.
        mean = (col if statistic.spec.is_sharded(-2) else row).mean(-1, keepdim=True)
        if floor > 0:  # a bound on the product does not factor: this needs the full tensor
            share = rearrange(row / mean.clamp(min=floor), "... m -> ... m 1")
            return ((share * rearrange(col, "... n -> ... 1 n")).clamp_(min=square_of(floor, col)).rsqrt_(),)
        return (
            # Never the product of both first: two values of 1e-30 underflow.
            (row / mean).rsqrt_().unsqueeze(-1),
            col.rsqrt().unsqueeze(-2),
        )

    @staticmethod
    def _hold(statistic: Statistic, rows: Tensor, cols: Tensor, weight: Scalar, eps: float) -> None:
        """Average the totals `[..., m, 1]` and `[..., 1, n]` into the means, by global counts."""
        fields, (m, n) = statistic.fields, statistic.spec.shape[-2:]
        row_means = rows.squeeze(-1).div_(n).add_(eps)
        col_means = cols.squeeze(-2).div_(m).add_(eps)
        statistic.hold_fields(
            row=torch.lerp(fields["row"], row_means, weight), col=torch.lerp(fields["col"], col_means, weight)
        )
