"""Store: one mean per group of rows of a non-negative statistic (Adam-mini, arXiv 2406.16793)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from optstate import kernels, store_layouts
from optstate.kernels import Noise, Product, Scalar
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores.base import Fields, Shape, Statistic, Store, subtract
from optstate.stores.full import Full
from optstate.stores.requests import Partial, Requests

__all__ = ["Grouped"]


@dataclass(frozen=True)
class Grouped(Store):
    """The mean over groups of consecutive rows, where a row is everything at one index of the first dimension.

    by: "row" for one mean per row (an output neuron, a token of an embedding); "head" for one per attention head,
        `head_size` rows as the param group declares it; "tensor" for a single one; or the number of rows per group.

    Bytes: `4 * groups`. Relative error of an element: unbounded in general, none where groups are constant. The mean
    is averaged over time exactly, as means are linear. A vector's rows are its elements: "row" keeps it in full.

    Raises:
        ValueError: for another `by`; when a chain puts a statistic into it that can be negative; and, when an
            optimizer is built, where the rows of a parameter are not whole groups or its head size is not declared.
    """

    by: str | int

    elementwise: ClassVar[bool] = False
    exact_sums: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number = isinstance(self.by, int) and not isinstance(self.by, bool) and self.by >= 1
        if not number and self.by not in ("row", "head", "tensor"):
            raise ValueError(f'Grouped(by={self.by!r}): give "row", "head", "tensor" or a number of rows')

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        if self.by == "head":
            if spec.head_size is None:
                raise ValueError(
                    f'{spec.name!r} is to be grouped by head, but its head size is not known: give "head_size" in its '
                    "param group, or take the groups from optstate.declare_roles(model)"
                )
            return replace(self, by=spec.head_size).resolve(spec, signed)
        if store_layouts.is_group_each(spec.shape, self.by):
            return Full(), f"{spec.ndim}-D: every element is a group, kept in full"
        rows = self._rows_per_group(spec.shape)
        if rows and spec.shape[0] % rows:
            what = "head size" if spec.head_size == rows else "group size"
            raise ValueError(
                f"{spec.name!r} has {spec.shape[0]} rows, which its {what} {rows} does not divide: correct the "
                'declared "head_size", or group it by "row"'
            )
        return self, ""

    def check(self, signed: bool, smallest_weight: float) -> None:
        if signed:
            raise ValueError(
                f"{self} holds means of a statistic that is never negative, such as a second moment; keep a first "
                "moment or momentum in Full(), Block8() or Block4()"
            )

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return FieldSpec.of(spec, store_layouts.group_means(spec.shape, self.by, self._is_cut(spec)))

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        return self.factors(fields, shape)[0].expand(*shape)

    def factors(self, fields: Fields, shape: Shape) -> tuple[Tensor]:
        mean, ones = fields["mean"], (1,) * (len(shape) - 1)
        if self.by == "tensor":
            return (mean.view(1, *ones),)
        return (mean.repeat_interleave(self._rows_per_group(shape)).view(-1, *ones),)

    def factors_here(self, statistic: Statistic) -> tuple[Tensor, ...]:
        (means,) = self.factors(statistic.current, statistic.shape)
        if self._is_cut(statistic.spec):
            assert statistic.spec.region is not None
            means = means[statistic.spec.region.index[0]]
        return (means,)

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        if self.by == "tensor":
            return {"mean": value.mean()}
        return {"mean": value.reshape(value.shape[0] // self._rows_per_group(value.shape), -1).mean(-1)}

    def ema(self, statistic: Statistic, value: Product, weight: Scalar) -> Requests[None]:
        dense = kernels.multiply_out(value)
        totals, _ = yield from self._totals(
            statistic, dense.sum(tuple(range(1, dense.ndim)), keepdim=True), dense.new_zeros(())
        )
        self._hold_ema(statistic, self._means(statistic, totals), weight)

    def ema_of_square(
        self, statistic: Statistic, value: Product, weight: Scalar, eps: float, minus: Tensor | None = None
    ) -> Requests[None]:
        value = value if minus is None else subtract(value, minus)
        means = yield from self._means_of_square(statistic, value)
        self._hold_ema(statistic, means.add_(eps), statistic.guard.masked(weight))

    def add_square(self, statistic: Statistic, value: Product) -> Requests[None]:
        means = yield from self._means_of_square(statistic, value)
        statistic.hold_fields(mean=means.add_(statistic.current["mean"]))

    def _means_of_square(self, statistic: Statistic, value: Product) -> Requests[Tensor]:
        """Mean of the squared value in every group; refuses what is not finite."""
        rows = kernels.sums_of_rows(value)
        if not statistic.guard.checked:
            totals, total = yield from self._totals(statistic, rows, rows.sum())
            statistic.guard.check(torch.isfinite(total))
        else:
            totals, _ = yield from self._totals(statistic, rows, rows.new_zeros(()))
        return self._means(statistic, totals)

    def _totals(self, statistic: Statistic, rows: Tensor, everything: Tensor) -> Requests[tuple[Tensor, Tensor]]:
        """Ask for the sums over the devices that hold parts of the same rows, and for the sum of `everything`.

        Args:
            statistic: of the parameter, of which this device may have a part.
            rows: sums of the local rows.
            everything: 0-d.

        Returns:
            The sums of the local rows over all shards of the other dimensions, or of all rows where groups are cut; and
            the sum of `everything` over all shards.
        """
        spec = statistic.spec
        if self.by == "tensor":
            sums: Tensor | Partial = rows.sum()
        elif self._is_cut(spec):
            assert spec.region is not None
            sums = rows.new_zeros((spec.shape[0], *rows.shape[1:]))
            sums[spec.region.index[0]] = rows
        else:
            sums = Partial(rows, tuple(range(1 - rows.ndim, 0)))
        totals, total = yield sums, everything
        return totals, total

    def _means(self, statistic: Statistic, totals: Tensor) -> Tensor:
        shape = statistic.spec.shape
        if self.by == "tensor":
            return totals / math.prod(shape)
        rows = self._rows_per_group(shape)
        return totals.view(-1, rows).sum(-1).div_(rows * math.prod(shape[1:]))

    def _is_cut(self, spec: ParamSpec) -> bool:
        """Whether a group's rows may be on several devices, so that every device keeps the means of all groups."""
        rows, region = self._rows_per_group(spec.shape), spec.region
        if rows <= 1 or region is None or region.parts[0] == 1:
            return False
        return -(-region.whole[0] // region.parts[0]) % rows != 0

    @staticmethod
    def _hold_ema(statistic: Statistic, means: Tensor, weight: Scalar) -> None:
        statistic.hold_fields(mean=torch.lerp(statistic.current["mean"], means, weight))

    def _rows_per_group(self, shape: Shape) -> int:
        """Rows per group; 0 for all of them."""
        return 1 if self.by == "row" else 0 if self.by == "tensor" else int(self.by)
