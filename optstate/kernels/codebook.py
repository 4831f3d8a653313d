"""Codebooks: 4-bit and 8-bit codes for fp32 numbers between -1 and 1, encoded and decoded by table lookup."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optstate.kernels.recording import RECORDING
from optstate.spec import is_fake

__all__ = ["Codebook", "dynamic_map", "linear_map"]

HALF_OFFSET = 1 << 15

FP32_ON_HOST: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Dtype and device of every table before it is copied: torch's defaults, which a program may change, do not count."""


def dynamic_map(signed: bool, bits: int = 8, exponent_bits: int | None = None) -> tuple[float, ...]:
    """Return the values of the dynamic-exponent format (Dettmers et al., arXiv 2110.02861, section 2.3).

    Decade 10**(i - last) holds the midpoints of 2**i (signed) or 2**(i + 1) (unsigned) equal parts of [0.1, 1], so
    each decade below the top has half as many values; then 0 and 1, and for the signed map all negatives but -1.
    Computed in fp32 in the order bitsandbytes' `create_dynamic_map` uses; the values equal those bit for bit.

    Args:
        signed: whether negative numbers have codes.
        bits: width of a code.
        exponent_bits: number of decades; `bits - 1` if None.

    Returns:
        `2**bits` numbers, ascending, each an fp32 number.
    """
    exponents = bits - 1 if exponent_bits is None else exponent_bits
    values = [0.0, 1.0]
    for i in range(exponents):
        edges = torch.linspace(0.1, 1, 2 ** (i + (bits - 1 - exponents) + (0 if signed else 1)) + 1, **FP32_ON_HOST)
        decade = (10.0 ** (i - (exponents - 1))) * ((edges[:-1] + edges[1:]) / 2.0)
        values += decade.tolist() + ((-decade).tolist() if signed else [])
    return tuple(sorted(values))


def linear_map(bits: int = 4) -> tuple[float, ...]:
    """Return the values `1 / n, 2 / n, ..., 1` with `n = 2**bits` (Li et al. 2023, arXiv 2309.01507).

    The map has no zero: a second moment that is divided by never decodes to zero.
    """
    return tuple((i + 1) / 2**bits for i in range(2**bits))


@dataclass(frozen=True)
class _Tables:
    """The lookup tables of a codebook on one device.

    Attributes:
        codes: indexed by fp16 bit pattern, counted from the most negative int16: the code of the least fp32 number that
            rounds to this fp16 number, uint8 `[65536]`.
        bounds: indexed by code: the fp32 bound above which a number has the next code.
        values: indexed by code: the fp32 value that the code stands for.
        pairs: indexed by a byte with two 4-bit codes: both fp32 values in the place of one fp64 number, so that one
            lookup decodes both. (A table of pairs of 8-bit codes does not fit beside the data in a core's cache and is
            twice as slow as two lookups.)
        packed: indexed by the bit pattern of two neighbouring 4-bit codes, each in a byte: the byte that holds both,
            the first in its upper half.
    """

    codes: Tensor
    bounds: Tensor
    values: Tensor
    pairs: Tensor
    packed: Tensor


class Codebook:
    """A quantization table: code i stands for the i-th of 16 or 256 ascending fp32 values.

    Encoding rounds to the nearest value, to the lower one at equal distance. A search among 256 values costs six times
    as much as all the rest of an 8-bit optimizer; instead the number is rounded to fp16, whose bit pattern looks up the
    lowest code the number may have. At most one bound between values lies within reach of a bit pattern, so one
    comparison with the fp32 number makes the result exact.

    Args:
        values: 16 or 256 numbers, ascending.
        keeps_positive: give code 0 to the number 0 alone, so that a positive number, however small, stays positive.
        name: what a checkpoint calls the table.
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
        """The name, a colon and 16 hexadecimal digits of the SHA-256 of the values as little-endian fp32.

        A checkpoint holds this identifier, so that the meaning of the codes in a file never depends on a name alone.
        """
        numbers = struct.pack(f"<{len(self.values)}f", *self.values.tolist())
        return f"{self.name or 'values'}:{hashlib.sha256(numbers).hexdigest()[:16]}"

    def encode(self, x: Tensor) -> Tensor:
        """Return the uint8 codes `[n]` of `n` contiguous fp32 numbers; numbers beyond the table get its end's code."""
        tables, x = self._on(x), x.view(-1)
        pattern = x.to(torch.float16).view(torch.int16).to(torch.int32).add_(HALF_OFFSET)
        code = tables.codes.index_select(0, pattern)
        bound = tables.bounds.index_select(0, pattern.copy_(code))
        return code.add_(torch.gt(x, bound).view(torch.uint8))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the fp32 values `[n]`, a new tensor, of `n` contiguous 8-bit codes (uint8 or an 8-bit float)."""
        return self._on(codes).values.index_select(0, codes.view(torch.uint8).view(-1).to(torch.int32))

    def encode_nibbles(self, x: Tensor) -> Tensor:
        """Return the 4-bit codes of `n` numbers, two a byte, the first in the upper half: uint8 `[ceil(n / 2)]`."""
        codes = self.encode(x)
        if codes.numel() % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        pattern = codes.view(torch.int16).to(torch.int32).add_(HALF_OFFSET)
        return self._on(x).packed.index_select(0, pattern)

    def decode_nibbles(self, codes: Tensor, count: int) -> Tensor:
        """Return the fp32 values `[count]` of packed 4-bit codes, a new tensor."""
        pairs = self._on(codes).pairs.index_select(0, codes.view(-1).to(torch.int32))
        return pairs.view(torch.float32)[:count]

    def _on(self, like: Tensor) -> _Tables:
        """Return the tables on `like`'s device, built at the first use there; a fake tensor gets empty ones.

        A step that is recorded gets the real ones, which were built beforehand: they become part of the recording.
        """
        if like.is_meta or (is_fake(like) and RECORDING.get() is None):
            return self._without_values(like)
        if is_fake(like) and like.device not in self._tables:
            raise LookupError(f"the tables of {self.name or 'a codebook'} were not made before a recording")
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
    """Return all int16 numbers, ascending: entry i is `i - HALF_OFFSET`."""
    return torch.arange(-HALF_OFFSET, HALF_OFFSET, dtype=torch.int32, device="cpu").to(torch.int16)


def _bounds_of(values: Tensor) -> Tensor:
    """Return for each i the largest fp32 number that is not nearer to `values[i + 1]` than to `values[i]`."""
    middle = (values[:-1].double() + values[1:].double()) / 2
    rounded = middle.float()
    above = rounded.double() > middle
    return torch.where(above, torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)), rounded)


def _codes_by_pattern(bounds: Tensor) -> Tensor:
    """Return for every fp16 bit pattern the uint8 code of the least number that rounds to that fp16 number."""
    half = _every_int16().view(torch.float16).double()
    grid = torch.unique(half[half.isfinite()])  # ascending, one zero
    least = torch.cat([grid[:1], (grid[:-1] + grid[1:]) / 2])  # where numbers begin to round to grid[i]
    place = torch.searchsorted(grid, half.nan_to_num(0.0).clamp(grid[0], grid[-1]))
    return torch.searchsorted(bounds.double(), least[place]).to(torch.uint8)
