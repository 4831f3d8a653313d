"""The kernels of steps with a factored second moment; factored.py says how they follow each other."""

from __future__ import annotations

import triton
import triton.language as tl

from optstate.kernels.triton_steps.elementwise import find_numbers, move_average
from optstate.kernels.triton_steps.moments import read_moment, write_moment
from optstate.kernels.triton_steps.tiles import find_key, read_gradient, read_weight, write_weight

__all__ = [
    "apply_factored_kernel",
    "find_coefficients",
    "find_root_of_mean",
    "measure_kernel",
    "move_factored_kernel",
    "sum_squares_kernel",
]


@triton.jit
def sum_squares_kernel(
    grad,
    device_scale,
    row_parts,
    col_parts,
    rows,
    cols,
    strip,
    bound,
    scale,
    CLAMPS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Leave the sums of squares of a strip of rows, `WIDTH` columns wide: `[column tiles, matrices, rows]` and
    `[strips, matrices, cols]`.
    """
    matrix = tl.program_id(2).to(tl.int64)
    matrices = tl.num_programs(2)
    i = tl.arange(0, HEIGHT)
    col = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    j = i[:, None] * cols + tl.arange(0, WIDTH)[None, :]
    begin = tl.program_id(1) * strip
    end = tl.minimum(begin + strip, rows)
    in_columns = tl.zeros([HEIGHT, WIDTH], tl.float32)
    row_sums = row_parts + (tl.program_id(0).to(tl.int64) * matrices + matrix) * rows
    for top in range(begin, end, HEIGHT):
        row = top + i
        mask = (row < end)[:, None] & (col < cols)[None, :]
        at = (matrix * rows + top) * cols + tl.program_id(0) * WIDTH
        x = read_gradient(grad + at, device_scale, j, mask, bound, scale, CLAMPS)
        square = x * x
        in_columns += square
        tl.store(row_sums + row, tl.sum(square, axis=1), mask=row < end)
    col_sums = col_parts + (tl.program_id(1).to(tl.int64) * matrices + matrix) * cols
    tl.store(col_sums + col, tl.sum(in_columns, axis=0), mask=col < cols)


@triton.jit
def move_vector(
    parts, count, means, new, roots, finite, block, matrix, matrices, length, per, weight, eps, SIZE: tl.constexpr
):
    """Add up the sums of `SIZE` rows or columns of a matrix; leave the moved means and their inverse roots.

    Returns:
        The moved means, zero beyond the end.
    """
    SUMMED: tl.constexpr = 16
    k = tl.arange(0, SUMMED)
    i = block * SIZE + tl.arange(0, SIZE)
    mask = i < length
    total = tl.zeros([SUMMED, SIZE], tl.float32)
    for first in range(0, count, SUMMED):
        part = (first + k).to(tl.int64)
        places = (part * matrices + matrix)[:, None] * length + i[None, :]
        total += tl.load(parts + places, mask=(part < count)[:, None] & mask[None, :], other=0.0)
    sums = tl.sum(total, axis=0)
    is_finite = (tl.abs(sums) <= 3.4028234663852886e38) | (i >= length)
    if finite is not None:
        bad = tl.max((is_finite == 0).to(tl.int32), axis=0)
        tl.store(finite, 0, mask=bad != 0)
    at = matrix * length + i
    old = tl.load(means + at, mask=mask, other=0.0)
    moved = move_average(old, tl.div_rn(sums, per * 1.0) + eps, weight)
    tl.store(new + at, moved, mask=mask)
    tl.store(roots + at, tl.div_rn(1.0, tl.sqrt_rn(moved)), mask=mask)
    return tl.where(mask, moved, 0.0)


@triton.jit
def move_factored_kernel(
    row_parts,
    col_parts,
    row,
    col,
    new_row,
    new_col,
    row_roots,
    col_roots,
    row_means,
    finite,
    numbers,
    row_count,
    col_count,
    rows,
    cols,
    weight,
    eps,
    SIZE: tl.constexpr,
):
    """Move `SIZE` row means or column means of a matrix, in scratch memory.

    row_means: `[matrices, row blocks]`, shares of the mean of the moved row means. finite: the flag to clear, or None.
    row_count, col_count: places that each row's and each column's sum has in scratch memory.
    """
    weight, _, _, _ = find_numbers(numbers, weight, 0.0, 0.0, 0.0)
    block = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    matrices = tl.num_programs(1)
    row_blocks = tl.cdiv(rows, SIZE)
    if block < row_blocks:
        moved = move_vector(
            row_parts,
            row_count,
            row,
            new_row,
            row_roots,
            finite,
            block,
            matrix,
            matrices,
            rows,
            cols,
            weight,
            eps,
            SIZE,
        )
        share = tl.sum(tl.div_rn(moved, rows * 1.0), axis=0)  # shares cannot overflow where their sum is no number
        tl.store(row_means + matrix * row_blocks + block, share)
    else:
        block -= row_blocks
        move_vector(
            col_parts,
            col_count,
            col,
            new_col,
            col_roots,
            finite,
            block,
            matrix,
            matrices,
            cols,
            rows,
            weight,
            eps,
            SIZE,
        )


@triton.jit
def find_root_of_mean(row_means, matrix, blocks, BLOCKS: tl.constexpr):
    """Return the root of the mean of a matrix's row means."""
    k = tl.arange(0, BLOCKS)
    shares = tl.load(row_means + matrix * blocks + k, mask=k < blocks, other=0.0)
    return tl.sqrt_rn(tl.sum(shares, axis=0))


@triton.jit
def measure_kernel(
    param,
    extra,
    grad,
    device_scale,
    row_roots,
    col_roots,
    row_means,
    squares,
    matrices,
    rows,
    cols,
    bound,
    scale,
    HOW: tl.constexpr,
    CLAMPS: tl.constexpr,
    OF_UPDATE: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Leave the sums of squares of the update and of the weight in every n-th tile: `[2, programs]`."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    down, across = tl.cdiv(rows, HEIGHT), tl.cdiv(cols, WIDTH)
    i, k = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    j = i[:, None] * cols + k[None, :]
    of_update = tl.zeros([HEIGHT, WIDTH], tl.float32)
    of_weight = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for tile in range(program, matrices * down * across, programs):
        matrix = (tile // (down * across)).to(tl.int64)
        top = (tile % (down * across) // across) * HEIGHT
        left = tile % across * WIDTH
        at = (matrix * rows + top) * cols + left
        in_rows, in_cols = top + i < rows, left + k < cols
        mask = in_rows[:, None] & in_cols[None, :]
        if OF_UPDATE:
            x = read_gradient(grad + at, device_scale, j, mask, bound, scale, CLAMPS)
            root = find_root_of_mean(row_means, matrix, tl.cdiv(rows, ROW_BLOCK), BLOCKS)
            a = tl.load(row_roots + matrix * rows + top + i, mask=in_rows, other=0.0) * root
            b = tl.load(col_roots + matrix * cols + left + k, mask=in_cols, other=0.0)
            update = x * a[:, None] * b[None, :]
            of_update += update * update
        if OF_WEIGHT:
            kept = extra
            if extra is not None:
                kept += at
            p = read_weight(param + at, kept, j, mask, HOW)
            of_weight += p * p
    tl.store(squares + program, tl.sum(tl.sum(of_update, axis=1), axis=0))
    tl.store(squares + programs + program, tl.sum(tl.sum(of_weight, axis=1), axis=0))


@triton.jit
def find_coefficients(
    of_update,
    of_weight,
    programs,
    count,
    threshold,
    least_rms,
    step,
    decay,
    OF_UPDATE: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    DECAY_IS_SCALED: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Return what multiplies the update, and the share of the weight that the decay takes away.

    of_update, of_weight: sums of squares that programs left.
    """
    k = tl.arange(0, PROGRAMS)
    if OF_UPDATE:
        total = tl.sum(tl.load(of_update + k, mask=k < programs, other=0.0), axis=0)
        excess = tl.div_rn(tl.div_rn(total, count), threshold * threshold)
        step *= tl.div_rn(1.0, tl.sqrt_rn(tl.maximum(excess, 1.0)))
    if OF_WEIGHT:
        total = tl.sum(tl.load(of_weight + k, mask=k < programs, other=0.0), axis=0)
        rms = tl.maximum(tl.sqrt_rn(tl.div_rn(total, count)), least_rms)
        step *= rms
        if DECAY_IS_SCALED:
            decay *= rms
    return step, decay


@triton.jit(do_not_specialize=["start", "weight_key", "first_key", "first_start"])
def apply_factored_kernel(
    param,
    extra,
    grad,
    device_scale,
    first,
    row,
    col,
    new_row,
    new_col,
    row_roots,
    col_roots,
    row_means,
    squares,
    finite,
    numbers,
    clock,
    matrices,
    rows,
    cols,
    programs,
    start,
    weight_key,
    first_start,
    first_key,
    bound,
    scale,
    count,
    threshold,
    least_rms,
    step,
    decay,
    first_weight,
    after,
    HOW: tl.constexpr,
    FIRST: tl.constexpr,
    CLAMPS: tl.constexpr,
    OF_UPDATE: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    DECAY_IS_SCALED: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write a tile of the weight and of the momentum; the first tiles of rows and columns write the statistic, too."""
    _, step, decay, after = find_numbers(numbers, 0.0, step, decay, after)
    step, decay = find_coefficients(
        squares,
        squares + programs,
        programs,
        count,
        threshold,
        least_rms,
        step,
        decay,
        OF_UPDATE,
        OF_WEIGHT,
        DECAY_IS_SCALED,
        PROGRAMS,
    )
    down, across = tl.cdiv(rows, HEIGHT), tl.cdiv(cols, WIDTH)
    tile = tl.program_id(0)
    matrix = (tile // (down * across)).to(tl.int64)
    top = (tile % (down * across) // across) * HEIGHT
    left = tile % across * WIDTH
    at = (matrix * rows + top) * cols + left
    i, k = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    j = i[:, None] * cols + k[None, :]
    is_finite = tl.load(finite) != 0
    in_rows, in_cols = top + i < tl.where(is_finite, rows, 0), left + k < tl.where(is_finite, cols, 0)
    mask = in_rows[:, None] & in_cols[None, :]
    row_at, col_at = matrix * rows + top + i, matrix * cols + left + k
    root = find_root_of_mean(row_means, matrix, tl.cdiv(rows, ROW_BLOCK), BLOCKS)
    a = tl.load(row_roots + row_at, mask=in_rows, other=0.0) * root * step
    b = tl.load(col_roots + col_at, mask=in_cols, other=0.0)
    if extra is not None:
        extra += at
    update = read_gradient(grad + at, device_scale, j, mask, bound, scale, CLAMPS) * a[:, None] * b[None, :]
    p = read_weight(param + at, extra, j, mask, HOW) * (1.0 - decay)
    if FIRST != 0:
        m = move_average(read_moment(first, None, None, at, j, mask, 1, FIRST, 1), update, first_weight)
        key = find_key(first_key, clock)
        write_moment(first, None, None, at, j, mask, m, key, first_start, 0, FIRST, 1, 1)
        update = m * after
    write_weight(param + at, extra, j, mask, p - update, find_key(weight_key, clock), start + at, HOW)
    if left == 0:
        tl.store(row + row_at, tl.load(new_row + row_at, mask=in_rows, other=0.0), mask=in_rows)
    if top == 0:
        tl.store(col + col_at, tl.load(new_col + col_at, mask=in_cols, other=0.0), mask=in_cols)
