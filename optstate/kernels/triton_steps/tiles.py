"""What every kernel is made of: tiles of weights and gradients, read into fp32, and the random bits of a tile.

A tile begins at a 64-bit address; places within the tile are 32-bit numbers. So parameters may be as large as memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optstate.kernels.native import WriteKind

__all__ = ["find_key", "mix_bits", "read_gradient", "read_weight", "write_weight"]

PLAIN = tl.constexpr(int(WriteKind.PLAIN))
STOCHASTIC = tl.constexpr(int(WriteKind.STOCHASTIC))
KAHAN = tl.constexpr(int(WriteKind.KAHAN))
SPLIT16 = tl.constexpr(int(WriteKind.SPLIT16))
SPLIT8 = tl.constexpr(int(WriteKind.SPLIT8))


# --- random bits: a hash of a key and of the element's index -----------------------------------------------------


@triton.jit
def mix_bits(x):
    """Return MurmurHash3's finalizer of uint32 numbers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def find_key(key, clock):
    """Return the key of the random bits: the one given, or that of a name, int32, at the step on the device's clock."""
    if clock is not None:
        step = tl.load(clock).to(tl.uint32)
        key = mix_bits(key.to(tl.uint32, bitcast=True) ^ step).to(tl.int32, bitcast=True)
    return key


@triton.jit
def make_random(key, first, j):
    """Return the random bits of the elements at `first + j`: int32 from -32768 to 32767.

    Two neighbours are the halves of one hash. key: int32; first: int64; j: an int32 tile.
    """
    low = (first >> 1).to(tl.uint32)
    high = (first >> 33).to(tl.uint32)
    unsigned = key.to(tl.uint32, bitcast=True)
    here, next_one = mix_bits(unsigned ^ high), mix_bits(unsigned ^ (high + 1))
    place = (first & 1).to(tl.int32) + j
    word = low + (place >> 1).to(tl.uint32)
    hashed = mix_bits(word ^ tl.where(word < low, next_one, here))
    aligned = hashed << (16 - 16 * (place & 1)).to(tl.uint32)
    return aligned.to(tl.int32, bitcast=True) >> 16


@triton.jit
def round_nearest(x, KIND: tl.constexpr):
    """Round fp32 numbers to the nearest of a dtype, to even at equal distance.

    bf16 by integers: Triton's interpreter cuts off, and NaN has the same bits everywhere.
    """
    if KIND == tl.bfloat16:
        word = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, word + 0x7FFF + ((word >> 16) & 1), 0x7FC00000)
        found = (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        found = x.to(KIND)
    return found


@triton.jit
def round_to_bf16(x, random):
    """Round fp32 numbers to bf16, up or down at random; NaN stays."""
    word = x.to(tl.int32, bitcast=True) + random + 0x8000
    rounded = (word & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x).to(tl.bfloat16)


@triton.jit
def round_to_fp16(x, random):
    """Round fp32 numbers to fp16, up or down at random; infinities and NaN stay."""
    word = x.to(tl.int32, bitcast=True)
    share = (random + 0x8000) >> 3
    normal = ((word + share) & -0x2000).to(tl.float32, bitcast=True)
    places = x * 16777216.0 + share.to(tl.float32) * 0.0001220703125
    tiny = tl.floor(places) * 5.9604644775390625e-8
    rounded = tl.where(tl.abs(x) < 6.103515625e-5, tiny, normal)
    is_finite = (word & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, rounded, x).to(tl.float16)


# --- weights ------------------------------------------------------------------------------------------------------


@triton.jit
def read_weight(param, extra, j, mask, HOW: tl.constexpr):
    """Return a tile of the weight in fp32, with what is kept beside the parameter."""
    stored = tl.load(param + j, mask=mask, other=0.0)
    value = stored.to(tl.float32)
    if HOW == KAHAN:
        value += tl.load(extra + j, mask=mask, other=0.0).to(tl.float32)
    if HOW == SPLIT16 or HOW == SPLIT8:
        DROPPED: tl.constexpr = 8 if HOW == SPLIT8 else 0
        correction = tl.load(extra + j, mask=mask, other=0).to(tl.int32)
        upper = stored.to(tl.int16, bitcast=True).to(tl.int32)
        word = ((upper << (16 - DROPPED)) + correction) << DROPPED
        zero_from_outside = ((upper & 0x7FFF) == 0) & (correction < 0)
        value = tl.where(zero_from_outside, 0, word).to(tl.float32, bitcast=True)
    return value


@triton.jit
def finite_or_zero(x):
    """Return the numbers, and zero where they are infinite or NaN."""
    return tl.where((x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000, 0.0, x)


@triton.jit
def write_weight(param, extra, j, mask, x, key, first, HOW: tl.constexpr):
    """Write a tile of the weight; `first` is the flat index of the element at `param`."""
    if HOW == PLAIN:
        tl.store(param + j, round_nearest(x, param.dtype.element_ty), mask=mask)
    elif HOW == STOCHASTIC:
        random = make_random(key, first, j)
        if param.dtype.element_ty == tl.bfloat16:
            tl.store(param + j, round_to_bf16(x, random), mask=mask)
        else:
            tl.store(param + j, round_to_fp16(x, random), mask=mask)
    elif HOW == KAHAN:
        nearest = round_nearest(x, param.dtype.element_ty).to(tl.float32)
        rest = round_nearest(finite_or_zero(x - nearest), param.dtype.element_ty).to(tl.float32)
        chosen = round_nearest(nearest + rest, param.dtype.element_ty)  # half a place may call for the neighbour
        tl.store(param + j, chosen, mask=mask)
        rest = round_nearest(finite_or_zero(x - chosen.to(tl.float32)), param.dtype.element_ty)
        tl.store(extra + j, rest, mask=mask)
    else:
        word = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
        if HOW == SPLIT8:
            word += 0x80
        upper = ((word + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(param + j, upper, mask=mask)
        if HOW == SPLIT8:
            word = word >> 8
        tl.store(extra + j, word.to(extra.dtype.element_ty), mask=mask)


# --- gradients ----------------------------------------------------------------------------------------------------


@triton.jit
def read_gradient(grad, device_scale, j, mask, bound, scale, CLAMPS: tl.constexpr):
    """Return a tile of the gradient in fp32, clamped, then scaled by the number of the host or of the device."""
    x = tl.load(grad + j, mask=mask, other=0.0).to(tl.float32)
    if CLAMPS:
        x = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
    if device_scale is not None:
        scale = tl.load(device_scale).to(tl.float32)
    return x * scale
