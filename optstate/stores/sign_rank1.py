"""Store: signs in bits times a magnitude of rank one (SMMF, arXiv 2412.08894)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from optstate import store_layouts
from optstate.kernels import Noise
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores.base import Fields, Shape, Statistic, Store
from optstate.stores.full import Full
from optstate.stores.requests import Partial, Requests, run_alone

__all__ = ["SignRank1"]


@dataclass(frozen=True)
class SignRank1(Store):
    """The sign of every element in a bit, times a magnitude that is the product of a row's and a column's number.

    `row` has the mean magnitude of every row, `col` that of every column over the mean of all, along the last two
    dimensions. Source: SMMF (Park and Lee 2024, arXiv 2412.08894, algorithms 3 and 4).

    Bytes of an m x n matrix: `m n / 8 + 4 (m + n)`, 0.127 per element of a 4096 x 4096 one. Sums of magnitudes over
    rows and columns are exact; the relative error of an element is unbounded. Zero becomes minus the magnitude of its
    row and column.

    A statistic that cannot be negative has no bits, and is kept as in `Factored()`, except that the average moves the
    product and not the sums, so that a step uses the exact new value of every element. Parameters with fewer than two
    dimensions keep the statistic in full. Large parameters need temporaries, as the plan says.

    signed: whether the statistic can be negative; the optimizer fits it to the statistic.
    """

    signed: bool = True

    elementwise: ClassVar[bool] = False

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        if spec.ndim < 2:
            return Full(), f"{spec.ndim}-D: no rows and columns, kept in full"
        if signed and not spec.keeps_together(store_layouts.SIGNS_PER_BYTE):
            return Full(), f"split among devices within a byte of {store_layouts.SIGNS_PER_BYTE} signs: kept in full"
        return replace(self, signed=signed), ""

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return FieldSpec.of(spec, store_layouts.sign_rank1_layouts(spec.shape, signed))

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        magnitude = fields["row"].unsqueeze(-1) * fields["col"].unsqueeze(-2)
        if not self.signed:
            return magnitude
        positive = unpacked(fields["signs"], magnitude.numel()).view(magnitude.shape)
        return torch.where(positive, magnitude, -magnitude)

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        return run_alone(self._encode(value, value.shape))

    def encode_part(self, statistic: Statistic, value: Tensor) -> Requests[Fields]:
        return (yield from self._encode(value, statistic.spec.shape))

    def _encode(self, value: Tensor, shape: Shape) -> Requests[Fields]:
        """Encode the part of a value on this device. shape: of the whole."""
        signs = {"signs": packed(value > 0)} if self.signed else {}
        size = value.abs() if self.signed else value
        in_rows, in_cols = size.sum(-1, keepdim=True), size.sum(-2, keepdim=True)
        rows, cols, total = yield (
            Partial(in_rows, -1),
            Partial(in_cols, -2),
            Partial(in_rows.sum(-2, keepdim=True), (-1, -2)),
        )
        m, n = shape[-2:]
        mean = (total / max(m * n, 1)).clamp_(min=torch.finfo(total.dtype).tiny)  # all zeros: 0, not 0 / 0
        return {**signs, "row": rows.squeeze(-1) / max(n, 1), "col": (cols / max(m, 1) / mean).squeeze(-2)}


def packed(flags: Tensor) -> Tensor:
    """Return eight booleans a byte, the first in the highest bit: uint8 `[ceil(numel / 8)]`."""
    per = store_layouts.SIGNS_PER_BYTE
    flat = torch.nn.functional.pad(flags.reshape(-1), (0, -flags.numel() % per)).view(-1, per)
    return (flat.to(torch.uint8) << _shifts(flags.device)).sum(-1, dtype=torch.uint8)


def unpacked(signs: Tensor, count: int) -> Tensor:
    """Return the first `count` booleans of `packed` ones, flat."""
    bits = (signs.reshape(-1, 1) >> _shifts(signs.device)).bitwise_and_(1)
    return bits.view(math.prod(bits.shape))[:count].bool()


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(store_layouts.SIGNS_PER_BYTE - 1, -1, -1, dtype=torch.uint8, device=device)
