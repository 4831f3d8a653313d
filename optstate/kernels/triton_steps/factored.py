"""Steps with a factored second moment in four launches: sums, the statistic, the update's size, the write.

1. `sum_squares_kernel` reads the gradient; every program leaves row and column sums of its strip in scratch memory.
2. `move_factored_kernel` adds these up, moves the statistic in scratch memory and clears the flag where sums overflow.
3. `measure_kernel` reads gradient and weight for the sums of squares of the update and of the weight. Without a clip
   and without a scale by the weight's root mean square there is nothing to measure, and no such launch.
4. `apply_factored_kernel` reads gradient and weight once more, and writes the weight and the statistic.

Bytes: the gradient three times, the weight twice read and once written; scratch memory is 3 % of an fp32 gradient or
less. The floor is two times and once: a clip needs the sums before it, and the write needs the clip.

No program adds to a number of another one, so that results have the same bits on every run and device: every sum has a
place of its own in scratch memory, and whoever needs the total adds the places up in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from optstate.kernels.rules import MatrixRule, on_host
from optstate.kernels.triton_steps.factored_kernels import (
    apply_factored_kernel,
    measure_kernel,
    move_factored_kernel,
    sum_squares_kernel,
)
from optstate.kernels.triton_steps.launching import OPTIONS, on_device, view_flag
from optstate.kernels.triton_steps.operands import GradientTensor, MomentTensor, WeightTensor, signed_key

__all__ = ["WARPS", "WIDE_WARPS", "Cut", "FactoredLaunches", "cut_into_strips"]

TILE = 4096
"""Elements of a tile of rows and columns."""

WIDEST = 256
"""Columns of a tile, at most."""

FEWEST_ROWS = 128
"""Rows of a strip whose column sums have a place of their own: 3 % of the gradient's size in fp32 is written."""

MOST_COLUMN_SUMS = 1 << 22
"""Numbers that the column sums of all strips may take, 16 MB: strips of a large parameter are longer."""

VECTOR = 256
"""Numbers of a statistic that a program moves."""

MEASURING = 1024
"""Programs that measure, each of which leaves two sums; the same number on every device, for the same bits."""

WARPS = 4
"""Of the launches that make sums."""

WIDE_WARPS = 8
"""Of those with several tensors: 16 elements per thread, so that registers leave room for six programs or more."""


class Cut(NamedTuple):
    """How matrices are cut into tiles of `width` columns and `height` rows.

    across: tiles beside each other. strip: rows whose column sums have a place of their own; strips: their number.
    """

    width: int
    height: int
    across: int
    strip: int
    strips: int


def cut_into_strips(rows: int, cols: int, matrices: int, tile: int = TILE) -> Cut:
    """Return how matrices of one shape are cut, the same on every device. tile: elements of a tile."""
    width = min(WIDEST, triton.next_power_of_2(cols))
    height = tile // width
    longest = triton.cdiv(rows * cols * matrices, MOST_COLUMN_SUMS)
    strip = triton.cdiv(max(FEWEST_ROWS, longest), height) * height
    return Cut(width, height, triton.cdiv(cols, width), strip, triton.cdiv(rows, strip))


@dataclass
class FactoredLaunches:
    """The launches of one step of a parameter of shape `[..., rows, cols]`, to be made in the order of the methods.

    Attributes:
        weight, gradient, first: the operands; a momentum is kept in full.
        row, col: the statistic, fp32 `[..., rows]` and `[..., cols]`.
        rule: the numbers of the step.
        finite: 0-d bool on the device. The second launch clears it where a sum overflows, if `clears`.
    """

    weight: WeightTensor
    gradient: GradientTensor
    first: MomentTensor
    row: Tensor
    col: Tensor
    rule: MatrixRule
    finite: Tensor
    clears: bool

    def __post_init__(self) -> None:
        *batch, self.rows, self.cols = self.weight.param.shape
        self.matrices = torch.Size(batch).numel()
        cut = cut_into_strips(self.rows, self.cols, self.matrices)
        self.width, self.height, self.across, self.strip, self.strips = cut
        self.tiles = self.matrices * triton.cdiv(self.rows, self.height) * self.across
        self.programs = min(self.tiles, MEASURING)
        self.row_blocks = triton.cdiv(self.rows, VECTOR)
        self._take_scratch()

    def _take_scratch(self) -> None:
        """Take the scratch memory of all launches at once."""
        rows, cols = self.matrices * self.rows, self.matrices * self.cols
        sizes = [self.across * rows, self.strips * cols, rows, cols, rows, cols, self.matrices * self.row_blocks]
        sizes.append(2 * self.programs)
        room = torch.empty(sum(sizes), dtype=torch.float32, device=self.weight.param.device)
        parts = room.split(sizes)
        self.row_parts, self.col_parts, self.new_row, self.new_col, self.row_roots, self.col_roots = parts[:6]
        self.row_means, self.squares = parts[6:]

    @property
    def measures(self) -> bool:
        """Whether the step needs the size of the update or of the weight."""
        return self.rule.threshold is not None or self.rule.least_rms is not None

    def sum_and_move(self) -> None:
        """Launch the sums and the statistic, in scratch memory. The flag is right afterwards; nothing is written."""
        self.sum_squares()
        self.move(self.row, self.col, self.rule, self.finite if self.clears else None)

    def write(self) -> None:
        """Launch the measurement, if the step needs one, and the write."""
        if self.measures:
            self.measure()
        self.apply(self.gradient, self.row, self.col, self.rule)

    def sum_squares(self) -> None:
        """Launch the sums of squares of the gradient, of rows and columns: every strip has a place of its own."""
        gradient = self.gradient
        with on_device(gradient.grad):
            sum_squares_kernel[self.strip_grid](
                gradient.grad,
                gradient.on_device,
                self.row_parts,
                self.col_parts,
                self.rows,
                self.cols,
                self.strip,
                0.0 if gradient.bound is None else gradient.bound,
                gradient.on_host,
                CLAMPS=gradient.bound is not None,
                HEIGHT=self.height,
                WIDTH=self.width,
                num_warps=WARPS,
                **OPTIONS,
            )

    def move(self, row: Tensor, col: Tensor, rule: MatrixRule, finite: Tensor | None) -> None:
        """Launch the addition of all sums, and move a statistic by them, in scratch memory.

        finite: the flag that is cleared where a sum overflows; None to leave the flag alone.
        """
        with on_device(row):
            move_factored_kernel[(self.row_blocks + triton.cdiv(self.cols, VECTOR), self.matrices)](
                self.row_parts,
                self.col_parts,
                row,
                col,
                self.new_row,
                self.new_col,
                self.row_roots,
                self.col_roots,
                self.row_means,
                view_flag(finite),
                rule.on_device,
                self.across,
                self.strips,
                self.rows,
                self.cols,
                on_host(rule.averaging),
                rule.eps,
                SIZE=VECTOR,
                num_warps=WARPS,
                **OPTIONS,
            )

    def measure(self) -> None:
        """Launch the sums of squares of the update, and of the weight."""
        gradient, weight = self.gradient, self.weight
        with on_device(weight.param):
            measure_kernel[(self.programs,)](
                weight.param,
                weight.extra,
                gradient.grad,
                gradient.on_device,
                self.row_roots,
                self.col_roots,
                self.row_means,
                self.squares,
                self.matrices,
                self.rows,
                self.cols,
                0.0 if gradient.bound is None else gradient.bound,
                gradient.on_host,
                HOW=int(weight.how),
                CLAMPS=gradient.bound is not None,
                OF_UPDATE=self.rule.threshold is not None,
                OF_WEIGHT=self.rule.least_rms is not None,
                **self.tile_options,
            )

    def apply(self, gradient: GradientTensor, row: Tensor, col: Tensor, rule: MatrixRule) -> None:
        """Launch the write of the weight, of the momentum, and of the statistic that was moved last."""
        weight = self.weight
        with on_device(weight.param):
            apply_factored_kernel[(self.tiles,)](
                weight.param,
                weight.extra,
                gradient.grad,
                gradient.on_device,
                self.first.data,
                row,
                col,
                self.new_row,
                self.new_col,
                self.row_roots,
                self.col_roots,
                self.row_means,
                self.squares,
                view_flag(self.finite),
                rule.on_device,
                weight.clock,
                self.matrices,
                self.rows,
                self.cols,
                self.programs,
                weight.start,
                signed_key(weight.key),
                self.first.start,
                signed_key(self.first.key),
                0.0 if gradient.bound is None else gradient.bound,
                gradient.on_host,
                self.count,
                1.0 if rule.threshold is None else rule.threshold,
                0.0 if rule.least_rms is None else rule.least_rms,
                on_host(rule.step),
                on_host(rule.decay),
                rule.first_weight,
                on_host(rule.after),
                HOW=int(weight.how),
                FIRST=int(self.first.kind),
                CLAMPS=gradient.bound is not None,
                OF_UPDATE=rule.threshold is not None,
                OF_WEIGHT=rule.least_rms is not None,
                DECAY_IS_SCALED=rule.decay_is_scaled,
                PROGRAMS=self.padded_programs,
                **self.tile_options,
            )

    @property
    def strip_grid(self) -> tuple[int, int, int]:
        """The programs of a launch over strips: of columns, of rows, of matrices."""
        return self.across, self.strips, self.matrices

    @property
    def count(self) -> float:
        """Elements of the parameter, as kernels divide by them."""
        return float(self.matrices * self.rows * self.cols)

    @property
    def padded_programs(self) -> int:
        """The programs that measure, up to the next power of two."""
        return int(triton.next_power_of_2(self.programs))

    @property
    def tile_options(self) -> dict[str, Any]:
        """Constants of kernels that read the factors of an update, tile by tile."""
        return {
            "BLOCKS": triton.next_power_of_2(self.row_blocks),
            "ROW_BLOCK": VECTOR,
            "HEIGHT": self.height,
            "WIDTH": self.width,
            "num_warps": WIDE_WARPS,
            **OPTIONS,
        }
