"""Steps in which every element, or block of elements, goes its own way: one launch, one program per tile.

A program reads a tile of the gradient, the weight and the moments, steps it in fp32 and writes it. Each is read once
and written once, which is also the floor: `4 * n * itemsize` bytes for weight and gradient less one write, and twice
the bytes of the state. No program waits for another, and none writes where the gradient was found not to be finite.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from optstate.kernels.native import StepRule
from optstate.kernels.rules import ElementRule, on_host
from optstate.kernels.triton_steps.launching import OPTIONS, on_device, view_flag
from optstate.kernels.triton_steps.moments import read_moment, write_moment
from optstate.kernels.triton_steps.operands import (
    TILE,
    GradientTensor,
    MomentTensor,
    WeightTensor,
    signed_key,
)
from optstate.kernels.triton_steps.tiles import find_key, read_gradient, read_weight, write_weight

__all__ = ["WARPS", "WARPS_OF_CODES", "find_numbers", "launch_elementwise", "move_average", "step_tile"]

ADAM = tl.constexpr(int(StepRule.ADAM))
LION = tl.constexpr(int(StepRule.LION))
AVERAGE = tl.constexpr(int(StepRule.AVERAGE))
HEAVY_BALL = tl.constexpr(int(StepRule.HEAVY_BALL))
ROOT_OF_SUM = tl.constexpr(int(StepRule.ROOT_OF_SUM))

WARPS = 4

WARPS_OF_CODES = 8
"""Where a moment is kept in codes: four elements per thread, as with eight a register spills on sm_80."""


@triton.jit
def move_average(old, new, weight):
    """Move averages towards new values as `torch.lerp` does: from whichever end is nearer."""
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))


@triton.jit
def find_update(g, m, v, first_weight, mix, inverse_correction, eps, step, RULE: tl.constexpr, NESTEROV: tl.constexpr):
    """Return what is subtracted from the weight, and the first moment as it is kept."""
    update = g * step
    if RULE == ADAM:
        m = move_average(m, g, first_weight)
        update = tl.div_rn(m * step, tl.sqrt_rn(v) * inverse_correction + eps)
    elif RULE == LION:
        direction = move_average(m, g, mix)
        update = tl.where(direction > 0, step, tl.where(direction < 0, -step, direction * step))
        m = move_average(m, g, first_weight)
    elif RULE == AVERAGE:
        m = move_average(m, g, first_weight)
        update = (move_average(m, g, first_weight) if NESTEROV else m) * step
    elif RULE == HEAVY_BALL:
        m = m * mix + g * first_weight
        update = (m * mix + g if NESTEROV else m) * step
    elif RULE == ROOT_OF_SUM:
        update = tl.div_rn(g * step, tl.sqrt_rn(v + eps))
    return update, m


@triton.jit
def step_tile(
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
    first_start,
    second_key,
    second_start,
    second_block,
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
    HOW: tl.constexpr,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    FIRST_BLOCK: tl.constexpr,
    SECOND_BLOCK: tl.constexpr,
    MOVES_SECOND: tl.constexpr,
    CLAMPS: tl.constexpr,
    PENALISES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Step the tile that begins at element `at`, int64, of which `left` elements may be written; none if below one."""
    j = tl.arange(0, TILE)
    mask = j < left
    x = read_gradient(grad + at, device_scale, j, mask, bound, scale, CLAMPS)
    if extra is not None:
        extra += at
    p = read_weight(param + at, extra, j, mask, HOW)
    if PENALISES:
        x += p * penalty
    m = x
    v = x
    if FIRST != 0:
        m = read_moment(first, first_scale, first_table, at, j, mask, FIRST_BLOCK, FIRST, FIRST_BLOCK)
    if SECOND != 0:
        v = read_moment(second, second_scale, second_table, at, j, mask, second_block, SECOND, SECOND_BLOCK)
        if RULE == ROOT_OF_SUM:
            v += x * x
        elif MOVES_SECOND:
            v = move_average(v, x * x, second_weight)
    update, m = find_update(x, m, v, first_weight, mix, inverse_correction, eps, step, RULE, NESTEROV)
    write_weight(param + at, extra, j, mask, p * keep - update, weight_key, start + at, HOW)
    if FIRST != 0:
        write_moment(
            first, first_scale, first_table, at, j, mask, m, first_key, first_start, left, FIRST, FIRST_BLOCK, TILE
        )
    if MOVES_SECOND:
        write_moment(
            second,
            second_scale,
            second_table,
            at,
            j,
            mask,
            v,
            second_key,
            second_start,
            left,
            SECOND,
            SECOND_BLOCK,
            TILE,
        )


@triton.jit
def find_numbers(numbers, first_weight, inverse_correction, step, keep):
    """Return the numbers of a step that change with the step: those of the device if it has them, else those given."""
    if numbers is not None:
        first_weight = tl.load(numbers)
        inverse_correction = tl.load(numbers + 1)
        step = tl.load(numbers + 2)
        keep = tl.load(numbers + 3)
    return first_weight, inverse_correction, step, keep


@triton.jit(do_not_specialize=["start", "weight_key", "first_key", "second_key", "first_start", "second_start"])
def elementwise_kernel(
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
    finite,
    numbers,
    clock,
    count,
    start,
    weight_key,
    first_key,
    first_start,
    second_key,
    second_start,
    second_block,
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
    HOW: tl.constexpr,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    FIRST_BLOCK: tl.constexpr,
    SECOND_BLOCK: tl.constexpr,
    MOVES_SECOND: tl.constexpr,
    CLAMPS: tl.constexpr,
    PENALISES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Step one tile."""
    at = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(count - at, TILE).to(tl.int32)
    if finite is not None:
        left = tl.where(tl.load(finite) != 0, left, 0)
    first_weight, inverse_correction, step, keep = find_numbers(numbers, first_weight, inverse_correction, step, keep)
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
        find_key(weight_key, clock),
        find_key(first_key, clock),
        first_start,
        find_key(second_key, clock),
        second_start,
        second_block,
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
        MOVES_SECOND,
        CLAMPS,
        PENALISES,
        TILE,
    )


def launch_elementwise(
    weight: WeightTensor,
    gradient: GradientTensor,
    first: MomentTensor,
    second: MomentTensor,
    rule: ElementRule,
    finite: Tensor | None,
    moves_second: bool,
) -> None:
    """Step a parameter and its moments, in one launch.

    Args:
        weight, gradient: the operands, with as many elements.
        first, second: moments of the rule; of no kind where there is none.
        rule: the formula and its numbers.
        finite: 0-d bool on the device; nothing is written where it is False. None if all is known to be finite.
        moves_second: whether the kernel moves the second moment; False where that was moved beforehand.
    """
    count = weight.param.numel()
    with on_device(weight.param):
        elementwise_kernel[(triton.cdiv(count, TILE),)](
            weight.param,
            weight.extra,
            gradient.grad,
            gradient.on_device,
            first.data,
            first.scale,
            first.table,
            second.data,
            second.scale,
            second.table,
            view_flag(finite),
            rule.on_device,
            weight.clock,
            count,
            weight.start,
            signed_key(weight.key),
            signed_key(first.key),
            first.start,
            signed_key(second.key),
            second.start,
            second.block,
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
            SECOND_BLOCK=second.block if moves_second else 1,
            MOVES_SECOND=moves_second,
            CLAMPS=gradient.bound is not None,
            PENALISES=gradient.penalty != 0.0,
            TILE=TILE,
            num_warps=WARPS if first.table is None and second.table is None else WARPS_OF_CODES,
            **OPTIONS,
        )
