"""Steps of many parameters in as many launches as those of one: every program finds its chunk in a table.

The functions that step a tile are those of elementwise.py and unfactored.py, so results have the same bits. A flag per
parameter says whether its gradient is finite; of one whose gradient is not, nothing is written.

Bytes are those of the single launches, and 136 for each chunk: its place, and the row of its parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from optstate.kernels.rules import ElementRule, MatrixRule, on_host
from optstate.kernels.triton_steps.elementwise import WARPS, WARPS_OF_CODES
from optstate.kernels.triton_steps.launching import OPTIONS, on_device, view_flag
from optstate.kernels.triton_steps.many_kernels import (
    apply_full_table_kernel,
    check_table_kernel,
    elementwise_table_kernel,
    move_full_table_kernel,
)
from optstate.kernels.triton_steps.operands import TILE, GradientTensor
from optstate.kernels.triton_steps.tables import ALIGNMENT, RowOfTable, Table
from optstate.kernels.triton_steps.unfactored import APPLY_WARPS, MEASURING, MOVE_WARPS

__all__ = ["CHUNK", "SMALL_CHUNK", "launch_checks", "launch_elementwise_table", "launch_unfactored_table"]

CHUNK = 16 * TILE
"""Elements that a program steps where every element goes its own way."""

SMALL_CHUNK = TILE
"""Elements that a program steps where the sums of a parameter are made of the sums of its chunks."""

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


def find_types(row: RowOfTable, *names: str) -> dict[str, Any]:
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


def launch_checks(table: Table, row: RowOfTable, flags: Tensor, largest: float) -> None:
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
    table: Table, row: RowOfTable, gradient: GradientTensor, rule: ElementRule, flags: Tensor, clock: int | Tensor
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
    table: Table, row: RowOfTable, gradient: GradientTensor, rule: MatrixRule, flags: Tensor, clock: int | Tensor
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
