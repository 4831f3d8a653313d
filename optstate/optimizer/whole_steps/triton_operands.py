"""The operands of steps in Triton: a parameter, a gradient and moments, as tensors on a device, and formats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optstate.kernels import name_key, noise_key
from optstate.kernels.native import NUMBERS, MomentKind, WriteKind
from optstate.kernels.triton_steps import GradientTensor, MomentTensor, WeightTensor, make_table, why_no_triton
from optstate.optimizer.plan import SlotPlan
from optstate.optimizer.whole_steps.operands import KeptMoment, WrittenWeight, as_number
from optstate.spec import ParamSpec, is_fake
from optstate.stores.block_codes import E4M3
from optstate.updates import Context

__all__ = [
    "are_launchable",
    "check_gradient",
    "fit_plan",
    "fits_tiles",
    "flag_of",
    "gradient_tensor",
    "moment_tensor",
    "weight_tensor",
]

FEWEST_ELEMENTS = 1 << 12
"""Elements that each of several matrices has at least: smaller ones, such as 3 x 3 kernels, do not fill a tile."""

MOST_MATRICES = (1 << 16) - 1
"""Matrices of a parameter: the largest size of a launch along its third dimension."""

MOST_COLUMNS = 1 << 22
"""Columns of a matrix: places within a tile are 32-bit numbers."""


def are_launchable(*tensors: Tensor) -> bool:
    """Return whether kernels may be given these tensors: real, without gaps, on a device that Triton knows."""
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not is_fake(tensor)
        and not why_no_triton(tensor.device)
        for tensor in tensors
    )


def gradient_tensor(ctx: Context, bound: float | None, penalty: float = 0.0) -> GradientTensor | None:
    """Return the gradient as kernels read it; None if they cannot."""
    grad, scale = ctx.grad, as_number(ctx.grad_scale)
    if grad.dtype not in NUMBERS or grad.numel() != ctx.param.numel() or not are_launchable(grad):
        return None
    if scale is not None:
        return GradientTensor(grad.detach(), bound, scale, penalty)
    coefficient = ctx.grad_scale
    assert isinstance(coefficient, Tensor)
    fits = coefficient.numel() == 1 and coefficient.dtype == torch.float32 and coefficient.device == grad.device
    return GradientTensor(grad.detach(), bound, coefficient, penalty) if fits and are_launchable(coefficient) else None


def weight_tensor(written: WrittenWeight, state: Mapping[str, Any], ctx: Context) -> WeightTensor | None:
    """Return the parameter as kernels read and write it; None if they cannot."""
    param, extra = ctx.param, state[written.key] if written.key else None
    if param.dtype != ctx.spec.dtype or not are_launchable(param):
        return None
    if extra is not None:
        dtype = {WriteKind.SPLIT16: torch.int16, WriteKind.SPLIT8: torch.int8}.get(written.how, param.dtype)
        if extra.dtype != dtype or extra.numel() != param.numel() or not are_launchable(extra):
            return None
    key = random_key(ctx.spec.name, ctx, written.seed) if written.how == WriteKind.STOCHASTIC else 0
    return WeightTensor(param.detach(), extra, written.how, _first_index(ctx.spec), key, ctx.clock)


def random_key(name: str, ctx: Context, seed: int = 0) -> int:
    """Return the key of random bits: of a name and the step, or of the name alone where the device counts steps."""
    return noise_key(name, ctx.step, seed) if ctx.clock is None else name_key(name, seed)


def moment_tensor(kept: KeptMoment | None, state: Mapping[str, Any], ctx: Context, share: float) -> MomentTensor | None:
    """Return a moment as kernels read and write it, one of no kind where there is none; None if they cannot.

    share: of the new value in this step's average.

    Raises:
        ValueError: if the store would round such a step away.
    """
    if kept is None:
        return MomentTensor()
    store, fields = kept.slot.store, kept.slot.fields
    store.check_weight(share)
    data, scale = state[kept.codes], state[kept.scale] if kept.scale else None
    count, dtype = ctx.param.numel(), fields["" if scale is None else "codes"].dtype
    codes = -(-count // 2) if kept.kind in (MomentKind.SIGNED4, MomentKind.LINEAR4) else count
    if data.dtype != dtype or data.numel() != codes or not are_launchable(data):
        return None
    if scale is not None:
        if scale.dtype != torch.float32 or scale.numel() != -(-count // kept.block) or not are_launchable(scale):
            return None
        book = E4M3 if kept.kind in (MomentKind.SIGNED_E4M3, MomentKind.UNSIGNED_E4M3) else store.codebook
        assert book is not None
        return MomentTensor(data.view(torch.uint8), scale, kept.kind, make_table(book, data.device), kept.block)
    if kept.kind == MomentKind.FULL16 and store.is_random(share):
        key = random_key(f"{ctx.spec.name}/{kept.slot.name}", ctx)
        return MomentTensor(data, kind=MomentKind.FULL16_RANDOM, key=key, start=_first_index(ctx.spec))
    return MomentTensor(data, kind=kept.kind)


def fit_plan(slot: SlotPlan, moments: Sequence[Tensor]) -> bool:
    """Return whether kernels may read the tensors of a slot, which is whole here, as what was planned."""
    pairs = zip(moments, slot.fields.values(), strict=True)
    return all(m.dtype == field.dtype and m.shape == field.shape for m, field in pairs) and are_launchable(*moments)


def _first_index(spec: ParamSpec) -> int:
    """Return the flat index, in the whole parameter, of the first element here."""
    return (spec.region.start or 0) if spec.region is not None else 0


def fits_tiles(spec: ParamSpec) -> bool:
    """Return whether tiles of rows and columns suit the shape of a parameter."""
    *batch, rows, cols = spec.shape
    matrices = math.prod(batch)
    return cols <= MOST_COLUMNS and (matrices == 1 or (rows * cols >= FEWEST_ELEMENTS and matrices <= MOST_MATRICES))


def check_gradient(grad: Tensor, largest: float, ctx: Context) -> None:
    """Check the gradient unless that was done."""
    from optstate.kernels.triton_steps.finite import launch_finite_check

    if not ctx.guard.checked:
        ctx.guard.check(launch_finite_check(grad, largest))


def flag_of(ctx: Context) -> Tensor:
    """Return the guard's flag, or one that is set: the host knows that the gradient is finite, or nobody looked yet."""
    if ctx.guard.finite is not None:
        return ctx.guard.finite
    return torch.ones((), dtype=torch.bool, device=ctx.param.device)
