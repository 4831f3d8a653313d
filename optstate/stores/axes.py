"""One number per index of every dimension, and the statistic they bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from optstate import store_layouts
from optstate.kernels import Noise
from optstate.spec import FieldSpec, ParamSpec
from optstate.store_layouts import axis_names
from optstate.stores.base import Fields, Shape, Statistic, Store
from optstate.stores.full import Full
from optstate.stores.requests import Largest, Requests

__all__ = ["AxisMax", "axis_maxima", "broadcast_axes", "whole_axis_maxima"]


def axis_maxima(value: Tensor, signed: bool) -> dict[str, Tensor]:
    """Return the largest magnitude at every index of every dimension, 0 in a tensor without elements."""
    names, dims = axis_names(value.ndim), [other_dims(i, value.ndim) for i in range(value.ndim)]
    if not value.numel():
        return {name: value.new_zeros(size) for name, size in zip(names, value.shape, strict=True)}
    maxima = {name: torch.amax(value, others) for name, others in zip(names, dims, strict=True)}
    if signed:  # not of `value.abs()`: that would be one more tensor of the parameter's size
        for name, others in zip(names, dims, strict=True):
            maxima[name] = torch.maximum(maxima[name], -torch.amin(value, others))
    return maxima


def whole_axis_maxima(value: Tensor, signed: bool) -> Requests[dict[str, Tensor]]:
    """Return `axis_maxima` over all of a parameter of which this device may have a part only."""
    maxima = axis_maxima(value, signed)
    totals = yield tuple(Largest(m, other_dims(i, value.ndim)) for i, m in enumerate(maxima.values()))
    return dict(zip(maxima, totals, strict=True))


def other_dims(dim: int, ndim: int) -> tuple[int, ...]:
    """Return all dimensions but one."""
    return tuple(d for d in range(ndim) if d != dim)


def broadcast_axes(fields: Mapping[str, Tensor], shape: Shape) -> list[Tensor]:
    """Return the vector of every dimension in a shape that broadcasts: `[m, 1]` and `[1, n]` from `[m]` and `[n]`."""
    ndim = len(shape)
    return [fields[name].view([-1 if d == i else 1 for d in range(ndim)]) for i, name in enumerate(axis_names(ndim))]


@dataclass(frozen=True)
class AxisMax(Store):
    """The largest value at every index of every dimension; an element is read as the smallest of its maxima.

    What is read bounds what was stored from above (SM3, arXiv 1901.11150, section 4).

    Bytes: `4 (m + n)` per matrix. Relative error of an element: never below what was stored; unbounded above. Exact
    where one of an element's row or column holds nothing larger.

    Made for `scale_by_rss`, where it is SM3. Parameters with fewer than two dimensions keep the statistic in full.
    Large parameters need temporaries, as the plan says.

    Raises:
        ValueError: when a chain puts a statistic into it that can be negative.
    """

    elementwise: ClassVar[bool] = False

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        if spec.ndim < 2:
            return Full(), f"{spec.ndim}-D: one number per element already, kept in full"
        return self, ""

    def check(self, signed: bool, smallest_weight: float) -> None:
        if signed:
            raise ValueError(
                "AxisMax() bounds a statistic that is never negative, such as a sum of squares; keep a first moment "
                "or momentum in Full(), Block8() or Block4()"
            )

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return FieldSpec.of(spec, store_layouts.axis_maxima_layouts(spec.shape))

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        return reduce(torch.minimum, broadcast_axes(fields, shape))

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        return axis_maxima(value, signed=False)

    def encode_part(self, statistic: Statistic, value: Tensor) -> Requests[Fields]:
        return (yield from whole_axis_maxima(value, signed=False))
