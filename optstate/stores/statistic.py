"""One statistic of one parameter during one step."""

from __future__ import annotations

import torch
from torch import Tensor

from optstate import kernels
from optstate.kernels import Product, Scalar
from optstate.spec import ParamSpec
from optstate.stores.base import Fields, Requests, Store
from optstate.stores.guard import Guard

__all__ = ["Statistic"]


class Statistic:
    """A store bound to its tensors. What a step computes is held back and written by `commit`.

    A transform that fails therefore leaves the statistic as it was, and a lossy store gives the step the exact
    new value, not the encoded one. The exception is a statistic kept in full that is larger than one chunk in a
    chain that needs sums over the parameter: holding it back would cost a second copy, so it moves at once.
    """

    __slots__ = ("_held", "_held_fields", "fields", "guard", "spec", "store")

    def __init__(self, store: Store, fields: Fields, spec: ParamSpec, guard: Guard) -> None:
        self.store, self.fields, self.spec, self.guard = store, fields, spec, guard
        self._held: Tensor | None = None
        self._held_fields: dict[str, Tensor] = {}

    def read(self) -> Tensor:
        """The statistic as of this step, fp32, the parameter's local shape. Do not write to it."""
        value = self._held if self._held is not None else self.store.read(self.current)
        return value.to(self.spec.accumulator)

    @property
    def current(self) -> Fields:
        """The stored tensors as of this step."""
        return {**self.fields, **self._held_fields} if self._held_fields else self.fields

    def ema(self, value: Product, weight: Scalar) -> Requests[None]:
        """Move towards `value` by `weight` of the distance; drive with `yield from`."""
        return self.store.ema(self, value, self.guard.masked(weight))

    def ema_of_square(self, value: Product, weight: Scalar, eps: float = 0.0) -> Requests[None]:
        """Move towards `value**2 + eps` by `weight` of the distance; drive with `yield from`."""
        return self.store.ema_of_square(self, value, self.guard.masked(weight), eps)

    def inverse_root(self, floor: float = 0.0) -> tuple[Tensor, ...]:
        """`max(statistic, floor**2) ** -0.5` as factors whose product it is."""
        return self.store.inverse_root(self, floor)

    def hold(self, value: Tensor) -> None:
        """Make `value` (fp32, local shape) the statistic's value, to be written at `commit`."""
        self._held = value

    def hold_fields(self, **fields: Tensor) -> None:
        """Make these the stored tensors, to be written at `commit`."""
        self._held_fields = fields

    def hold_ema(self, value: Product, weight: Scalar) -> None:
        """Elementwise moving average towards `value`."""
        if self._moves_in_place:
            kernels.ema(self.fields[""], value, weight)
        else:
            self.hold(torch.lerp(self.read(), kernels.evaluate(value), weight))

    def hold_ema_of_square(self, value: Product, weight: Scalar, eps: float) -> None:
        """Elementwise moving average towards `value**2 + eps`."""
        if self._moves_in_place:
            kernels.ema_of_square(self.fields[""], value, weight, eps)
            return
        x = kernels.evaluate(value)
        square = x.mul_(x) if eps == 0 else x.mul_(x).add_(eps)
        self.hold(torch.lerp(self.read(), square, weight))

    def commit(self) -> None:
        """Write what was held back. A step whose gradient turned out not to be finite writes the old values."""
        for name, value in self._held_fields.items():
            self.fields[name].copy_(self.guard.choose(value, self.fields[name]))
        if self._held is not None:
            finite = self.guard.finite
            value = self._held if finite is None else torch.where(finite, self._held, self.store.read(self.fields))
            self.store.write(self.fields, value)

    @property
    def _moves_in_place(self) -> bool:
        stored = self.fields.get("")
        return stored is not None and stored.numel() > kernels.chunk_elements(stored.device)
