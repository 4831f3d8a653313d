"""The operands of compiled steps: a parameter, a gradient and moments, as addresses and formats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optstate.kernels import Codebook, name_key, native, noise_key
from optstate.kernels.decades import find_decades
from optstate.kernels.native import NUMBERS, MomentKind, WriteKind
from optstate.optimizer.plan import ParamPlan, SlotPlan
from optstate.optimizer.whole_steps.base import is_plain
from optstate.spec import ParamSpec
from optstate.stores import Block4, Block8, Float8, Full
from optstate.updates import Context
from optstate.weights import Kahan, Plain, Split, StochasticRounding

__all__ = ["KeptMoment", "WrittenWeight", "are_as_planned", "as_number", "gradient", "takes"]


def takes(spec: ParamSpec) -> bool:
    """Return whether the compiled code knows parameters of this dtype, and this part of a parameter."""
    return spec.dtype in NUMBERS and (spec.region is None or spec.region.start is not None)


def as_number(value: Any) -> float | None:
    """Return a number that the host has, as a float; None if only a device knows it."""
    if isinstance(value, float):
        return value
    if isinstance(value, Tensor):
        return float(value) if is_plain(value) and value.numel() == 1 else None
    return float(value)


def gradient(ctx: Context, bound: float | None) -> native.GradientOperand | None:
    """Return the gradient as C code reads it; None if C code cannot."""
    grad, given = ctx.grad, ctx.grad_scale
    scale = given if type(given) is float else as_number(given)
    if scale is None or grad.dtype not in NUMBERS or not is_plain(grad) or grad.numel() != ctx.param.numel():
        return None
    clamp = math.inf if bound is None else bound
    return native.GradientOperand(grad.data_ptr(), NUMBERS[grad.dtype], clamp, scale, 0.0)


def _first_index(spec: ParamSpec) -> int:
    """Return the flat index, in the whole parameter, of the first element here."""
    return (spec.region.start or 0) if spec.region is not None else 0


def are_as_planned(slot: SlotPlan, moments: Sequence[Tensor]) -> bool:
    """Return whether C code may read the tensors of a slot, which is whole here, as what was planned."""
    for moment, field in zip(moments, slot.fields.values(), strict=True):
        if moment.dtype != field.dtype or moment.shape != field.shape:
            return False
    return is_plain(*moments)


_CORRECTIONS = {WriteKind.SPLIT16: torch.int16, WriteKind.SPLIT8: torch.int8}
"""The dtype of what is kept beside a parameter, where that is not the parameter's."""


@dataclass(frozen=True)
class WrittenWeight:
    """How a parameter is written by C code."""

    how: WriteKind
    key: str = ""
    seed: int = 0

    @staticmethod
    def of(plan: ParamPlan) -> WrittenWeight | None:
        """Return how a plan's parameter is written; None if the compiled code does not know the way."""
        match plan.weights:
            case Plain():
                return WrittenWeight(WriteKind.PLAIN)
            case StochasticRounding(seed=seed):
                return WrittenWeight(WriteKind.STOCHASTIC, seed=seed)
            case Kahan():
                return WrittenWeight(WriteKind.KAHAN, plan.weight_keys["compensation"])
            case Split(bits=bits):
                how = WriteKind.SPLIT16 if bits == 16 else WriteKind.SPLIT8
                return WrittenWeight(how, plan.weight_keys["correction"])
        return None

    def operand(self, state: Mapping[str, Any], ctx: Context) -> native.WeightOperand | None:
        """Return the parameter as C code reads and writes it; None if C code cannot."""
        param, spec = ctx.param, ctx.spec
        extra = state[self.key] if self.key else None
        if not is_plain(param) or param.dtype != spec.dtype:
            return None
        if extra is not None:
            dtype = _CORRECTIONS.get(self.how, spec.dtype)
            if not is_plain(extra) or extra.dtype != dtype or extra.numel() != param.numel():
                return None
        key = noise_key(spec.name, ctx.step, self.seed) if self.how is WriteKind.STOCHASTIC else 0
        address = None if extra is None else extra.data_ptr()
        start = 0 if spec.region is None else _first_index(spec)
        return native.WeightOperand(param.data_ptr(), address, start, NUMBERS[param.dtype], self.how, key)

    def name_key(self, name: str) -> int:
        """Return what stands for the parameter's name in the random bits of its roundings."""
        return name_key(name, self.seed) if self.how is WriteKind.STOCHASTIC else 0


@dataclass(frozen=True)
class KeptMoment:
    """How C code keeps a moment that it moves itself.

    codes, scale: keys in the state; scale is "" where a moment has no scales.
    """

    slot: SlotPlan
    kind: MomentKind
    codes: str
    scale: str = ""
    block: int = 1

    @staticmethod
    def of(slot: SlotPlan) -> KeptMoment | None:
        """Return how a slot is kept; None if the compiled code does not know the format."""
        store, keys = slot.store, slot.keys
        if isinstance(store, Full):
            if slot.fields[""].dtype == torch.float64:
                return None
            kind = MomentKind.FULL32 if slot.fields[""].dtype == torch.float32 else MomentKind.FULL16
            return KeptMoment(slot, kind, keys[""])
        kinds = {
            Block8: (MomentKind.SIGNED8, MomentKind.UNSIGNED8),
            Float8: (MomentKind.SIGNED_E4M3, MomentKind.UNSIGNED_E4M3),
        }
        kinds[Block4] = (MomentKind.SIGNED4, MomentKind.LINEAR4)
        if type(store) not in kinds or native.TILE % store.block:  # type: ignore[attr-defined]
            return None
        signed, unsigned = kinds[type(store)]  # type: ignore[index]
        kind = signed if store.signed else unsigned  # type: ignore[attr-defined]
        return KeptMoment(slot, kind, keys["codes"], keys["absmax"], store.block)  # type: ignore[attr-defined]

    def operand(self, state: Mapping[str, Any], ctx: Context, weight: float) -> native.MomentOperand | None:
        """Return the moment as C code reads and writes it; None if C code cannot.

        weight: share of the new value in this step's average.

        Raises:
            ValueError: if the store would round such a step away.
        """
        store = self.slot.store
        store.check_weight(weight)
        data, scale = state[self.codes], state[self.scale] if self.scale else None
        dtype, count = self.slot.fields["" if scale is None else "codes"].dtype, ctx.param.numel()
        codes = -(-count // 2) if self.kind in _HALVES else count
        if not is_plain(data) or data.dtype != dtype or data.numel() != codes:
            return None
        if scale is not None:
            maxima = -(-count // self.block)
            if not is_plain(scale) or scale.dtype != torch.float32 or scale.numel() != maxima:
                return None
        if scale is None:
            if self.kind == MomentKind.FULL16 and store.is_random(weight):
                key = noise_key(f"{ctx.spec.name}/{self.slot.name}", ctx.step)
                return native.MomentOperand(
                    data.data_ptr(), start=_first_index(ctx.spec), kind=MomentKind.FULL16_RANDOM, key=key
                )
            return native.MomentOperand(data.data_ptr(), kind=self.kind)
        tables = _tables(store.codebook if self.kind not in _FLOATS else _e4m3())
        return native.MomentOperand(
            data.data_ptr(),
            scale.data_ptr(),
            tables.values.data_ptr(),
            tables.encoding.data_ptr(),
            block=self.block,
            kind=self.kind,
        )

    def name_key(self, name: str) -> int:
        """Return what stands for the parameter's and the slot's name in the random bits of roundings."""
        return name_key(f"{name}/{self.slot.name}") if self.kind == MomentKind.FULL16 else 0


_HALVES = (MomentKind.SIGNED4, MomentKind.LINEAR4)
_FLOATS = (MomentKind.SIGNED_E4M3, MomentKind.UNSIGNED_E4M3)


@cache
def _e4m3() -> Codebook:
    from optstate.stores.block_codes import E4M3

    return E4M3


@dataclass(frozen=True)
class _Tables:
    """What C code needs of a codebook: the values of its codes, and what finds the code of a number."""

    values: Tensor
    encoding: Tensor


@cache
def _tables(book: Codebook) -> _Tables:
    values = book.values.contiguous()
    if len(values) == 16:  # by bytes of two codes; and the bounds between codes
        byte = torch.arange(256, device="cpu")
        pairs = values[torch.stack([byte >> 4, byte & 15], dim=1)].contiguous()
        return _Tables(pairs, torch.cat([book.bounds, book.bounds.new_zeros(1)]).contiguous())
    decades = find_decades(book)
    return _Tables(values, values if decades is None else decades)
