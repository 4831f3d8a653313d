"""What a store is: the description of how one statistic of one parameter is kept between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from optstate import kernels
from optstate.kernels import Codebook, Noise, Product, Scalar
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores.requests import Requests
from optstate.text import short

if TYPE_CHECKING:
    from optstate.stores.statistic import Statistic

__all__ = ["MEANINGS", "NO_NOISE", "Fields", "Shape", "Slot", "Store", "difference", "square_of"]

NO_NOISE = Noise("", 0)

Shape = Sequence[int]
Fields = Mapping[str, Tensor]
"""The tensors of one statistic by field name. A store with a single field names it `""`."""


class Store:
    """Describes a format and holds no tensors. Subclasses are frozen dataclasses.

    `fields` is the only source of sizes: allocation, plan, checkpoint header and estimate all read it.
    """

    def __str__(self) -> str:
        return short(self)

    elementwise: ClassVar[bool] = True
    """Elements, or blocks of `alignment` elements, are kept independently of each other, so slices are too."""

    exact_sums: ClassVar[bool] = False
    """Not elementwise, but an average is exact on the stored sums, which are moved before anything is updated and
    notice a gradient that is not finite. What the store holds is then a product of small factors."""

    @property
    def reads_anew(self) -> bool:
        """Whether reading it makes a tensor of the parameter's size, in a chain that cannot run slice by slice."""
        return not self.exact_sums

    @property
    def takes_parts(self) -> bool:
        """Whether it can keep a parameter of which this device has only a part."""
        return self.elementwise or self.exact_sums or type(self).encode_part is not Store.encode_part

    @property
    def alignment(self) -> int:
        """A slice must begin at a multiple of this many elements of the flattened parameter."""
        return 1

    @property
    def codebook(self) -> Codebook | None:
        """What codes stand for; None where the tensors hold numbers."""
        return None

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        """The store used for this parameter, fitted to the statistic's sign, and, if there is something that a reader
        of the recipe would not expect, what and why.

        Raises:
            ValueError: if the parameter cannot be kept in this format.
        """
        return self, ""

    def check(self, signed: bool, smallest_weight: float) -> None:
        """Raise ValueError if the format cannot hold a statistic of this kind (see `Slot`)."""

    def is_random(self, smallest_weight: float) -> bool:
        """Whether `encode` uses its random bits for a statistic whose averaging weight gets as small as this."""
        return False

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        """Name, global shape, dtype and placement of every tensor kept."""
        raise NotImplementedError

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        """The statistic in the parameter's local shape, fp32. May be the stored tensor: do not write to it.

        An elementwise store is also given a slice: a shape, and flat fields of the elements in it.
        """
        raise NotImplementedError

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        """What the fields become when the statistic is `value`, fp32 in a local shape or a slice's; each tensor
        flat, in the field's shape, or anything that can be copied into it. May overwrite `value`.

        noise: random bits for formats that round stochastically. weight: the least weight that this step's average
        gave to what is new; a format with few mantissa bits rounds steps of a small weight away.
        """
        raise NotImplementedError

    def encode_part(self, statistic: Statistic, value: Tensor) -> Requests[Fields]:
        """`encode`, of the part of the parameter on this device: fields as far as they are here.

        Raises:
            TypeError: if the format needs all of the parameter to take a value.
        """
        if not self.elementwise and statistic.spec.region is not None:
            raise TypeError(f"{self} cannot take a value of which this device has only a part")
        yield from ()
        return self.encode(value, statistic.noise, statistic.weight)

    def factors(self, fields: Fields, shape: Shape) -> tuple[Tensor, ...]:
        """The statistic as factors whose product it is, with the parameter's dimensions, each of full size or 1."""
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
        statistic.hold_ema_of_square(value if minus is None else difference(value, minus), weight, eps)

    def add_square(self, statistic: Statistic, value: Product) -> Requests[None]:
        """Add `value**2` to the statistic."""
        yield from ()
        x = kernels.evaluate(value)
        statistic.hold(torch.addcmul(statistic.read(), x, x), weight=0.0)  # a sum of t squares grows by about 1 / t

    def inverse_root(self, statistic: Statistic, floor: float) -> tuple[Tensor, ...]:
        """`max(statistic, floor**2) ** -0.5` as factors whose product it is.

        A factored store also bounds the overall mean it divides by, by `floor`, as `torch.optim.Adafactor` does.
        """
        value = statistic.compact()
        return ((value if floor == 0 else value.clamp(min=square_of(floor, value))).rsqrt(),)


def difference(value: Product, minus: Tensor) -> Product:
    """`value - minus`, multiplied out."""
    return Product(kernels.evaluate(value).sub_(minus), finite=value.finite)


def square_of(floor: float, like: Tensor) -> float:
    """`floor**2`, at least the smallest normal number of `like`'s dtype: 1e-30 squared would underflow to zero."""
    return max(floor * floor, torch.finfo(like.dtype).tiny)


@dataclass(frozen=True)
class Slot:
    """One statistic that a transform keeps.

    signed: whether it can be negative; second moments cannot.
    smallest_weight: the least `1 - beta` its moving average ever uses; a format with few mantissa bits rounds
        steps of a small weight away.
    of: what is averaged or summed, in the words of `MEANINGS`; "" for anything else.
    beta: set for an average that began at zero and gives the past this weight at every step: after t steps it is
        `1 - beta**t` times the average proper, whether or not its transform corrects for that.
    """

    store: Store
    signed: bool = True
    smallest_weight: float = 1.0
    of: str = ""
    beta: float | None = None

    @property
    def of_squares(self) -> bool:
        """Whether squares of the update go into it, so that a gradient must be refused whose squares overflow."""
        return self.of in ("square", "square_sum")


MEANINGS = {
    "gradient": "average of gradients",
    "update": "average of updates",
    "update_sum": "decaying sum of updates",
    "square": "average of squared gradients",
    "square_sum": "sum of squared gradients",
    "distance": "average of squared distances of updates from their average",
}
"""What a statistic can be, so that state can go from one recipe to another that keeps the same."""
