"""A statistic that has moved before its parameter is stepped slice by slice."""

from __future__ import annotations

from torch import Tensor

from optstate.kernels import Product, Scalar
from optstate.stores.base import Shape, Statistic, square_of
from optstate.stores.requests import Requests

__all__ = ["MovedStatistic"]


class MovedStatistic(Statistic):
    """A slice of a statistic that has been moved already, for all slices at once: it can only be read."""

    __slots__ = ("_factors",)

    def __init__(self, whole: Statistic, factors: tuple[Tensor, ...], shape: Shape) -> None:
        super().__init__(whole.store, {}, whole.spec, whole.guard, shape)
        self._factors = factors

    def read(self) -> Tensor:
        return self.compact().expand(*self.shape)

    def factors(self) -> tuple[Tensor, ...]:
        return self._factors

    def ema(self, value: Product, weight: Scalar) -> Requests[None]:
        yield from ()

    def ema_of_square(
        self, value: Product, weight: Scalar, eps: float = 0.0, minus: Tensor | None = None
    ) -> Requests[None]:
        yield from ()

    def add_square(self, value: Product) -> Requests[None]:
        yield from ()

    def inverse_root(self, floor: float = 0.0) -> tuple[Tensor, ...]:
        value = self.compact()
        return ((value if floor == 0 else value.clamp(min=square_of(floor, value))).rsqrt(),)
