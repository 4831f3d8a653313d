"""The kernels of steps of many parameters; many.py launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from optstate.kernels.triton_steps.elementwise import find_numbers, step_tile
from optstate.kernels.triton_steps.factored_kernels import find_coefficients
from optstate.kernels.triton_steps.tables import ALIGNMENT, Column
from optstate.kernels.triton_steps.tiles import find_key, mix_bits
from optstate.kernels.triton_steps.unfactored import apply_tile, move_tile

__all__ = ["apply_full_table_kernel", "check_table_kernel", "elementwise_table_kernel", "move_full_table_kernel"]

PARAM = tl.constexpr(int(Column.PARAM))
EXTRA = tl.constexpr(int(Column.EXTRA))
GRAD = tl.constexpr(int(Column.GRAD))
FIRST_DATA = tl.constexpr(int(Column.FIRST))
FIRST_SCALE = tl.constexpr(int(Column.FIRST_SCALE))
SECOND_DATA = tl.constexpr(int(Column.SECOND))
SECOND_SCALE = tl.constexpr(int(Column.SECOND_SCALE))
COUNT = tl.constexpr(int(Column.COUNT))
START = tl.constexpr(int(Column.START))
WEIGHT_KEY = tl.constexpr(int(Column.WEIGHT_KEY))
FIRST_KEY = tl.constexpr(int(Column.FIRST_KEY))
SECOND_KEY = tl.constexpr(int(Column.SECOND_KEY))
FIRST_CHUNK = tl.constexpr(int(Column.FIRST_CHUNK))
ROW = tl.constexpr(int(Column.WIDTH))
ALIGNED_BY = tl.constexpr(ALIGNMENT)


@triton.jit
def find_chunk(rows, chunks, WHOLE: tl.constexpr):
    """Return the place of this program's parameter, its row, the number of the chunk, and the parameter's elements.

    WHOLE: whether all counts are multiples of 16.
    """
    tensor = tl.load(chunks + 2 * tl.program_id(0))
    chunk = tl.load(chunks + 2 * tl.program_id(0) + 1)
    row = rows + tensor.to(tl.int64) * ROW
    count = tl.load(row + COUNT)
    if WHOLE:
        count = tl.multiple_of(count, ALIGNED_BY)
    return tensor, row, chunk, count


@triton.jit
def read_address(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """Return the address of a tensor, which is aligned; None if there is no dtype."""
    found = None
    if DTYPE is not None:
        found = tl.multiple_of(tl.load(row + COLUMN).to(tl.pointer_type(DTYPE)), ALIGNED_BY)
    return found


@triton.jit
def read_key(row, COLUMN: tl.constexpr, number, clock):
    """Return the key of random bits: of a name and of the number of the step, which the clock knows if there is one."""
    name = tl.load(row + COLUMN).to(tl.int32)
    if clock is not None:
        key = find_key(name, clock)
    else:
        key = mix_bits(name.to(tl.uint32, bitcast=True) ^ number.to(tl.uint32)).to(tl.int32, bitcast=True)
    return key


@triton.jit
def check_table_kernel(
    rows, chunks, flags, largest, GRAD_TYPE: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    """Clear a parameter's flag if an element of a chunk is not finite, or too large."""
    tensor, row, chunk, count = find_chunk(rows, chunks, WHOLE)
    grad = read_address(row, GRAD, GRAD_TYPE)
    begin = chunk.to(tl.int64) * CHUNK
    j = tl.arange(0, TILE)
    bad = tl.zeros([TILE], tl.int32)
    for tile in range(tl.cdiv(tl.minimum(count - begin, CHUNK).to(tl.int32), TILE)):
        at = begin + tile * TILE
        x = tl.load(grad + at + j, mask=at + j < count, other=0.0).to(tl.float32)
        bad |= (tl.abs(x) <= largest).to(tl.int32) ^ 1  # not within for NaN
    tl.store(flags + tensor, 0, mask=tl.max(bad, axis=0) != 0)


@triton.jit(do_not_specialize=["number"])
def elementwise_table_kernel(
    rows,
    chunks,
    flags,
    numbers,
    clock,
    device_scale,
    first_table,
    second_table,
    number,
    bound,
    scale,
    penalty,
    first_weight,
    second_weight,
    mix,
    inverse_correction,
    eps,
    step,
    keep,
    PARAM_TYPE: tl.constexpr,
    EXTRA_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    FIRST_TYPE: tl.constexpr,
    FIRST_SCALE_TYPE: tl.constexpr,
    SECOND_TYPE: tl.constexpr,
    SECOND_SCALE_TYPE: tl.constexpr,
    HOW: tl.constexpr,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    FIRST_BLOCK: tl.constexpr,
    SECOND_BLOCK: tl.constexpr,
    CLAMPS: tl.constexpr,
    PENALISES: tl.constexpr,
    WHOLE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Step one chunk, tile by tile."""
    first_weight, inverse_correction, step, keep = find_numbers(numbers, first_weight, inverse_correction, step, keep)
    tensor, row, chunk, count = find_chunk(rows, chunks, WHOLE)
    count = tl.where(tl.load(flags + tensor) != 0, count, 0)
    param = read_address(row, PARAM, PARAM_TYPE)
    extra = read_address(row, EXTRA, EXTRA_TYPE)
    grad = read_address(row, GRAD, GRAD_TYPE)
    first = read_address(row, FIRST_DATA, FIRST_TYPE)
    first_scale = read_address(row, FIRST_SCALE, FIRST_SCALE_TYPE)
    second = read_address(row, SECOND_DATA, SECOND_TYPE)
    second_scale = read_address(row, SECOND_SCALE, SECOND_SCALE_TYPE)
    start = tl.load(row + START)
    weight_key = read_key(row, WEIGHT_KEY, number, clock)
    first_key = read_key(row, FIRST_KEY, number, clock)
    second_key = read_key(row, SECOND_KEY, number, clock)
    begin = chunk.to(tl.int64) * CHUNK
    for tile in range(tl.cdiv(tl.minimum(count - begin, CHUNK).to(tl.int32), TILE)):
        at = begin + tile * TILE
        left = tl.minimum(count - at, TILE).to(tl.int32)
        step_tile(
            param,
            extra,
            grad,
            device_scale,
            first,
            first_scale,
            first_table,
            second,
            second_scale,
            second_table,
            at,
            left,
            start,
            weight_key,
            first_key,
            start,
            second_key,
            start,
            SECOND_BLOCK,
            bound,
            scale,
            penalty,
            first_weight,
            second_weight,
            mix,
            inverse_correction,
            eps,
            step,
            keep,
            HOW,
            RULE,
            NESTEROV,
            FIRST,
            SECOND,
            FIRST_BLOCK,
            SECOND_BLOCK,
            SECOND != 0,
            CLAMPS,
            PENALISES,
            TILE,
        )


@triton.jit
def move_full_table_kernel(
    rows,
    chunks,
    flags,
    numbers,
    device_scale,
    of_updates,
    of_weights,
    bound,
    scale,
    averaging,
    eps,
    PARAM_TYPE: tl.constexpr,
    EXTRA_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    HOW: tl.constexpr,
    CLAMPS: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Move one tile of a moment; leave the sums of squares of the update and of the weight in the tile's place."""
    averaging, _, _, _ = find_numbers(numbers, averaging, 0.0, 0.0, 0.0)
    tensor, row, chunk, count = find_chunk(rows, chunks, WHOLE)
    end = tl.where(tl.load(flags + tensor) != 0, count, 0)
    at = chunk.to(tl.int64) * TILE
    mask = at + tl.arange(0, TILE) < end
    of_update, of_weight = move_tile(
        read_address(row, PARAM, PARAM_TYPE),
        read_address(row, EXTRA, EXTRA_TYPE),
        read_address(row, GRAD, GRAD_TYPE),
        device_scale,
        read_address(row, SECOND_DATA, tl.float32),
        at,
        mask,
        bound,
        scale,
        averaging,
        eps,
        HOW,
        CLAMPS,
        OF_WEIGHT,
        TILE,
    )
    place = tl.load(row + FIRST_CHUNK) + chunk
    tl.store(of_updates + place, tl.sum(of_update, axis=0))
    tl.store(of_weights + place, tl.sum(of_weight, axis=0))


@triton.jit(do_not_specialize=["number"])
def apply_full_table_kernel(
    rows,
    chunks,
    flags,
    numbers,
    clock,
    device_scale,
    of_updates,
    of_weights,
    number,
    bound,
    scale,
    threshold,
    least_rms,
    step,
    decay,
    first_weight,
    after,
    PARAM_TYPE: tl.constexpr,
    EXTRA_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    FIRST_TYPE: tl.constexpr,
    HOW: tl.constexpr,
    FIRST: tl.constexpr,
    CLAMPS: tl.constexpr,
    OF_UPDATE: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    DECAY_IS_SCALED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write one tile of a weight and of a momentum."""
    _, step, decay, after = find_numbers(numbers, 0.0, step, decay, after)
    tensor, row, chunk, count = find_chunk(rows, chunks, WHOLE)
    place = tl.multiple_of(tl.load(row + FIRST_CHUNK), ALIGNED_BY)
    programs = tl.cdiv(count, TILE).to(tl.int32)
    step, decay = find_coefficients(
        of_updates + place,
        of_weights + place,
        programs,
        count.to(tl.float32),
        threshold,
        least_rms,
        step,
        decay,
        OF_UPDATE,
        OF_WEIGHT,
        DECAY_IS_SCALED,
        PROGRAMS,
    )
    at = chunk.to(tl.int64) * TILE
    mask = at + tl.arange(0, TILE) < tl.where(tl.load(flags + tensor) != 0, count, 0)
    start = tl.load(row + START)
    apply_tile(
        read_address(row, PARAM, PARAM_TYPE),
        read_address(row, EXTRA, EXTRA_TYPE),
        read_address(row, GRAD, GRAD_TYPE),
        device_scale,
        read_address(row, FIRST_DATA, FIRST_TYPE),
        read_address(row, SECOND_DATA, tl.float32),
        at,
        mask,
        start,
        read_key(row, WEIGHT_KEY, number, clock),
        start,
        read_key(row, FIRST_KEY, number, clock),
        bound,
        scale,
        step,
        decay,
        first_weight,
        after,
        HOW,
        FIRST,
        CLAMPS,
        TILE,
    )
