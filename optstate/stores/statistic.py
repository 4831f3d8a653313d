"""One statistic of one parameter during one step."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from optstate import kernels
from optstate.kernels import Noise, Product, Scalar
from optstate.spec import ParamSpec
from optstate.stores.base import NO_NOISE, Fields, Shape, Store, square_of
from optstate.stores.guard import Guard
from optstate.stores.requests import Requests, run_alone

__all__ = ["MovedStatistic", "Statistic"]


class Statistic:
    """A store bound to its tensors. What a step computes is held back and written by `commit`.

    A transform that fails therefore leaves the statistic as it was, and a lossy store gives the step the exact
    new value, not the encoded one. The exception is a statistic kept in full, fp32, that is larger than one chunk in a
    chain that needs sums over the parameter: holding it back would cost a second copy, so it moves at once.
    """

    __slots__ = ("_held", "_held_fields", "fields", "guard", "noise", "overall", "shape", "spec", "store", "weight")

    def __init__(
        self,
        store: Store,
        fields: Fields,
        spec: ParamSpec,
        guard: Guard,
        shape: Shape | None = None,
        noise: Noise = NO_NOISE,
    ) -> None:
        self.store, self.fields, self.spec, self.guard, self.noise = store, fields, spec, guard, noise
        self.shape = spec.shape if shape is None else shape
        self._held: Tensor | None = None
        self._held_fields: dict[str, Tensor] = {}
        self.weight = 1.0
        self.overall: Tensor | None = None
        """A mean over the whole parameter that no field on this device has, once the step has asked for it."""

    def read(self) -> Tensor:
        """The statistic as of this step, fp32, the parameter's local shape. Do not write to it."""
        if self._held is not None:
            return self._held.to(self.spec.accumulator)
        if self.store.elementwise or self.spec.region is None:
            return self.store.read(self.current, self.shape).to(self.spec.accumulator)
        return self.compact().expand(*self.shape)

    def compact(self) -> Tensor:
        """Like `read`, but of size 1 in the dimensions along which the statistic does not vary."""
        return self.read() if self._held is not None else multiplied(self.factors()).to(self.spec.accumulator)

    def factors(self) -> tuple[Tensor, ...]:
        """The statistic as of this step as small factors whose product it is."""
        return self.store.factors_here(self)

    @property
    def current(self) -> Fields:
        """The stored tensors as of this step."""
        return {**self.fields, **self._held_fields} if self._held_fields else self.fields

    def ema(self, value: Product, weight: Scalar) -> Requests[None]:
        """Move towards `value` by `weight` of the distance; drive with `yield from`."""
        self._note(weight)
        return self.store.ema(self, value, weight if self.guard.finite is None else self.guard.masked(weight))

    def ema_of_square(
        self, value: Product, weight: Scalar, eps: float = 0.0, minus: Tensor | None = None
    ) -> Requests[None]:
        """Move towards `(value - minus)**2 + eps` by `weight` of the distance; drive with `yield from`."""
        self._note(weight)
        weight = weight if self.guard.finite is None else self.guard.masked(weight)
        return self.store.ema_of_square(self, value, weight, eps, minus)

    def add_square(self, value: Product) -> Requests[None]:
        """Add `value**2`; drive with `yield from`."""
        return self.store.add_square(self, value)

    def inverse_root(self, floor: float = 0.0) -> tuple[Tensor, ...]:
        """`max(statistic, floor**2) ** -0.5` as factors whose product it is."""
        return self.store.inverse_root(self, floor)

    def hold(self, value: Tensor, weight: float = 1.0) -> None:
        """Make `value` (fp32, local shape) the statistic's value, to be written at `commit`, which may overwrite it.

        weight: about which share of the value is new; see `Store.encode`.
        """
        self._held = value
        self._note(weight)

    def hold_fields(self, **fields: Tensor) -> None:
        """Make these the stored tensors, to be written at `commit`."""
        self._held_fields = fields

    def hold_ema(self, value: Product, weight: Scalar) -> None:
        """Elementwise moving average towards `value`."""
        if self._moves_in_place:
            self.guard.begin_writing()
            kernels.ema(self.fields[""], self._flagged(value), weight)
        else:
            self._held = torch.lerp(self.read(), kernels.values(value), weight)

    def hold_ema_of_square(self, value: Product, weight: Scalar, eps: float) -> None:
        """Elementwise moving average towards `value**2 + eps`."""
        if self._moves_in_place:
            self.guard.begin_writing()
            kernels.ema_of_square(self.fields[""], self._flagged(value), weight, eps)
            return
        square = kernels.values(value).square()
        self._held = torch.lerp(self.read(), square if eps == 0 else square.add_(eps), weight)

    def commit(self) -> None:
        """Write what was held back, of a slice or of a parameter that is whole here."""
        held = self._held
        self._write(self._held_fields if held is None else run_alone(self.store.encode_part(self, held)))

    def commit_part(self) -> Requests[None]:
        """Write what was held back. A step whose gradient turned out not to be finite leaves everything as it was."""
        held = self._held
        self._write(self._held_fields if held is None else (yield from self.store.encode_part(self, held)))

    def _write(self, held: Fields) -> None:
        """Write what the stored tensors become."""
        if held:
            self.guard.begin_writing()
        for name, value in held.items():
            field = self.fields[name]
            value = value.reshape(field.shape)
            field.copy_(value if self.guard.finite is None else self.guard.choose(value, field))

    def _note(self, weight: Scalar) -> None:
        """Keep the least weight of this step; one that only a device knows counts as zero.

        Raises:
            ValueError: if the store would swallow such a step: hyper-parameters may have changed since it was chosen.
        """
        if isinstance(weight, Tensor):
            weight = 0.0
        self.store.check(signed=False, smallest_weight=weight)
        self.weight = min(self.weight, weight)

    def _flagged(self, value: Product) -> Product:
        """The value, with word for the kernel of a gradient that may not be finite: nothing is held back in place."""
        return value if self.guard.finite is None else replace(value, finite=self.guard.finite)

    @property
    def _moves_in_place(self) -> bool:
        stored = self.fields.get("")
        if stored is None or stored.dtype != self.spec.accumulator:
            return False
        return stored.numel() > kernels.chunk_elements(stored.device)


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


def multiplied(factors: tuple[Tensor, ...]) -> Tensor:
    """The product of all factors, broadcast."""
    return reduce(torch.mul, factors)
