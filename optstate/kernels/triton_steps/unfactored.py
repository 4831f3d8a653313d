"""The steps of factored.py for a second moment that is kept in full: of vectors, which have nothing to factor.

Two launches: `move_full_kernel` moves the moment and leaves sums of squares of the update and of the weight, and
`apply_full_kernel` writes the weight. The check of the gradient comes before both. Bytes: the gradient twice, without
the check; the weight twice read and once written; the moment twice read and once written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optstate.kernels.rules import MatrixRule, on_host
from optstate.kernels.triton_steps.elementwise import find_numbers, move_average
from optstate.kernels.triton_steps.factored_kernels import find_coefficients
from optstate.kernels.triton_steps.launching import OPTIONS, on_device, view_flag
from optstate.kernels.triton_steps.moments import read_moment, write_moment
from optstate.kernels.triton_steps.operands import GradientTensor, MomentTensor, WeightTensor, signed_key
from optstate.kernels.triton_steps.tiles import find_key, read_gradient, read_weight, write_weight

__all__ = ["APPLY_WARPS", "MEASURING", "MOVE_WARPS", "TILE", "apply_tile", "launch_unfactored", "move_tile"]

TILE = 1024
MEASURING = 512
"""Programs that measure, at most, as in factored.py. Their sums are added up as if there were as many, in one order."""

MOVE_WARPS, APPLY_WARPS = 4, 8
"""Of both launches: with other numbers of warps a register of a variant spilled on sm_90 or sm_100."""


@triton.jit
def move_tile(
    param,
    extra,
    grad,
    device_scale,
    second,
    at,
    mask,
    bound,
    scale,
    averaging,
    eps,
    HOW: tl.constexpr,
    CLAMPS: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Move the tile of the moment that begins at `at`; return the squares of the update and of the weight."""
    j = tl.arange(0, TILE)
    x = read_gradient(grad + at, device_scale, j, mask, bound, scale, CLAMPS)
    v = move_average(tl.load(second + at + j, mask=mask, other=1.0), x * x + eps, averaging)
    tl.store(second + at + j, v, mask=mask)
    update = tl.div_rn(x, tl.sqrt_rn(v))
    of_update = tl.where(mask, update * update, 0.0)
    of_weight = tl.zeros([TILE], tl.float32)
    if OF_WEIGHT:
        if extra is not None:
            extra += at
        p = read_weight(param + at, extra, j, mask, HOW)
        of_weight += p * p
    return of_update, of_weight


@triton.jit
def apply_tile(
    param,
    extra,
    grad,
    device_scale,
    first,
    second,
    at,
    mask,
    start,
    weight_key,
    first_start,
    first_key,
    bound,
    scale,
    step,
    decay,
    first_weight,
    after,
    HOW: tl.constexpr,
    FIRST: tl.constexpr,
    CLAMPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the tile of the weight and of the momentum that begins at `at`."""
    j = tl.arange(0, TILE)
    x = read_gradient(grad + at, device_scale, j, mask, bound, scale, CLAMPS)
    if extra is not None:
        extra += at
    p = read_weight(param + at, extra, j, mask, HOW) * (1.0 - decay)
    update = tl.div_rn(x, tl.sqrt_rn(tl.load(second + at + j, mask=mask, other=1.0))) * step
    if FIRST != 0:
        m = move_average(read_moment(first, None, None, at, j, mask, 1, FIRST, 1), update, first_weight)
        write_moment(first, None, None, at, j, mask, m, first_key, first_start, 0, FIRST, 1, 1)
        update = m * after
    write_weight(param + at, extra, j, mask, p - update, weight_key, start + at, HOW)


@triton.jit
def move_full_kernel(
    param,
    extra,
    grad,
    device_scale,
    second,
    of_updates,
    of_weights,
    finite,
    numbers,
    count,
    bound,
    scale,
    averaging,
    eps,
    HOW: tl.constexpr,
    CLAMPS: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Move every n-th tile of the moment; leave sums of squares of the update and of the weight: `[programs]` each."""
    averaging, _, _, _ = find_numbers(numbers, averaging, 0.0, 0.0, 0.0)
    program, programs = tl.program_id(0), tl.num_programs(0)
    end = tl.where(tl.load(finite) != 0, count, 0)
    of_update = tl.zeros([TILE], tl.float32)
    of_weight = tl.zeros([TILE], tl.float32)
    for tile in range(program, tl.cdiv(count, TILE), programs):
        at = tl.cast(tile, tl.int64) * TILE
        mask = at + tl.arange(0, TILE) < end
        more = move_tile(
            param,
            extra,
            grad,
            device_scale,
            second,
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
        of_update += more[0]
        of_weight += more[1]
    tl.store(of_updates + program, tl.sum(of_update, axis=0))
    tl.store(of_weights + program, tl.sum(of_weight, axis=0))


@triton.jit(do_not_specialize=["start", "weight_key", "first_key", "first_start", "programs"])
def apply_full_kernel(
    param,
    extra,
    grad,
    device_scale,
    first,
    second,
    of_updates,
    of_weights,
    finite,
    numbers,
    clock,
    count,
    programs,
    start,
    weight_key,
    first_start,
    first_key,
    bound,
    scale,
    elements,
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
    PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write a tile of the weight and of the momentum."""
    _, step, decay, after = find_numbers(numbers, 0.0, step, decay, after)
    step, decay = find_coefficients(
        of_updates,
        of_weights,
        programs,
        elements,
        threshold,
        least_rms,
        step,
        decay,
        OF_UPDATE,
        OF_WEIGHT,
        DECAY_IS_SCALED,
        PROGRAMS,
    )
    at = tl.program_id(0).to(tl.int64) * TILE
    mask = at + tl.arange(0, TILE) < tl.where(tl.load(finite) != 0, count, 0)
    apply_tile(
        param,
        extra,
        grad,
        device_scale,
        first,
        second,
        at,
        mask,
        start,
        find_key(weight_key, clock),
        first_start,
        find_key(first_key, clock),
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


def launch_unfactored(
    weight: WeightTensor,
    gradient: GradientTensor,
    first: MomentTensor,
    second: Tensor,
    rule: MatrixRule,
    finite: Tensor,
) -> None:
    """Step a parameter whose second moment is kept in full, in two launches.

    Args:
        weight, gradient, first: the operands; a momentum is kept in full.
        second: the moment, fp32, with as many elements.
        rule: the numbers of the step.
        finite: 0-d bool on the device; nothing is written where it is False.
    """
    count = weight.param.numel()
    tiles = triton.cdiv(count, TILE)
    programs = min(tiles, MEASURING)
    of_updates, of_weights = torch.empty((2, MEASURING), dtype=torch.float32, device=weight.param.device).unbind()
    bound = 0.0 if gradient.bound is None else gradient.bound
    with on_device(weight.param):
        move_full_kernel[(programs,)](
            weight.param,
            weight.extra,
            gradient.grad,
            gradient.on_device,
            second,
            of_updates,
            of_weights,
            view_flag(finite),
            rule.on_device,
            count,
            bound,
            gradient.on_host,
            on_host(rule.averaging),
            rule.eps,
            HOW=int(weight.how),
            CLAMPS=gradient.bound is not None,
            OF_WEIGHT=rule.least_rms is not None,
            TILE=TILE,
            num_warps=MOVE_WARPS,
            **OPTIONS,
        )
        apply_full_kernel[(tiles,)](
            weight.param,
            weight.extra,
            gradient.grad,
            gradient.on_device,
            first.data,
            second,
            of_updates,
            of_weights,
            view_flag(finite),
            rule.on_device,
            weight.clock,
            count,
            programs,
            weight.start,
            signed_key(weight.key),
            first.start,
            signed_key(first.key),
            bound,
            gradient.on_host,
            float(count),
            1.0 if rule.threshold is None else rule.threshold,
            0.0 if rule.least_rms is None else rule.least_rms,
            on_host(rule.step),
            on_host(rule.decay),
            rule.first_weight,
            on_host(rule.after),
            HOW=int(weight.how),
            FIRST=int(first.kind),
            CLAMPS=gradient.bound is not None,
            OF_UPDATE=rule.threshold is not None,
            OF_WEIGHT=rule.least_rms is not None,
            DECAY_IS_SCALED=rule.decay_is_scaled,
            PROGRAMS=MEASURING,
            TILE=TILE,
            num_warps=APPLY_WARPS,
            **OPTIONS,
        )
