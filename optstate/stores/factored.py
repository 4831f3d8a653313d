"""Store: row and column means of a non-negative statistic (Shazeer and Stern 2018, section 3; AdaLomo, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from optstate import kernels, store_layouts
from optstate.kernels import Noise, Product, Scalar
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores.base import Fields, Shape, Statistic, Store, square_of
from optstate.stores.full import Full
from optstate.stores.requests import Partial, Requests

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

    elementwise: ClassVar[bool] = False
    exact_sums: ClassVar[bool] = True

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        if spec.ndim < 2:
            return Full(), f"{spec.ndim}-D: nothing to factor, kept in full"
        return self, ""

    def check(self, signed: bool, smallest_weight: float) -> None:
        if signed:
            raise ValueError(
                "Factored() holds row and column means of a statistic that is never negative, such as a second "
                "moment; keep a first moment or momentum in Full(), Block8() or Block4()"
            )

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return FieldSpec.of(spec, store_layouts.factored_layouts(spec.shape))

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        share, col = self.factors(fields, shape)
        return share * col

    def factors(self, fields: Fields, shape: Shape) -> tuple[Tensor, Tensor]:
        return self._product(fields["row"], fields["col"], fields["row"].mean(-1, keepdim=True))

    def factors_here(self, statistic: Statistic) -> tuple[Tensor, Tensor]:
        row, col = statistic.current["row"], statistic.current["col"]
        return self._product(row, col, self._overall_mean(statistic))

    @staticmethod
    def _overall_mean(statistic: Statistic) -> Tensor:
        """Return the mean of every matrix, `[..., 1]`, from a vector of means that is whole on this device."""
        if statistic.spec.region is None:
            return statistic.current["row"].mean(-1, keepdim=True)
        if _is_split_both_ways(statistic.spec):
            if statistic.overall is None:
                raise RuntimeError(
                    f"the factored statistic of {statistic.spec.name!r} is split along rows and columns: it can be "
                    "read only after it was moved in the same step"
                )
            return statistic.overall
        whole = statistic.current["col" if statistic.spec.is_sharded(-2) else "row"]
        return whole.mean(-1, keepdim=True)

    @staticmethod
    def _product(row: Tensor, col: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        mean = mean.clamp(min=torch.finfo(row.dtype).tiny)  # all zeros: 0, not 0 / 0
        return rearrange(row / mean, "... m -> ... m 1"), rearrange(col, "... n -> ... 1 n")

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        return {"row": value.mean(-1), "col": value.mean(-2)}

    def encode_part(self, statistic: Statistic, value: Tensor) -> Requests[Fields]:
        if statistic.spec.region is None:
            return self.encode(value, statistic.noise, statistic.weight)
        rows, cols = yield Partial(value.sum(-1, keepdim=True), -1), Partial(value.sum(-2, keepdim=True), -2)
        row, col = self._means(statistic, rows, cols)
        yield from self._note_overall(statistic, row)
        return {"row": row, "col": col}

    def ema(self, statistic: Statistic, value: Product, weight: Scalar) -> Requests[None]:
        dense = kernels.multiply_out(value)
        rows, cols = yield Partial(dense.sum(-1, keepdim=True), -1), Partial(dense.sum(-2, keepdim=True), -2)
        row, col = self._means(statistic, rows, cols)
        fields = statistic.current
        yield from self._hold(statistic, torch.lerp(fields["row"], row, weight), torch.lerp(fields["col"], col, weight))

    def ema_of_square(
        self, statistic: Statistic, value: Product, weight: Scalar, eps: float, minus: Tensor | None = None
    ) -> Requests[None]:
        rows, cols = kernels.sums(value) if minus is None else kernels.sums_of_difference(value, minus)
        row, col = yield from self._means_of_square(statistic, rows, cols)
        fields, guard = statistic.current, statistic.guard
        if guard.finite is not None:
            weight = guard.masked(weight)
        row, col = torch.lerp(fields["row"], row.add_(eps), weight), torch.lerp(fields["col"], col.add_(eps), weight)
        yield from self._hold(statistic, row, col)

    def add_square(self, statistic: Statistic, value: Product) -> Requests[None]:
        row, col = yield from self._means_of_square(statistic, *kernels.sums(value))
        fields = statistic.current
        yield from self._hold(statistic, row.add_(fields["row"]), col.add_(fields["col"]))

    def inverse_root(self, statistic: Statistic, floor: float) -> tuple[Tensor, ...]:
        current = statistic.current
        row, col, mean = current["row"], current["col"], self._overall_mean(statistic)
        if floor > 0:  # a bound on the product does not factor: this needs the full tensor
            share = rearrange(row / mean.clamp(min=floor), "... m -> ... m 1")
            return ((share * rearrange(col, "... n -> ... 1 n")).clamp_(min=square_of(floor, col)).rsqrt_(),)
        return (
            # Never the product of both first: two values of 1e-30 underflow.
            (row / mean).rsqrt_().unsqueeze(-1),
            col.rsqrt().unsqueeze(-2),
        )

    def _means_of_square(self, statistic: Statistic, rows: Tensor, cols: Tensor) -> Requests[tuple[Tensor, Tensor]]:
        """Turn local sums of squares into means over the whole parameter; refuse squares that are not finite."""
        guard, split = statistic.guard, statistic.spec.region is not None
        if guard.checked:
            if split:
                rows, cols = yield Partial(rows, -1), Partial(cols, -2)
        else:  # squares that overflow count as infinite: they would never leave the averages
            total = cols.sum()
            if split:  # the sum over everything is the same on every device, so that all agree
                rows, cols, total = yield Partial(rows, -1), Partial(cols, -2), total
            guard.check(torch.isfinite(total))
        return self._means(statistic, rows, cols)

    @staticmethod
    def _means(statistic: Statistic, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        """Means from the totals `[..., m, 1]` and `[..., 1, n]`, by global counts."""
        m, n = statistic.spec.shape[-2:]
        return rows.squeeze(-1).div_(n), cols.squeeze(-2).div_(m)

    @classmethod
    def _hold(cls, statistic: Statistic, row: Tensor, col: Tensor) -> Requests[None]:
        statistic.hold_fields(row=row, col=col)
        yield from cls._note_overall(statistic, row)

    @staticmethod
    def _note_overall(statistic: Statistic, row: Tensor) -> Requests[None]:
        """Keep the mean of every matrix where no device has a whole vector to take it of."""
        if _is_split_both_ways(statistic.spec):
            total = yield Partial(row.sum(-1, keepdim=True), -2)
            statistic.overall = total / statistic.spec.shape[-2]


def _is_split_both_ways(spec: ParamSpec) -> bool:
    """Whether no device has the whole of either vector."""
    return spec.region is not None and spec.is_sharded(-1) and spec.is_sharded(-2)
