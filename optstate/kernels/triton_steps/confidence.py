"""CAME's step in six launches: updates are averaged, and divided by how far they stray from their average.

1. to 3. as in factored.py: sums of squares, the statistic, the size of the update; without a clip no third.
4. `average_updates_kernel` reads the gradient, moves the average, and leaves row and column sums of the squares of its
   distance from the update. The first tiles of rows and columns write the first statistic.
5. `move_factored_kernel` moves the second statistic by these sums, in scratch memory.
6. `apply_factored_kernel` takes the average for the gradient, and writes the weight and the second statistic.

Bytes: the gradient three times, the average twice read and once written, the weight once each way, which is the floor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from optstate.kernels.rules import MatrixRule
from optstate.kernels.triton_steps.elementwise import move_average
from optstate.kernels.triton_steps.factored import FactoredLaunches
from optstate.kernels.triton_steps.factored_kernels import find_coefficients, find_root_of_mean
from optstate.kernels.triton_steps.launching import on_device, view_flag
from optstate.kernels.triton_steps.operands import GradientTensor
from optstate.kernels.triton_steps.tiles import read_gradient

__all__ = ["write_by_confidence"]


@triton.jit
def average_updates_kernel(
    grad,
    device_scale,
    average,
    row,
    col,
    new_row,
    new_col,
    row_roots,
    col_roots,
    row_means,
    squares,
    finite,
    row_parts,
    col_parts,
    rows,
    cols,
    strip,
    programs,
    bound,
    scale,
    count,
    threshold,
    first_weight,
    CLAMPS: tl.constexpr,
    OF_UPDATE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Move the average of updates in a strip of rows, `WIDTH` columns wide, and write the first statistic.

    Left in scratch memory are the sums of squares of update minus average, where `sum_squares_kernel` leaves its own.
    """
    clip, _ = find_coefficients(
        squares, squares + programs, programs, count, threshold, 0.0, 1.0, 0.0, OF_UPDATE, False, False, PROGRAMS
    )
    matrix = tl.program_id(2).to(tl.int64)
    matrices = tl.num_programs(2)
    is_finite = tl.load(finite) != 0
    i = tl.arange(0, HEIGHT)
    col_at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    in_cols = col_at < tl.where(is_finite, cols, 0)
    j = i[:, None] * cols + tl.arange(0, WIDTH)[None, :]
    begin = tl.program_id(1) * strip
    end = tl.minimum(begin + strip, rows)
    root = find_root_of_mean(row_means, matrix, tl.cdiv(rows, ROW_BLOCK), BLOCKS) * clip
    b = tl.load(col_roots + matrix * cols + col_at, mask=in_cols, other=0.0)
    in_columns = tl.zeros([HEIGHT, WIDTH], tl.float32)
    row_sums = row_parts + (tl.program_id(0).to(tl.int64) * matrices + matrix) * rows
    for top in range(begin, end, HEIGHT):
        row_at = top + i
        in_rows = row_at < tl.where(is_finite, end, 0)
        mask = in_rows[:, None] & in_cols[None, :]
        at = (matrix * rows + top) * cols + tl.program_id(0) * WIDTH
        a = tl.load(row_roots + matrix * rows + row_at, mask=in_rows, other=0.0) * root
        update = read_gradient(grad + at, device_scale, j, mask, bound, scale, CLAMPS) * a[:, None] * b[None, :]
        m = move_average(tl.load(average + at + j, mask=mask, other=0.0), update, first_weight)
        tl.store(average + at + j, m, mask=mask)
        distance = update - m
        square = distance * distance
        in_columns += square
        tl.store(row_sums + row_at, tl.sum(square, axis=1), mask=row_at < end)
        if tl.program_id(0) == 0:
            moved = tl.load(new_row + matrix * rows + row_at, mask=in_rows, other=0.0)
            tl.store(row + matrix * rows + row_at, moved, mask=in_rows)
    col_sums = col_parts + (tl.program_id(1).to(tl.int64) * matrices + matrix) * cols
    tl.store(col_sums + col_at, tl.sum(in_columns, axis=0), mask=col_at < cols)
    if tl.program_id(1) == 0:
        moved = tl.load(new_col + matrix * cols + col_at, mask=in_cols, other=0.0)
        tl.store(col + matrix * cols + col_at, moved, mask=in_cols)


def write_by_confidence(
    launches: FactoredLaunches, average: Tensor, row: Tensor, col: Tensor, residual: MatrixRule
) -> None:
    """Launch what follows `launches.sum_and_move()`: the step writes the average, the weight and both statistics.

    Args:
        launches: of the first statistic; its rule has the clip and the share of a new update in the average.
        average: of updates, fp32, of the parameter's shape.
        row, col: the second statistic.
        residual: the numbers of the second statistic and of the write.
    """
    if launches.measures:
        launches.measure()
    gradient, rule = launches.gradient, launches.rule
    with on_device(average):
        average_updates_kernel[launches.strip_grid](
            gradient.grad,
            gradient.on_device,
            average,
            launches.row,
            launches.col,
            launches.new_row,
            launches.new_col,
            launches.row_roots,
            launches.col_roots,
            launches.row_means,
            launches.squares,
            view_flag(launches.finite),
            launches.row_parts,
            launches.col_parts,
            launches.rows,
            launches.cols,
            launches.strip,
            launches.programs,
            0.0 if gradient.bound is None else gradient.bound,
            gradient.on_host,
            launches.count,
            1.0 if rule.threshold is None else rule.threshold,
            rule.first_weight,
            CLAMPS=gradient.bound is not None,
            OF_UPDATE=rule.threshold is not None,
            PROGRAMS=launches.padded_programs,
            **launches.tile_options,
        )
    launches.move(row, col, residual, None)
    launches.apply(GradientTensor(average), row, col, residual)
