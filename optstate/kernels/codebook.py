"""Codes of few bits for fp32 numbers between -1 and 1, written and read by table lookup."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optstate.spec import is_fake

__all__ = ["Codebook", "dynamic_map", "linear_map"]

HALF_OFFSET = 1 << 15

FP32_ON_HOST: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Tables are the same whatever torch's default dtype and device are."""


def dynamic_map(signed: bool, bits: int = 8, exponent_bits: int | None = None) -> tuple[float, ...]:
    """The dynamic-exponent values of a format of `bits` bits (Dettmers et al., arXiv 2110.02861, section 2.3).

    Decade 10**(i - last) holds the midpoints of 2**i (signed) or 2**(i + 1) (unsigned) equal parts of [0.1, 1], so
    each decade below the top has half as many values; then 0 and 1, and for the signed map all negatives but -1.
    Computed in fp32 in the order bitsandbytes' `create_dynamic_map` uses, and equal to it bit for bit.

    Returns:
        `2**bits` values, ascending.
    """
    exponents = bits - 1 if exponent_bits is None else exponent_bits
    values = [0.0, 1.0]
    for i in range(exponents):
        edges = torch.linspace(0.1, 1, 2 ** (i + (bits - 1 - exponents) + (0 if signed else 1)) + 1, **FP32_ON_HOST)
        decade = (10.0 ** (i - (exponents - 1))) * ((edges[:-1] + edges[1:]) / 2.0)
        values += decade.tolist() + ((-decade).tolist() if signed else [])
    return tuple(sorted(values))


def linear_map(bits: int = 4) -> tuple[float, ...]:
    """`1 / n, 2 / n, ..., 1` with `n = 2**bits`: no zero, so that nothing is divided by one (arXiv 2309.01507)."""
    return tuple((i + 1) / 2**bits for i in range(2**bits))


@dataclass(frozen=True)
class _Tables:
    """Lookup tables on one device.

    codes: by fp16 bit pattern, counted from the most negative int16: the code of the least fp32 number that rounds to
        this fp16 number.
    bounds: by code: the fp32 bound above which a number has the next one.
    pairs: by a byte with two 4-bit codes: two fp32 values in the place of one fp64 number, so that one lookup decodes
        both. (For pairs of 8-bit codes such a table does not fit beside the data in a core's cache: twice as slow.)
    packed: by the bit pattern of two neighbouring 4-bit codes: the byte that holds both, the first in its upper half.
    """

    codes: Tensor
    bounds: Tensor
    values: Tensor
    pairs: Tensor
    packed: Tensor


class Codebook:
    """Ascending fp32 values, and which code stands for a number: the nearest, the lower one at equal distance.

    A search among 256 values costs six times as much as all the rest of an 8-bit optimizer. Here the number is
    rounded to fp16, whose bit pattern looks up the lowest code it may have; at most one bound between values lies
    within reach of a pattern, so one comparison with the fp32 number makes the result exact.

    values: 16 or 256 of them.
    keeps_positive: code 0 stands for 0 and for nothing above it, however small.
    name: what a checkpoint calls it.
    """

    def __init__(self, values: Sequence[float], keeps_positive: bool = False, name: str = "") -> None:
        self.name = name
        self.values = torch.tensor(values, **FP32_ON_HOST)
        self.bounds = _bounds_of(self.values)
        if keeps_positive:
            self.bounds[0] = 0.0
        self._tables: dict[torch.device, _Tables] = {}

    @cached_property
    def id(self) -> str:
        """Its name and 16 digits of the SHA-256 of its values as little-endian fp32, so that what codes in a file mean
        does not depend on a name alone."""
        numbers = struct.pack(f"<{len(self.values)}f", *self.values.tolist())
        return f"{self.name or 'values'}:{hashlib.sha256(numbers).hexdigest()[:16]}"

    def encode(self, x: Tensor) -> Tensor:
        """uint8 codes of contiguous fp32 numbers, flat. Numbers beyond the first and the last value get their codes."""
        tables, x = self._on(x), x.view(-1)
        pattern = x.to(torch.float16).view(torch.int16).to(torch.int32).add_(HALF_OFFSET)
        code = tables.codes.index_select(0, pattern)
        bound = tables.bounds.index_select(0, pattern.copy_(code))
        return code.add_(torch.gt(x, bound).view(torch.uint8))

    def decode(self, codes: Tensor) -> Tensor:
        """fp32 values of contiguous 8-bit codes (uint8 or an 8-bit float's bits), flat: a new tensor."""
        return self._on(codes).values.index_select(0, codes.view(torch.uint8).view(-1).to(torch.int32))

    def encode_nibbles(self, x: Tensor) -> Tensor:
        """Two 4-bit codes a byte, the first in the upper half: uint8 `[ceil(n / 2)]` of `n` numbers."""
        codes = self.encode(x)
        if codes.numel() % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        pattern = codes.view(torch.int16).to(torch.int32).add_(HALF_OFFSET)
        return self._on(x).packed.index_select(0, pattern)

    def decode_nibbles(self, codes: Tensor, count: int) -> Tensor:
        """fp32 values of `count` packed 4-bit codes, flat: a new tensor."""
        pairs = self._on(codes).pairs.index_select(0, codes.view(-1).to(torch.int32))
        return pairs.view(torch.float32)[:count]

    def _on(self, like: Tensor) -> _Tables:
        """The tables on `like`'s device, made at the first use there; sizes without values for a fake tensor."""
        if is_fake(like):
            return self._without_values(like)
        if like.device not in self._tables:
            self._tables[like.device] = self._build(like.device)
        return self._tables[like.device]

    def _without_values(self, like: Tensor) -> _Tables:
        patterns = 2 * HALF_OFFSET
        return _Tables(
            codes=like.new_empty(patterns, dtype=torch.uint8),
            bounds=like.new_empty(len(self.values), dtype=torch.float32),
            values=like.new_empty(len(self.values), dtype=torch.float32),
            pairs=like.new_empty(256, dtype=torch.float64),
            packed=like.new_empty(patterns, dtype=torch.uint8),
        )

    def _build(self, device: torch.device) -> _Tables:
        last = torch.tensor([torch.inf], **FP32_ON_HOST)
        codes, bounds = _codes_by_pattern(self.bounds), torch.cat([self.bounds, last])
        byte, two = torch.arange(256, device="cpu"), _every_int16().view(torch.uint8).view(-1, 2)
        nibbles = self.values[torch.stack([byte >> 4, byte & 15], dim=1).clamp(max=len(self.values) - 1)]
        tables = (codes, bounds, self.values, nibbles.view(torch.float64).view(-1), (two[:, 0] << 4) | (two[:, 1] & 15))
        return _Tables(*(table.to(device) for table in tables))


def _every_int16() -> Tensor:
    """All int16 numbers, ascending: entry i is `i - HALF_OFFSET`."""
    return torch.arange(-HALF_OFFSET, HALF_OFFSET, dtype=torch.int32, device="cpu").to(torch.int16)


def _bounds_of(values: Tensor) -> Tensor:
    """The largest fp32 number that is not nearer to `values[i + 1]` than to `values[i]`, for each i."""
    middle = (values[:-1].double() + values[1:].double()) / 2
    rounded = middle.float()
    above = rounded.double() > middle
    return torch.where(above, torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)), rounded)


def _codes_by_pattern(bounds: Tensor) -> Tensor:
    """For every fp16 bit pattern the code of the least number that rounds to it, uint8."""
    half = _every_int16().view(torch.float16).double()
    grid = torch.unique(half[half.isfinite()])  # ascending, one zero
    least = torch.cat([grid[:1], (grid[:-1] + grid[1:]) / 2])  # where numbers begin to round to grid[i]
    place = torch.searchsorted(grid, half.nan_to_num(0.0).clamp(grid[0], grid[-1]))
    return torch.searchsorted(bounds.double(), least[place]).to(torch.uint8)
