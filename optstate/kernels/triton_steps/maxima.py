"""SM3's step in two launches after the check: the step, and the largest values of every row and column.

`maxima_kernel` reads and writes everything once, and leaves the maxima of each of its strips in scratch memory, as
other programs still read the old ones. `finish_maxima_kernel` takes the largest of all strips. Maxima are the same in
whichever order they are taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optstate.kernels.rules import ElementRule, on_host
from optstate.kernels.triton_steps.elementwise import find_numbers, move_average
from optstate.kernels.triton_steps.factored import WARPS, WIDE_WARPS, cut_into_strips
from optstate.kernels.triton_steps.launching import OPTIONS, on_device, view_flag
from optstate.kernels.triton_steps.moments import read_moment, write_moment
from optstate.kernels.triton_steps.operands import GradientTensor, MomentTensor, WeightTensor, signed_key
from optstate.kernels.triton_steps.tiles import find_key, read_gradient, read_weight, write_weight

__all__ = ["launch_maxima"]

TILE = 2048
"""Elements of a tile of rows and columns: 8 per thread, which also keeps the largest values of its columns."""

VECTOR = 256
"""Maxima that a program takes of all strips."""


@triton.jit(do_not_specialize=["start", "weight_key", "first_key", "first_start"])
def maxima_kernel(
    param,
    extra,
    grad,
    device_scale,
    first,
    row,
    col,
    row_parts,
    col_parts,
    finite,
    numbers,
    clock,
    rows,
    cols,
    strip,
    start,
    weight_key,
    first_start,
    first_key,
    scale,
    eps,
    step,
    keep,
    first_weight,
    HOW: tl.constexpr,
    FIRST: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Step a strip of rows, `WIDTH` columns wide; leave its maxima: `[column tiles, rows]` and `[strips, cols]`."""
    first_weight, _, step, keep = find_numbers(numbers, first_weight, 0.0, step, keep)
    weight_key, first_key = find_key(weight_key, clock), find_key(first_key, clock)
    is_finite = tl.load(finite) != 0
    i, k = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    left = tl.program_id(0) * WIDTH
    in_cols = left + k < cols
    j = i[:, None] * cols + k[None, :]
    begin = tl.program_id(1) * strip
    end = tl.minimum(begin + strip, tl.where(is_finite, rows, 0))
    of_col = tl.load(col + left + k, mask=in_cols, other=0.0)
    largest = tl.zeros([HEIGHT, WIDTH], tl.float32)
    row_maxima = row_parts + tl.program_id(0).to(tl.int64) * rows
    for top in range(begin, end, HEIGHT):
        in_rows = top + i < end
        mask = in_rows[:, None] & in_cols[None, :]
        at = tl.cast(top, tl.int64) * cols + left
        x = read_gradient(grad + at, device_scale, j, mask, 0.0, scale, False)
        kept = extra
        if extra is not None:
            kept += at
        p = read_weight(param + at, kept, j, mask, HOW) * keep
        of_row = tl.load(row + top + i, mask=in_rows, other=0.0)
        bound = tl.minimum(of_row[:, None], of_col[None, :]) + x * x
        bound = tl.where(mask, bound, 0.0)
        largest = tl.maximum(largest, bound)
        tl.store(row_maxima + top + i, tl.max(bound, axis=1), mask=in_rows)
        root = tl.sqrt_rn(bound + eps)
        if FIRST != 0:
            m = read_moment(first, None, None, at, j, mask, 1, FIRST, 1)
            m = move_average(m, tl.div_rn(x, root), first_weight)
            write_moment(first, None, None, at, j, mask, m, first_key, first_start, 0, FIRST, 1, 1)
            update = m * step
        else:
            update = tl.div_rn(x * step, root)
        write_weight(param + at, kept, j, mask, p - update, weight_key, start + at, HOW)
    col_maxima = col_parts + tl.program_id(1).to(tl.int64) * cols
    tl.store(col_maxima + left + k, tl.max(largest, axis=0), mask=in_cols)


@triton.jit
def take_largest(parts, count, maxima, block, length, is_finite, SIZE: tl.constexpr):
    """Write the largest of `count` values of each of `SIZE` rows or columns."""
    TAKEN: tl.constexpr = 16
    k = tl.arange(0, TAKEN)
    i = block * SIZE + tl.arange(0, SIZE)
    mask = i < tl.where(is_finite, length, 0)
    largest = tl.zeros([TAKEN, SIZE], tl.float32)  # no maximum is negative
    for first in range(0, count, TAKEN):
        part = (first + k).to(tl.int64)
        places = part[:, None] * length + i[None, :]
        found = tl.load(parts + places, mask=(part < count)[:, None] & mask[None, :], other=0.0)
        largest = tl.maximum(largest, found)
    tl.store(maxima + i, tl.max(largest, axis=0), mask=mask)


@triton.jit
def finish_maxima_kernel(row_parts, col_parts, row, col, finite, row_count, col_count, rows, cols, SIZE: tl.constexpr):
    """Write `SIZE` maxima of rows or of columns."""
    is_finite = tl.load(finite) != 0
    block = tl.program_id(0)
    row_blocks = tl.cdiv(rows, SIZE)
    if block < row_blocks:
        take_largest(row_parts, row_count, row, block, rows, is_finite, SIZE)
    else:
        take_largest(col_parts, col_count, col, block - row_blocks, cols, is_finite, SIZE)


def launch_maxima(
    weight: WeightTensor,
    gradient: GradientTensor,
    first: MomentTensor,
    row: Tensor,
    col: Tensor,
    rule: ElementRule,
    finite: Tensor,
) -> None:
    """Step a matrix whose sum of squares is kept as maxima, in two launches.

    Args:
        weight, gradient, first: the operands; a momentum is kept in full.
        row, col: the maxima, fp32.
        rule: its `eps`, `step`, `keep` and `first_weight`.
        finite: 0-d bool on the device; nothing is written where it is False.
    """
    rows, cols = weight.param.shape
    cut = cut_into_strips(rows, cols, 1, TILE)
    sizes = [cut.across * rows, cut.strips * cols]
    room = torch.empty(sum(sizes), dtype=torch.float32, device=weight.param.device)
    row_parts, col_parts = room.split(sizes)
    with on_device(weight.param):
        maxima_kernel[(cut.across, cut.strips)](
            weight.param,
            weight.extra,
            gradient.grad,
            gradient.on_device,
            first.data,
            row,
            col,
            row_parts,
            col_parts,
            view_flag(finite),
            rule.on_device,
            weight.clock,
            rows,
            cols,
            cut.strip,
            weight.start,
            signed_key(weight.key),
            first.start,
            signed_key(first.key),
            gradient.on_host,
            rule.eps,
            on_host(rule.step),
            on_host(rule.keep),
            on_host(rule.first_weight),
            HOW=int(weight.how),
            FIRST=int(first.kind),
            HEIGHT=cut.height,
            WIDTH=cut.width,
            num_warps=WIDE_WARPS,
            **OPTIONS,
        )
        finish_maxima_kernel[(triton.cdiv(rows, VECTOR) + triton.cdiv(cols, VECTOR),)](
            row_parts,
            col_parts,
            row,
            col,
            view_flag(finite),
            cut.across,
            cut.strips,
            rows,
            cols,
            SIZE=VECTOR,
            num_warps=WARPS,
            **OPTIONS,
        )
