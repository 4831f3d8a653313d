"""Tiles of moments, read into fp32 and written back in the format that each is kept in."""

from __future__ import annotations

import triton
import triton.language as tl

from optstate.kernels.native import MomentKind
from optstate.kernels.triton_steps.tiles import make_random, round_nearest, round_to_bf16

__all__ = ["read_moment", "write_moment"]

FULL32 = tl.constexpr(int(MomentKind.FULL32))
FULL16 = tl.constexpr(int(MomentKind.FULL16))
FULL16_RANDOM = tl.constexpr(int(MomentKind.FULL16_RANDOM))
SIGNED8 = tl.constexpr(int(MomentKind.SIGNED8))
UNSIGNED8 = tl.constexpr(int(MomentKind.UNSIGNED8))
UNSIGNED_E4M3 = tl.constexpr(int(MomentKind.UNSIGNED_E4M3))
SIGNED4 = tl.constexpr(int(MomentKind.SIGNED4))
LINEAR4 = tl.constexpr(int(MomentKind.LINEAR4))
SPREAD = tl.constexpr(int(MomentKind.SPREAD))
OUTER = tl.constexpr(int(MomentKind.OUTER))

SMALLEST_MAXIMUM = tl.constexpr(2.0**-120)
LARGEST_MAXIMUM = tl.constexpr(3.4028234663852886e38)
BOUNDS8 = tl.constexpr(256)  # places in a table of 8-bit codes: bounds follow 256 values, decades 257 bounds
DECADES = tl.constexpr(256 + 257)
BOUNDS4 = tl.constexpr(16)


@triton.jit
def read_moment(data, scale, table, first, j, mask, block, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Return a tile of a moment in fp32.

    data, scale: of the whole moment; first: place of the tile in it, int64, a multiple of BLOCK; j: int32 places in the
    tile. block: as BLOCK, for formats that do not need to know it when they are compiled.
    """
    if KIND == FULL32 or KIND == FULL16 or KIND == FULL16_RANDOM:
        value = tl.load(data + first + j, mask=mask, other=0.0).to(tl.float32)
    elif KIND == SPREAD or KIND == OUTER:
        place = (first % block).to(tl.int32) + j
        value = tl.load(data + first // block + place // block, mask=mask, other=0.0)
        if KIND == OUTER:
            value *= tl.load(scale + place % block, mask=mask, other=0.0)
    else:
        maxima = tl.load(scale + first // BLOCK + j // BLOCK, mask=mask, other=0.0)
        if KIND == SIGNED4 or KIND == LINEAR4:
            byte = tl.load(data + first // 2 + j // 2, mask=mask, other=0).to(tl.int32)
            code = (byte >> (4 - 4 * (j & 1))) & 15
        else:
            code = tl.load(data + first + j, mask=mask, other=0).to(tl.int32)
        value = tl.load(table + code) * maxima
    return value


@triton.jit
def find_dynamic_code(x, table, IS_SIGNED: tl.constexpr):
    """Return the 8-bit codes of numbers between -1 and 1: nearest, the lower one at equal distance.

    Within a decade the place is linear in the magnitude, right to one place; the bounds of that place then decide.
    """
    magnitude = tl.abs(x)
    slope = tl.zeros_like(x)
    offset = tl.zeros_like(x)
    last = tl.zeros_like(x)
    for k in tl.static_range(8):
        above = magnitude > tl.load(table + DECADES + k)
        slope = tl.where(above, tl.load(table + DECADES + 8 + k), slope)
        offset = tl.where(above, tl.load(table + DECADES + 16 + k), offset)
        last = tl.where(above, tl.load(table + DECADES + 24 + k), last)
    code = tl.minimum(magnitude * slope + offset, last).to(tl.int32)
    if IS_SIGNED:
        code = tl.where(x < 0, 127 - code, 127 + code)
    code = tl.minimum(tl.maximum(code, 0), 255)
    more = x > tl.load(table + BOUNDS8 + 1 + code)
    less = x <= tl.load(table + BOUNDS8 + code)
    return code + more.to(tl.int32) - less.to(tl.int32)


@triton.jit
def find_4_bit_code(x, table):
    """Return the 4-bit codes of numbers between -1 and 1: nearest, the lower one at equal distance."""
    code = tl.zeros_like(x).to(tl.int32)
    for k in tl.static_range(15):
        code += (x > tl.load(table + BOUNDS4 + 1 + k)).to(tl.int32)
    return code


@triton.jit
def encode_e4m3(x):
    """Return the codes of 8-bit floats, e4m3, of magnitudes up to 448: nearest, to even at equal distance."""
    word = x.to(tl.uint32, bitcast=True)
    rest = word & 0x7FFFFFFF
    normal = (rest - 0x3C000000 + 0x7FFFF + ((rest >> 20) & 1)) >> 20
    tiny = (rest.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return ((word >> 24) & 0x80) | tl.where(rest < 0x3C800000, tiny, normal)


@triton.jit
def find_float_code(x, scaled, IS_SIGNED: tl.constexpr):
    """Return the codes of 8-bit floats of `scaled`; where `x` is above zero an unsigned code is, too."""
    scaled = tl.minimum(tl.maximum(scaled * 448.0, -448.0), 448.0)
    if not IS_SIGNED:
        scaled = tl.where(x > 0, tl.maximum(scaled, 0.001953125), scaled)
    return encode_e4m3(scaled)


@triton.jit
def write_moment(
    data,
    scale,
    table,
    first,
    j,
    mask,
    x,
    key,
    start,
    count,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write a tile of a moment, as `read_moment` reads it; a moment of codes must have a flat tile.

    key, start: of the random bits. count: elements from the tile's first on that may be written; 0 for none.
    """
    if KIND == FULL32 or KIND == FULL16:
        tl.store(data + first + j, round_nearest(x, data.dtype.element_ty), mask=mask)
    elif KIND == FULL16_RANDOM:
        tl.store(data + first + j, round_to_bf16(x, make_random(key, start + first, j)), mask=mask)
    elif KIND != SPREAD and KIND != OUTER:
        x = tl.where(mask, x, 0.0)
        blocks = tl.reshape(x, [TILE // BLOCK, BLOCK])
        maxima = tl.max(tl.abs(blocks), axis=1)
        maxima = tl.minimum(tl.maximum(maxima, SMALLEST_MAXIMUM), LARGEST_MAXIMUM)
        i = tl.arange(0, TILE // BLOCK)
        tl.store(scale + first // BLOCK + i, maxima, mask=i * BLOCK < count)
        scaled = tl.reshape(tl.div_rn(blocks, tl.broadcast_to(maxima[:, None], [TILE // BLOCK, BLOCK])), [TILE])
        if KIND == SIGNED4 or KIND == LINEAR4:
            code = tl.where(mask, find_4_bit_code(scaled, table), 0)
            upper, lower = tl.split(tl.reshape(code, [TILE // 2, 2]))
            i = tl.arange(0, TILE // 2)
            tl.store(data + first // 2 + i, ((upper << 4) | lower).to(tl.uint8), mask=2 * i < count)
        elif KIND == SIGNED8 or KIND == UNSIGNED8:
            if KIND == UNSIGNED8:  # a quotient may underflow to zero; what is positive stays positive
                scaled = tl.maximum(scaled, tl.minimum(x, 1e-37))
            code = find_dynamic_code(scaled, table, KIND == SIGNED8)
            tl.store(data + first + j, code.to(tl.uint8), mask=mask)
        else:
            code = find_float_code(x, scaled, KIND != UNSIGNED_E4M3)
            tl.store(data + first + j, code.to(tl.uint8), mask=mask)
