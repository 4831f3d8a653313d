"""The base class of stores, which tell how a statistic is kept, and a statistic during one step.

A store describes and holds nothing; a `Statistic` is a store bound to the tensors of one parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from optstate import kernels
from optstate.kernels import Codebook, Noise, Product, Scalar
from optstate.spec import FieldSpec, ParamSpec
from optstate.store_layouts import Shape
from optstate.stores.guard import Guard
from optstate.stores.requests import Requests, about, run_alone
from optstate.text import short

__all__ = ["NO_NOISE", "Fields", "Shape", "Statistic", "Store", "multiplied", "square_of", "subtract"]

T = TypeVar("T")

NO_NOISE = Noise("", 0)

Fields = Mapping[str, Tensor]
"""The tensors of one statistic by field name. A store with a single field names it `""`."""


class Store:
    """A way to keep one statistic of a parameter between steps; holds no tensors. Subclasses are frozen dataclasses.

    `fields` is the only source of sizes: allocation, plan, checkpoint header and estimate all read it.
    """

    def __str__(self) -> str:
        return short(self)

    elementwise: ClassVar[bool] = True
    """Whether elements, or blocks of `alignment` elements, are kept independently, so that slices can be, too."""

    exact_sums: ClassVar[bool] = False
    """Whether averages are exact on stored sums over the parameter, of which the statistic is a product.

    The sums are moved before anything is updated and notice a gradient that is not finite. Not for elementwise stores.
    """

    @property
    def reads_anew(self) -> bool:
        """Whether reading makes a tensor of the parameter's size in a chain that cannot run slice by slice."""
        return not self.exact_sums

    @property
    def takes_parts(self) -> bool:
        """Whether the store can keep a statistic of a parameter of which this device has only a part."""
        return self.elementwise or self.exact_sums or type(self).encode_part is not Store.encode_part

    @property
    def alignment(self) -> int:
        """Number of elements of the flattened parameter at a multiple of which every slice must begin."""
        return 1

    @property
    def codebook(self) -> Codebook | None:
        """The table that tells what codes stand for; None where the tensors hold numbers."""
        return None

    @property
    def scale_block(self) -> int:
        """Number of consecutive elements that share a scale, as files say beside the words; 0 without blocks."""
        return 0

    def as_recorded(self, signed: bool, block: int) -> Store:
        """Return the store that reads a statistic which a file keeps under this store's words.

        Args:
            signed: whether the statistic can be negative, says the file.
            block: `scale_block`, says the file; 0 where the file is of another tool that does not say.

        Raises:
            ValueError: if this store cannot be what the file says.
        """
        return self

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        """Return the store used for this parameter, and why, if it is not the one that a reader would expect.

        Args:
            spec: the parameter's specification.
            signed: whether the statistic can be negative.

        Returns:
            The store, and a note in words; "" if there is nothing to note.

        Raises:
            ValueError: if this store cannot keep the parameter's statistic.
        """
        return self, ""

    def check(self, signed: bool, smallest_weight: float) -> None:
        """Check that the store can hold a statistic of this kind (see `Slot`), when an optimizer is built.

        Raises:
            ValueError: if it cannot.
        """
        self.check_weight(smallest_weight)

    def check_weight(self, weight: float) -> None:
        """Check that steps of an average that moves by this weight are not rounded away.

        Asked in every step, too, as hyper-parameters may have changed since the optimizer was built.

        Raises:
            ValueError: if they would be.
        """

    def is_random(self, smallest_weight: float) -> bool:
        """Return whether `encode` uses random bits for a statistic whose averaging weight gets as small as this."""
        return False

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        """Return name, global shape, dtype and placement of every tensor kept."""
        raise NotImplementedError

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        """Return the statistic, fp32 in the parameter's local shape; may be the stored tensor, so do not write to it.

        Args:
            fields: the stored tensors, local parts; of a slice, flat and of its elements alone.
            shape: local shape of the parameter; of a slice, which only elementwise stores are given, its shape.
        """
        raise NotImplementedError

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        """Return the fields that stand for the statistic `value`; may overwrite `value`.

        Args:
            value: fp32, in the local shape or a slice's.
            noise: random bits for stores that round stochastically.
            weight: the least weight that this step's average gave to new values; a store with few mantissa bits rounds
                steps of a small weight away.

        Returns:
            A tensor for each field, flat, in the field's shape, or anything that can be copied into the field.
        """
        raise NotImplementedError

    def encode_into(self, fields: Fields, value: Tensor) -> bool:
        """Make the fields stand for `value` without a copy in between; return False, with nothing written, if not.

        Only for stores whose encoding needs neither random bits nor other devices.
        """
        return False

    def encode_part(self, statistic: Statistic, value: Tensor) -> Requests[Fields]:
        """Encode the part of the parameter on this device into the parts of the fields here; see `encode`.

        Raises:
            TypeError: if the format needs all of the parameter to take a value.
        """
        if not self.elementwise and statistic.spec.region is not None:
            raise TypeError(f"{self} cannot take a value of which this device has only a part")
        yield from ()
        return self.encode(value, statistic.noise, statistic.weight)

    def factors(self, fields: Fields, shape: Shape) -> tuple[Tensor, ...]:
        """Return factors whose product is the statistic, with the parameter's dimensions, each of full size or 1."""
        return (self.read(fields, shape),)

    def factors_here(self, statistic: Statistic) -> tuple[Tensor, ...]:
        """`factors`, of the part of the parameter on this device."""
        return self.factors(statistic.current, statistic.shape)

    def write(self, fields: Fields, value: Tensor, noise: Noise = NO_NOISE) -> None:
        """Store `value` in place; see `encode`."""
        for name, new in self.encode(value, noise).items():
            fields[name].copy_(new.reshape(fields[name].shape))

    def ema(self, statistic: Statistic, value: Product, weight: Scalar) -> Requests[None]:
        """Move the statistic towards `value` by `weight` of the distance."""
        yield from ()
        statistic.hold_ema(value, weight)

    def ema_of_square(
        self, statistic: Statistic, value: Product, weight: Scalar, eps: float, minus: Tensor | None = None
    ) -> Requests[None]:
        """Move the statistic towards `(value - minus)**2 + eps` by `weight` of the distance."""
        yield from ()
        statistic.hold_ema_of_square(value if minus is None else subtract(value, minus), weight, eps)

    def add_square(self, statistic: Statistic, value: Product) -> Requests[None]:
        """Add `value**2` to the statistic."""
        yield from ()
        x = kernels.multiply_out(value)
        statistic.hold(torch.addcmul(statistic.read(), x, x), weight=0.0)  # a sum of t squares grows by about 1 / t

    def inverse_root(self, statistic: Statistic, floor: float) -> tuple[Tensor, ...]:
        """`max(statistic, floor**2) ** -0.5` as factors whose product it is.

        A factored store also bounds the overall mean it divides by, by `floor`, as `torch.optim.Adafactor` does.
        """
        value = statistic.compact()
        return ((value if floor == 0 else value.clamp(min=square_of(floor, value))).rsqrt(),)


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
        """Return the statistic as of this step, fp32 in the parameter's local shape; do not write to it."""
        if self._held is not None:
            return self._held.to(self.spec.accumulator)
        if self.store.elementwise or self.spec.region is None:
            return self.store.read(self.current, self.shape).to(self.spec.accumulator)
        return self.compact().expand(*self.shape)

    def compact(self) -> Tensor:
        """Like `read`, but of size 1 in the dimensions along which the statistic does not vary."""
        return self.read() if self._held is not None else multiplied(self.factors()).to(self.spec.accumulator)

    def factors(self) -> tuple[Tensor, ...]:
        """Return small factors whose product is the statistic as of this step."""
        return self.store.factors_here(self)

    @property
    def current(self) -> Fields:
        """The stored tensors as of this step."""
        return {**self.fields, **self._held_fields} if self._held_fields else self.fields

    def ema(self, value: Product, weight: Scalar) -> Requests[None]:
        """Move towards `value` by `weight` of the distance; drive with `yield from`."""
        self._note(weight)
        weight = weight if self.guard.finite is None else self.guard.masked(weight)
        return self._about(self.store.ema(self, value, weight))

    def ema_of_square(
        self, value: Product, weight: Scalar, eps: float = 0.0, minus: Tensor | None = None
    ) -> Requests[None]:
        """Move towards `(value - minus)**2 + eps` by `weight` of the distance; drive with `yield from`."""
        self._note(weight)
        weight = weight if self.guard.finite is None else self.guard.masked(weight)
        return self._about(self.store.ema_of_square(self, value, weight, eps, minus))

    def add_square(self, value: Product) -> Requests[None]:
        """Add `value**2`; drive with `yield from`."""
        return self._about(self.store.add_square(self, value))

    def inverse_root(self, floor: float = 0.0) -> tuple[Tensor, ...]:
        """`max(statistic, floor**2) ** -0.5` as factors whose product it is."""
        return self.store.inverse_root(self, floor)

    def hold(self, value: Tensor, weight: float = 1.0) -> None:
        """Make `value` (fp32, local shape) the statistic's value, to be written at `commit`, which may overwrite it.

        weight: about which share of the value is new; see `Store.encode`.
        """
        self._held = value
        self._note(weight)

    def continue_from(self, value: Tensor, weight: float = 1.0) -> Requests[None]:
        """Make `value` what the averages of this step go on from, as `hold` does; drive with `yield from`."""
        self._note(weight)
        if self.store.exact_sums:  # its averages move the stored sums
            self.hold_fields(**(yield from self._about(self.store.encode_part(self, value))))
        else:
            self.hold(value, weight)

    def hold_fields(self, **fields: Tensor) -> None:
        """Make these the stored tensors, to be written at `commit`."""
        self._held_fields = fields

    def hold_ema(self, value: Product, weight: Scalar) -> None:
        """Elementwise moving average towards `value`."""
        if self._moves_in_place:
            self.guard.begin_writing()
            kernels.ema(self.fields[""], self._flagged(value), weight)
        else:
            self._held = kernels.moved(self.read(), value, weight)

    def hold_ema_of_square(self, value: Product, weight: Scalar, eps: float) -> None:
        """Elementwise moving average towards `value**2 + eps`."""
        if self._moves_in_place:
            self.guard.begin_writing()
            kernels.ema_of_square(self.fields[""], self._flagged(value), weight, eps)
            return
        self._held = kernels.moved_to_square(self.read(), value, weight, eps)

    def commit(self) -> None:
        """Write what was held back, of a slice or of a parameter that is whole here."""
        held = self._held
        if held is not None and self.guard.finite is None:
            self.guard.begin_writing()
            if self.store.encode_into(self.fields, held):
                return
        self._write(self._held_fields if held is None else run_alone(self.store.encode_part(self, held)))

    def commit_part(self) -> Requests[None]:
        """Write what was held back. A step whose gradient turned out not to be finite leaves everything as it was."""
        held = self._held
        if held is None:
            self._write(self._held_fields)
        else:
            self._write((yield from self._about(self.store.encode_part(self, held))))

    def _about(self, requests: Requests[T]) -> Requests[T]:
        """Return a computation on the statistic as one about the parameter, where these are two tensors."""
        return requests if self.spec.dims is None else about(requests, self.spec)

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
        self.store.check_weight(weight)
        self.weight = min(self.weight, weight)

    def _flagged(self, value: Product) -> Product:
        """Return the value with the guard's flag for the kernel, as an in-place move cannot be held back."""
        return value if self.guard.finite is None else replace(value, finite=self.guard.finite)

    @property
    def _moves_in_place(self) -> bool:
        if self._held is not None:
            return False
        stored = self.fields.get("")
        if stored is None or stored.dtype != self.spec.accumulator:
            return False
        return stored.numel() > kernels.chunk_elements(stored.device)


def subtract(value: Product, minus: Tensor) -> Product:
    """Return `value - minus`, multiplied out."""
    return Product(kernels.multiply_out(value).sub_(minus), finite=value.finite)


def square_of(floor: float, like: Tensor) -> float:
    """Return `floor**2`, at least the smallest normal number of `like`'s dtype: 1e-30 squared would underflow."""
    return max(floor * floor, torch.finfo(like.dtype).tiny)


def multiplied(factors: tuple[Tensor, ...]) -> Tensor:
    """Return the product of all factors, broadcast."""
    return reduce(torch.mul, factors)
