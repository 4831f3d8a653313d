"""What a store is: the description of how one statistic of one parameter is kept between steps."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from optstate.describe import short
from optstate.kernels import Product, Scalar
from optstate.spec import FieldSpec, ParamSpec

if TYPE_CHECKING:
    from optstate.stores.statistic import Statistic

__all__ = ["Fields", "Partial", "Requests", "Slot", "Store"]

T = TypeVar("T")
Fields = Mapping[str, Tensor]
"""The tensors of one statistic by field name. A store with a single field names it `""`."""


class Partial(NamedTuple):
    """A sum over dimension `dim` of a local shard (negative, counted from the end)."""

    local: Tensor
    dim: int


Requests = Generator[Any, Any, T]
"""A computation that works on one shard of a parameter and needs sums over all of it.

It yields the local sum and is sent back the total: a tensor stands for a sum over every dimension, a `Partial`
for one over a single dimension, a tuple for several in one round. On one device each total is the local sum.
The total is the receiver's own and may be overwritten.
"""


class Store:
    """Describes a format and holds no tensors. Subclasses are frozen dataclasses.

    `fields` is the only source of sizes: allocation, plan, checkpoint header and estimate all read it.
    """

    def __str__(self) -> str:
        return short(self)

    elementwise: bool = True
    """Each element of the statistic belongs to one element of the parameter, so slices are independent."""

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        """The store used for this parameter and, if it is another one, why."""
        return self, ""

    def check(self, signed: bool, smallest_weight: float) -> None:
        """Raise ValueError if the format cannot hold a statistic of this kind (see `Slot`)."""

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        """Name, global shape, dtype and placement of every tensor kept."""
        raise NotImplementedError

    def read(self, fields: Fields) -> Tensor:
        """The statistic in the parameter's local shape, fp32. May be the stored tensor: do not write to it."""
        raise NotImplementedError

    def write(self, fields: Fields, value: Tensor) -> None:
        """Store `value`, fp32 in the parameter's local shape, in place."""
        raise NotImplementedError

    def ema(self, statistic: Statistic, value: Product, weight: Scalar) -> Requests[None]:
        """Move the statistic towards `value` by `weight` of the distance."""
        yield from ()
        statistic.hold_ema(value, weight)

    def ema_of_square(self, statistic: Statistic, value: Product, weight: Scalar, eps: float) -> Requests[None]:
        """Move the statistic towards `value**2 + eps` by `weight` of the distance."""
        yield from ()
        statistic.hold_ema_of_square(value, weight, eps)

    def inverse_root(self, statistic: Statistic, floor: float) -> tuple[Tensor, ...]:
        """`max(statistic, floor**2) ** -0.5` as factors whose product it is.

        A factored store also bounds the overall mean it divides by, by `floor`, as `torch.optim.Adafactor` does.
        """
        value = statistic.read()
        return ((value if floor == 0 else value.clamp(min=square_of(floor, value))).rsqrt(),)


def square_of(floor: float, like: Tensor) -> float:
    """`floor**2`, at least the smallest normal number of `like`'s dtype: 1e-30 squared would underflow to zero."""
    return max(floor * floor, torch.finfo(like.dtype).tiny)


@dataclass(frozen=True)
class Slot:
    """One statistic that a transform keeps.

    signed: whether it can be negative; second moments cannot.
    smallest_weight: the least `1 - beta` its moving average ever uses; a format with few mantissa bits rounds
        steps of a small weight away.
    """

    store: Store
    signed: bool = True
    smallest_weight: float = 1.0
