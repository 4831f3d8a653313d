"""Store: a matrix as the product of two thin ones (MLorc, arXiv 2506.01897)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from optstate import store_layouts
from optstate.kernels import Noise
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores.base import Fields, Shape, Statistic, Store
from optstate.stores.full import Full
from optstate.stores.orthonormal import make_orthonormal
from optstate.stores.requests import Partial, Requests, run_alone

__all__ = ["LowRank"]


@dataclass(frozen=True)
class LowRank(Store):
    """The product `u v` of an `[m, rank]` and a `[rank, n]` matrix, made anew whenever a value is stored.

    `u` is an orthonormal basis of `value @ sketch` with a random `[n, rank]` sketch, and `v = u^T value` (MLorc, arXiv
    2506.01897, algorithm 3; Halko, Martinsson and Tropp 2011, algorithm 4.1). The sketch is a function of parameter
    name, slot, step and element, so nothing of the sketch is saved, and devices that have parts agree.

    A product can be negative where the statistic cannot: such elements are read as `fill`, the mean magnitude of all of
    them, as in MLorc's official code.

    Bytes of an m x n matrix: `4 rank (m + n)`, and 4 more for `fill`. Error: none for a value of at most this rank;
    else somewhat more than the best approximation of this rank leaves out. Where the factors would have as many
    numbers as the matrix, and for all but matrices, the statistic is kept in full. Large parameters need temporaries,
    as the plan says.

    rank: columns of `u`.
    signed: whether the statistic can be negative; the optimizer fits it to the statistic.

    Raises:
        ValueError: for a rank that is not a positive whole number.
    """

    rank: int = 4
    signed: bool = True

    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LowRank(rank={self.rank!r}): give a whole number, 1 at least")

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        if spec.ndim != 2:
            return Full(), f"{spec.ndim}-D: no matrix, kept in full"
        if store_layouts.is_low_rank_larger(spec.shape, self.rank):
            return Full(), f"factors of rank {self.rank} would be no smaller: kept in full"
        return replace(self, signed=signed), ""

    def is_random(self, smallest_weight: float) -> bool:
        return True

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return FieldSpec.of(spec, store_layouts.low_rank_layouts(spec.shape, self.rank, signed))

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        value = fields["u"] @ fields["v"]
        return value if self.signed else torch.where(value < 0, fields["fill"], value)

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        spec = ParamSpec(name=noise.name, shape=tuple(value.shape), dtype=value.dtype)
        return run_alone(self._encode(value, self.sketch(spec, noise, value.device)))

    def encode_part(self, statistic: Statistic, value: Tensor) -> Requests[Fields]:
        return (yield from self._encode(value, self.sketch(statistic.spec, statistic.noise, value.device)))

    def sketch(self, spec: ParamSpec, noise: Noise, device: torch.device) -> Tensor:
        """Return this device's part of the random matrix `[n, rank]`, fp32.

        Args:
            spec: of the matrix that is kept.
            noise: of the statistic, at this step.
            device: of the value.
        """
        here = spec.like((spec.shape[1], self.rank), (1, None))
        return replace(noise, region=here.region).normal(here.local_numel, device).view(here.local_shape)

    def _encode(self, value: Tensor, sketch: Tensor) -> Requests[Fields]:
        """Encode the part of a value on this device, with its part of the sketch."""
        range_ = yield Partial(value @ sketch.to(value.dtype), -1)
        columns = range_.double()
        gram = yield Partial(columns.T @ columns, -2)
        u = (columns @ make_orthonormal(gram).T).to(value.dtype)
        v = yield Partial(u.T @ value, -2)
        if self.signed:
            return {"u": u, "v": v}
        product = u @ v
        lacking = product.clamp(max=0.0)
        total, count = yield lacking.sum().neg_(), torch.count_nonzero(lacking).to(value.dtype)
        return {"u": u, "v": v, "fill": total / count.clamp(min=1.0)}
