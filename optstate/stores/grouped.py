"""A non-negative statistic kept as one mean per group of rows (Adam-mini, arXiv 2406.16793)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from optstate import kernels
from optstate.kernels import Noise, Product, Scalar
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores.base import Fields, Partial, Requests, Shape, Store, difference
from optstate.stores.full import Full
from optstate.stores.statistic import Statistic

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
        if spec.ndim == 0 or (spec.ndim == 1 and self._rows_per_group(spec.shape) == 1):
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

    def check_region(self, spec: ParamSpec) -> None:
        rows = self._rows_per_group(spec.shape)
        region = spec.region
        if (
            rows > 1
            and region is not None
            and region.parts[0] > 1
            and (not region.is_even(0) or region.shape[0] % rows)
        ):
            raise ValueError(
                f"{spec.name!r} is split among {region.parts[0]} devices within groups of {rows} rows: take a number "
                'of devices that keeps groups whole, or group it by "row"'
            )

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        if self.by == "tensor":
            return {"mean": FieldSpec((), spec.accumulator, ())}
        groups = spec.shape[0] // self._rows_per_group(spec.shape)
        return {"mean": FieldSpec((groups,), spec.accumulator, (0,))}

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        return self.factors(fields, shape)[0].expand(*shape)

    def factors(self, fields: Fields, shape: Shape) -> tuple[Tensor]:
        mean, ones = fields["mean"], (1,) * (len(shape) - 1)
        if self.by == "tensor":
            return (mean.view(1, *ones),)
        return (mean.repeat_interleave(self._rows_per_group(shape)).view(-1, *ones),)

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        if self.by == "tensor":
            return {"mean": value.mean()}
        return {"mean": value.reshape(value.shape[0] // self._rows_per_group(value.shape), -1).mean(-1)}

    def ema(self, statistic: Statistic, value: Product, weight: Scalar) -> Requests[None]:
        dense = kernels.evaluate(value)
        totals, _ = yield from self._totals(dense.sum(tuple(range(1, dense.ndim)), keepdim=True), dense.new_zeros(()))
        self._hold_ema(statistic, self._means(statistic, totals), weight)

    def ema_of_square(
        self, statistic: Statistic, value: Product, weight: Scalar, eps: float, minus: Tensor | None = None
    ) -> Requests[None]:
        value = value if minus is None else difference(value, minus)
        means = yield from self._means_of_square(statistic, value)
        self._hold_ema(statistic, means.add_(eps), statistic.guard.masked(weight))

    def add_square(self, statistic: Statistic, value: Product) -> Requests[None]:
        means = yield from self._means_of_square(statistic, value)
        statistic.hold_fields(mean=means.add_(statistic.fields["mean"]))

    def _means_of_square(self, statistic: Statistic, value: Product) -> Requests[Tensor]:
        """Mean of the squared value in every group; refuses what is not finite."""
        rows = kernels.sums_of_rows(value)
        if not statistic.guard.checked:
            totals, total = yield from self._totals(rows, rows.sum())
            statistic.guard.check(torch.isfinite(total))
        else:
            totals, _ = yield from self._totals(rows, rows.new_zeros(()))
        return self._means(statistic, totals)

    def _totals(self, rows: Tensor, everything: Tensor) -> Requests[tuple[Tensor, Tensor]]:
        """The sums of the local rows over all shards of the other dimensions, over all rows too for one group; and the
        sum of `everything`, 0-d, over all shards."""
        sums = rows.sum() if self.by == "tensor" else Partial(rows, tuple(range(1 - rows.ndim, 0)))
        totals, total = yield sums, everything
        return totals, total

    def _means(self, statistic: Statistic, totals: Tensor) -> Tensor:
        shape = statistic.spec.shape
        if self.by == "tensor":
            return totals / math.prod(shape)
        rows = self._rows_per_group(shape)
        return totals.view(-1, rows).sum(-1).div_(rows * math.prod(shape[1:]))

    @staticmethod
    def _hold_ema(statistic: Statistic, means: Tensor, weight: Scalar) -> None:
        statistic.hold_fields(mean=torch.lerp(statistic.fields["mean"], means, weight))

    def _rows_per_group(self, shape: Shape) -> int:
        """Rows per group; 0 for all of them."""
        return 1 if self.by == "row" else 0 if self.by == "tensor" else int(self.by)
