"""Steps of many parameters in as many launches as those of one: every program finds its chunk in a table.

The functions that step a tile are those of elementwise.py and unfactored.py, so results have the same bits. A flag per
parameter says whether its gradient is finite; of one whose gradient is not, nothing is written.

Bytes are those of the single launches, and 136 for each chunk: its place, and the row of its parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optstate.kernels.rules import ElementRule, MatrixRule, on_host
from optstate.kernels.triton_steps.elementwise import WARPS, WARPS_OF_CODES, read_numbers, step_tile
from optstate.kernels.triton_steps.factored_kernels import find_coefficients
from optstate.kernels.triton_steps.launching import OPTIONS, on_device, view_flag
from optstate.kernels.triton_steps.operands import TILE, GradientTensor
from optstate.kernels.triton_steps.tables import ALIGNMENT, Column, Table, TensorRow
from optstate.kernels.triton_steps.tiles import find_key, mix_bits
from optstate.kernels.triton_steps.unfactored import APPLY_WARPS, MEASURING, MOVE_WARPS, apply_tile, move_tile

__all__ = ["CHUNK", "SMALL_CHUNK", "launch_checks", "launch_elementwise_table", "launch_unfactored_table"]

CHUNK = 16 * TILE
"""Elements that a program steps where every element goes its own way."""

SMALL_CHUNK = TILE
"""Elements that a program steps where the sums of a parameter are made of the sums of its chunks."""

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
    first_weight, inverse_correction, step, keep = read_numbers(numbers, first_weight, inverse_correction, step, keep)
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
    averaging, _, _, _ = read_numbers(numbers, averaging, 0.0, 0.0, 0.0)
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
    _, step, decay, after = read_numbers(numbers, 0.0, step, decay, after)
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


TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


def type_of(tensor: Tensor | None) -> Any:
    """Return Triton's word for a tensor's dtype; None for no tensor."""
    return None if tensor is None else TYPES[tensor.dtype]


def find_types(row: TensorRow, *names: str) -> dict[str, Any]:
    """Return the dtypes of a parameter's tensors, as constants of these names: those of all in a table are alike."""
    first, second = row.first, row.second
    found = {
        "PARAM_TYPE": row.weight.param,
        "EXTRA_TYPE": row.weight.extra,
        "GRAD_TYPE": row.grad,
        "FIRST_TYPE": first.data,
        "FIRST_SCALE_TYPE": first.scale,
        "SECOND_TYPE": second.data,
        "SECOND_SCALE_TYPE": second.scale,
    }
    return {name: type_of(tensor) for name, tensor in found.items() if not names or name in names}


def is_whole(table: Table) -> bool:
    """Return whether all counts are multiples of what is read at once."""
    return not any(count % ALIGNMENT for count in table.counts)


def launch_checks(table: Table, row: TensorRow, flags: Tensor, largest: float) -> None:
    """Clear the flag of every parameter whose gradient is not finite or too large, in one launch.

    flags: bool `[parameters]`, set. row: any of the table.
    """
    limit = min(largest, torch.finfo(torch.float32).max)
    with on_device(flags):
        check_table_kernel[(len(table.chunks),)](
            table.rows,
            table.chunks,
            view_flag(flags),
            limit,
            WHOLE=is_whole(table),
            CHUNK=table.chunk,
            TILE=TILE,
            num_warps=WARPS,
            **find_types(row, "GRAD_TYPE"),
            **OPTIONS,
        )


def launch_elementwise_table(
    table: Table, row: TensorRow, gradient: GradientTensor, rule: ElementRule, flags: Tensor, clock: int | Tensor
) -> None:
    """Step all parameters of a table in which every element goes its own way, in one launch.

    Args:
        table: in chunks of `CHUNK`.
        row: any of the table: formats are those of all.
        gradient: what is done to every gradient.
        rule: the formula and its numbers.
        flags: bool `[parameters]`; of a parameter whose flag is False nothing is written.
        clock: the number of the step, for random bits; a 0-d int64 tensor where only the device knows it.
    """
    weight, first, second = row.weight, row.first, row.second
    with on_device(flags):
        elementwise_table_kernel[(len(table.chunks),)](
            table.rows,
            table.chunks,
            view_flag(flags),
            rule.on_device,
            clock if isinstance(clock, Tensor) else None,
            gradient.on_device,
            first.table,
            second.table,
            0 if isinstance(clock, Tensor) else clock,
            0.0 if gradient.bound is None else gradient.bound,
            gradient.on_host,
            gradient.penalty,
            on_host(rule.first_weight),
            rule.second_weight,
            rule.mix,
            on_host(rule.inverse_correction),
            rule.eps,
            on_host(rule.step),
            on_host(rule.keep),
            HOW=int(weight.how),
            RULE=int(rule.rule),
            NESTEROV=bool(rule.nesterov),
            FIRST=int(first.kind),
            SECOND=int(second.kind),
            FIRST_BLOCK=first.block,
            SECOND_BLOCK=second.block,
            CLAMPS=gradient.bound is not None,
            PENALISES=gradient.penalty != 0.0,
            WHOLE=is_whole(table),
            CHUNK=table.chunk,
            TILE=TILE,
            num_warps=WARPS if first.table is None and second.table is None else WARPS_OF_CODES,
            **find_types(row),
            **OPTIONS,
        )


def launch_unfactored_table(
    table: Table, row: TensorRow, gradient: GradientTensor, rule: MatrixRule, flags: Tensor, clock: int | Tensor
) -> None:
    """Step all parameters of a table whose second moments are kept in full, in two launches.

    Args: as `launch_elementwise_table`; the table is in chunks of `SMALL_CHUNK`, at most `MEASURING` of a parameter.
    """
    weight, first = row.weight, row.first
    assert max(table.counts) <= MEASURING * SMALL_CHUNK
    of_updates, of_weights = torch.empty((2, table.slots), dtype=torch.float32, device=flags.device).unbind()
    bound = 0.0 if gradient.bound is None else gradient.bound
    common: dict[str, Any] = {
        "HOW": int(weight.how),
        "CLAMPS": gradient.bound is not None,
        "OF_WEIGHT": rule.least_rms is not None,
        "WHOLE": is_whole(table),
        "TILE": SMALL_CHUNK,
        **find_types(row, "PARAM_TYPE", "EXTRA_TYPE", "GRAD_TYPE"),
        **OPTIONS,
    }
    with on_device(flags):
        move_full_table_kernel[(len(table.chunks),)](
            table.rows,
            table.chunks,
            view_flag(flags),
            rule.on_device,
            gradient.on_device,
            of_updates,
            of_weights,
            bound,
            gradient.on_host,
            on_host(rule.averaging),
            rule.eps,
            num_warps=MOVE_WARPS,
            **common,
        )
        apply_full_table_kernel[(len(table.chunks),)](
            table.rows,
            table.chunks,
            view_flag(flags),
            rule.on_device,
            clock if isinstance(clock, Tensor) else None,
            gradient.on_device,
            of_updates,
            of_weights,
            0 if isinstance(clock, Tensor) else clock,
            bound,
            gradient.on_host,
            1.0 if rule.threshold is None else rule.threshold,
            0.0 if rule.least_rms is None else rule.least_rms,
            on_host(rule.step),
            on_host(rule.decay),
            rule.first_weight,
            on_host(rule.after),
            FIRST=int(first.kind),
            OF_UPDATE=rule.threshold is not None,
            DECAY_IS_SCALED=rule.decay_is_scaled,
            PROGRAMS=MEASURING,
            **find_types(row, "FIRST_TYPE"),
            num_warps=APPLY_WARPS,
            **common,
        )
