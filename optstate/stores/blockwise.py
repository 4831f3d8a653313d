"""Stores with a code per element and one scale per block of consecutive elements, on one device or several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from optstate import kernels, store_layouts
from optstate.kernels import BlockCodes, Codebook, Noise, global_index
from optstate.spec import FieldSpec, ParamSpec
from optstate.store_layouts import FEWEST_CODED, Layouts
from optstate.stores.base import Fields, Shape, Statistic, Store
from optstate.stores.full import Full
from optstate.stores.maxima import block_maxima, kept_maxima
from optstate.stores.requests import Largest, Requests
from optstate.text import HIDDEN

__all__ = ["Blockwise", "SharedBlocks", "joined"]

LARGEST_BLOCK = 1 << 16
"""A slice of a parameter holds at least one block."""


@dataclass(frozen=True)
class Blockwise(Store):
    """A code per element and the largest magnitude, `absmax` in fp32, of every `block` consecutive elements.

    Blocks run along the flattened parameter; the last may be short. The optimizer fits `signed` to the statistic.
    """

    block: int = 256
    signed: bool = field(default=True, kw_only=True, metadata=HIDDEN)

    per_byte: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if type(self.block) is not int or self.block % 2 or not 2 <= self.block <= LARGEST_BLOCK:
            raise ValueError(
                f"{type(self).__name__}(block={self.block!r}): a block is an even number of elements up to "
                f"{LARGEST_BLOCK}, such as 256"
            )

    @property
    def alignment(self) -> int:
        return self.block

    @property
    def scale_block(self) -> int:
        return self.block

    @property
    def form(self) -> BlockCodes | None:
        """The format of the codes, for the compiled loops; None if they do not know it."""
        return None

    def as_recorded(self, signed: bool, block: int) -> Store:
        return replace(self, signed=signed, block=block or self.block)

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        if store_layouts.is_small(spec.shape):
            return Full(), f"under {FEWEST_CODED} elements: kept in full"
        store = replace(self, signed=signed)
        if spec.keeps_together(self.block):
            return store, ""
        if not spec.keeps_together(self.per_byte):
            return Full(), f"split among devices within a byte of {self.per_byte} codes: kept in full"
        return SharedBlocks(store), f"split among devices within blocks of {self.block}: each has all maxima"

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return FieldSpec.of(spec, self._layouts(spec.shape))

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        count, codes, absmax = math.prod(shape), fields["codes"].view(-1), fields["absmax"].view(-1)
        compiled = None if self.form is None else kernels.decode_blocks(codes, absmax, self.form, self.block, count)
        if compiled is not None:
            return compiled.view(shape)
        ranges = self._ranges(count, absmax.device)
        if len(ranges) == 1:
            return self._read(codes, absmax, count).view(shape)
        value = absmax.new_empty(count)
        per_code = -(-count // codes.numel())
        for first, last in ranges:
            part = codes[first // per_code : -(-last // per_code)]
            maxima = absmax[first // self.block : -(-last // self.block)]
            value[first:last] = self._read(part, maxima, last - first)
        return value.view(shape)

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        flat = value.to(torch.float32).reshape(-1)
        compiled = None if self.form is None else kernels.encode_blocks(flat, self.form, self.block)
        if compiled is not None:
            return {"codes": compiled[0], "absmax": compiled[1]}
        parts = [self._encode(flat[first:last]) for first, last in self._ranges(flat.numel(), flat.device)]
        codes, maxima = zip(*parts, strict=True)
        return {"codes": joined(codes), "absmax": joined(maxima)}

    def encode_into(self, fields: Fields, value: Tensor) -> bool:
        codes, absmax = fields["codes"].view(-1), fields["absmax"].view(-1)
        return self.form is not None and kernels.write_blocks(value, codes, absmax, self.form, self.block)

    def _ranges(self, count: int, device: torch.device) -> list[tuple[int, int]]:
        """Where to cut a statistic of `count` elements, so that making codes needs little memory besides it."""
        step = max(kernels.slice_elements(device) // 2 // self.block, 1) * self.block
        if count <= step:  # without a loop, as a step that is recorded does not know how many elements there are
            return [(0, count)]
        return [(first, min(first + step, count)) for first in range(0, count, step)]

    def _read(self, codes: Tensor, absmax: Tensor, count: int) -> Tensor:
        """`count` elements, flat and new."""
        values = self.decode(codes, count)
        for part, maximum in _blocks(values, absmax, self.block):
            part.mul_(maximum)
        return values

    def _encode(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and maxima of a flat value, which may be overwritten."""
        absmax = block_maxima(value, self.block)
        scaled = value if self.signed else value.clone()
        for part, maximum in _blocks(scaled, absmax, self.block):
            part.div_(maximum)
        return self.encode_scaled(scaled, value), absmax

    def _layouts(self, shape: tuple[int, ...]) -> Layouts:
        return store_layouts.blocks(shape, self.block)

    def decode(self, codes: Tensor, count: int) -> Tensor:
        """Values in [-1, 1] of `count` elements, flat and new."""
        raise NotImplementedError

    def encode_scaled(self, scaled: Tensor, value: Tensor) -> Tensor:
        """Codes of `scaled = value / absmax`; both may be overwritten, and are one tensor if signed."""
        raise NotImplementedError


@dataclass(frozen=True)
class SharedBlocks(Store):
    """What a blockwise store becomes where blocks do not end at the ends of a device's part.

    The format is that of `blocks`, and so are the codes. Each device has the codes of its part and the maxima of all
    blocks, `4 / block` bytes per element of the whole parameter, on which the devices agree at the end of every step.
    """

    blocks: Blockwise

    elementwise: ClassVar[bool] = False

    def __str__(self) -> str:
        return str(self.blocks)

    @property
    def alignment(self) -> int:
        return self.blocks.alignment

    @property
    def scale_block(self) -> int:
        return self.blocks.block

    @property
    def codebook(self) -> Codebook | None:
        return self.blocks.codebook

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return self.blocks.fields(spec, signed)

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        """Of the whole parameter: what conversion of a file works on."""
        return self.blocks.read(fields, shape)

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        """Of the whole parameter: what conversion of a file works on."""
        return self.blocks.encode(value, noise, weight)

    def factors_here(self, statistic: Statistic) -> tuple[Tensor, ...]:
        codes, absmax = (statistic.current[name].view(-1) for name in ("codes", "absmax"))
        value = absmax.new_empty(statistic.spec.local_numel)
        per_code = statistic.spec.local_numel // max(codes.numel(), 1)
        for first, last, block in self._pieces(statistic.spec, absmax.device):
            part = self.blocks.decode(codes[first // per_code : -(-last // per_code)], last - first)
            torch.mul(part, absmax[block], out=value[first:last])
        return (value.view(*statistic.shape),)

    def encode_part(self, statistic: Statistic, value: Tensor) -> Requests[Fields]:
        spec, flat = statistic.spec, value.to(torch.float32).reshape(-1)
        largest = flat.new_zeros(-(-spec.numel // self.blocks.block))
        for first, last, block in self._pieces(spec, flat.device):
            largest.scatter_reduce_(0, block, flat[first:last].abs(), "amax")
        absmax = kept_maxima((yield Largest(largest)))
        codes = [flat.new_empty(0, dtype=statistic.fields["codes"].dtype)]
        for first, last, block in self._pieces(spec, flat.device):
            codes.append(self.blocks.encode_scaled(flat[first:last] / absmax[block], flat[first:last]))
        return {"codes": torch.cat(codes), "absmax": absmax}

    def _pieces(self, spec: ParamSpec, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        """Ranges of the flattened part here, and the block that each element belongs to."""
        assert spec.region is not None
        step = 2 * max(kernels.slice_elements(device) // 8, 1)  # an index is as large as two numbers
        for first in range(0, spec.local_numel, step):
            last = min(first + step, spec.local_numel)
            yield first, last, global_index(spec.region, first, last - first, device) // self.blocks.block


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join flat tensors into one."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _blocks(flat: Tensor, absmax: Tensor, block: int) -> list[tuple[Tensor, Tensor]]:
    """Return the full blocks `[blocks, block]` with their maxima `[blocks, 1]`, then the short block at the end."""
    whole = flat.numel() // block
    parts = [(flat[: whole * block].view(-1, block), absmax[:whole, None])]
    return [*parts, (flat[whole * block :], absmax[-1:])] if whole * block < flat.numel() else parts
