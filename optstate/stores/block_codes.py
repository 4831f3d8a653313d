"""The formats of few bits: what the codes of a block stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from optstate import kernels, store_layouts
from optstate.kernels import BlockCodes, Codebook, Noise, Piece, dynamic_map, linear_map
from optstate.kernels.native import MomentKind
from optstate.spec import FieldSpec, ParamSpec
from optstate.store_layouts import Layouts
from optstate.stores.axes import axis_maxima, broadcast_axes, whole_axis_maxima
from optstate.stores.base import Fields, Shape, Statistic, Store
from optstate.stores.blockwise import Blockwise, joined
from optstate.stores.maxima import kept_maxima
from optstate.stores.requests import Requests

__all__ = ["Block4", "Block8", "Float8"]

LARGEST_E4M3 = 448.0
SMALLEST_E4M3 = 2.0**-9

SIGNED_8 = Codebook(dynamic_map(True), name="dynamic8_signed")
UNSIGNED_8 = Codebook(dynamic_map(False), keeps_positive=True, name="dynamic8_unsigned")
SIGNED_4 = Codebook(dynamic_map(True, bits=4), name="dynamic4_signed")
LINEAR_4 = Codebook(linear_map(4), name="linear4")
EVERY_E4M3 = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()
E4M3 = Codebook((EVERY_E4M3 / LARGEST_E4M3).tolist())
"""Only read: PyTorch writes 8-bit floats itself, and reads them five times as slowly as this table."""


@cache
def compiled_form(kind: MomentKind) -> BlockCodes:
    """Return a format as the compiled loops know it, made at the first use."""
    books = {MomentKind.SIGNED8: SIGNED_8, MomentKind.UNSIGNED8: UNSIGNED_8}
    books |= {MomentKind.SIGNED4: SIGNED_4, MomentKind.LINEAR4: LINEAR_4}
    with unset_fake_temporarily():  # the tables are real, also where the tensors of the first use are not
        return BlockCodes.of(books.get(kind, E4M3), kind)


@dataclass(frozen=True)
class Block8(Blockwise):
    """8-bit codes of bitsandbytes' dynamic map, signed for first moments, unsigned for second ones.

    Bytes per element: `1 + 4 / block`, 1.016 at 256. The nearest code is taken, so the error of an element is at most
    0.0071 (signed) or 0.0036 (unsigned) of its block's largest magnitude; relative to the element itself 6.2 %
    (3.3 %) down to a tenth of the maximum, 11 % (6.2 %) down to a hundredth, and about double per decade below;
    the map has no -1, so a block whose largest element is negative loses 0.7 % of that one.
    Zero stays zero, and a second moment above zero never becomes zero, so nothing is divided by it.

    The map is that of arXiv 2110.02861 as bitsandbytes builds it; codes differ from bitsandbytes' CPU code, which
    does not keep zeros and rounds small values wrongly.

    block: elements per scale, even. Parameters with fewer than 4096 elements keep the statistic in full.

    Raises:
        ValueError: for a block that is not an even number of elements up to 65536.
    """

    block: int = 256

    @property
    def codebook(self) -> Codebook:
        return SIGNED_8 if self.signed else UNSIGNED_8

    @property
    def form(self) -> BlockCodes | None:
        if type(self) is not Block8:  # a subclass may write other codes
            return None
        return compiled_form(MomentKind.SIGNED8 if self.signed else MomentKind.UNSIGNED8)

    def decode(self, codes: Tensor, count: int) -> Tensor:
        return self.codebook.decode(codes)

    def encode_scaled(self, scaled: Tensor, value: Tensor) -> Tensor:
        if self.signed:
            return self.codebook.encode(scaled)
        # A quotient may underflow to zero; the value itself, however small, still tells that it was positive.
        return self.codebook.encode(torch.maximum(scaled, value.clamp_(max=1e-37), out=scaled))


@dataclass(frozen=True)
class Block4(Blockwise):
    """4-bit codes, two a byte: the dynamic-exponent map for first moments, `1/16 ... 16/16` for second ones.

    Bytes per element: `0.5 + 4 / block`, 0.531 at 128. Worst error of an element: 0.12 of its block's largest magnitude
    for first moments (values below 0.3 % of it become zero); for second ones 1/32, below 1/16 of it up to 1/16, as
    none is read as less than that, a zero included (arXiv 2309.01507: a zero code would divide by zero); a block of
    zeros reads as 2**-124.
    The first of two codes is in a byte's upper half, as in torchao.

    block: elements per scale, even.
    rank1: scale each element by the smaller of its row's and its column's largest magnitude instead of its block's
        (arXiv 2309.01507, section 4.2; more dimensions: the smallest over all). Not for vectors, which keep blocks.
        Bytes: `0.5` per element and 4 per row and column. Large parameters need temporaries, as the plan says.

    Raises:
        ValueError: for a block that is not an even number of elements up to 65536.
    """

    block: int = 128
    rank1: bool = False

    per_byte: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rank1, bool):
            raise TypeError(f"Block4(rank1={self.rank1!r}): give True or False")

    def as_recorded(self, signed: bool, block: int) -> Store:
        return _RankOne4(signed=signed) if self.rank1 else super().as_recorded(signed, block)

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        if not self.rank1:
            return super().resolve(spec, signed)
        if spec.ndim >= 2 and not store_layouts.is_small(spec.shape) and spec.keeps_together(self.per_byte):
            return _RankOne4(signed=signed), ""
        store, why = replace(self, rank1=False).resolve(spec, signed)
        return store, why or "a vector has no rows and columns: blocks"

    @property
    def codebook(self) -> Codebook:
        return SIGNED_4 if self.signed else LINEAR_4

    @property
    def form(self) -> BlockCodes | None:
        if type(self) is not Block4:  # a subclass may write other codes
            return None
        return compiled_form(MomentKind.SIGNED4 if self.signed else MomentKind.LINEAR4)

    def _layouts(self, shape: tuple[int, ...]) -> Layouts:
        return store_layouts.packed_blocks(shape, self.block)

    def decode(self, codes: Tensor, count: int) -> Tensor:
        return self.codebook.decode_nibbles(codes, count)

    def encode_scaled(self, scaled: Tensor, value: Tensor) -> Tensor:
        return self.codebook.encode_nibbles(scaled)


@dataclass(frozen=True)
class _RankOne4(Store):
    """What `Block4(rank1=True)` becomes: 4-bit codes, and the largest magnitude along every dimension in fp32."""

    signed: bool

    elementwise: ClassVar[bool] = False

    def __str__(self) -> str:
        return str(Block4(rank1=True))

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return FieldSpec.of(spec, store_layouts.rank_one_codes(spec.shape))

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        value = fields["row"].new_empty(tuple(shape))
        axes, codes = broadcast_axes(fields, shape), fields["codes"]
        for piece in self._pieces(shape, value.device):
            part = piece.of(value)
            part.copy_(self.codebook.decode_nibbles(piece.of_field(codes, 2), part.numel()).view(part.shape))
            part.mul_(reduce(torch.minimum, map(piece.of, axes)))
            piece.write_back(value, part)
        return value

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        return self._encode(value, axis_maxima(value, signed=True))

    def encode_part(self, statistic: Statistic, value: Tensor) -> Requests[Fields]:
        return self._encode(value, (yield from whole_axis_maxima(value, signed=True)))

    def _encode(self, value: Tensor, maxima: dict[str, Tensor]) -> Fields:
        maxima = {name: kept_maxima(largest.float()) for name, largest in maxima.items()}
        axes, codes = broadcast_axes(maxima, value.shape), [value.new_empty(0, dtype=torch.uint8)]
        for piece in self._pieces(value.shape, value.device):
            scaled = torch.div(piece.of(value), reduce(torch.minimum, map(piece.of, axes)))
            codes.append(self.codebook.encode_nibbles(scaled.float().contiguous()))
        return {"codes": joined(codes), **maxima}

    @property
    def codebook(self) -> Codebook:
        return SIGNED_4 if self.signed else LINEAR_4

    @staticmethod
    def _pieces(shape: Shape, device: torch.device) -> list[Piece]:
        """Pieces that begin at whole bytes."""
        return kernels.cut_into_pieces(shape, kernels.slice_elements(device) // 2, align=2)


@dataclass(frozen=True)
class Float8(Blockwise):
    """8-bit floats, e4m3, scaled so that a block's largest magnitude is 448: torchao's format.

    Bytes per element: `1 + 4 / block`, 1.016 at 256. Worst relative error: 6.25 % down to 3.5e-5 of the block's
    largest magnitude; below that an absolute 2.2e-6 of it, or 4.4e-6 for second moments, where none above zero
    becomes zero. Zero stays zero.

    block: elements per scale, even. Parameters with fewer than 4096 elements keep the statistic in full.

    Raises:
        ValueError: for a block that is not an even number of elements up to 65536.
    """

    block: int = 256

    def _layouts(self, shape: tuple[int, ...]) -> Layouts:
        return store_layouts.blocks(shape, self.block, codes="float8_e4m3fn")

    @property
    def form(self) -> BlockCodes | None:
        if type(self) is not Float8:  # a subclass may write other codes
            return None
        return compiled_form(MomentKind.SIGNED_E4M3 if self.signed else MomentKind.UNSIGNED_E4M3)

    def decode(self, codes: Tensor, count: int) -> Tensor:
        return E4M3.decode(codes)

    def encode_scaled(self, scaled: Tensor, value: Tensor) -> Tensor:
        scaled.mul_(LARGEST_E4M3).clamp_(-LARGEST_E4M3, LARGEST_E4M3)  # PyTorch before 2.13 makes infinity NaN
        if not self.signed:
            scaled = torch.where(value > 0, scaled.clamp(min=SMALLEST_E4M3), scaled)
        return scaled.to(torch.float8_e4m3fn)
