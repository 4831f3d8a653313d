"""Kahan summation: keep the part of each result that rounding cuts off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from optstate import store_layouts
from optstate.kernels import CompiledCodec, WeightCodec
from optstate.kernels.native import WriteKind
from optstate.spec import FieldSpec, ParamSpec
from optstate.weights.base import Weights
from optstate.weights.plain import Plain

__all__ = ["Kahan"]


@dataclass(frozen=True)
class Kahan(Weights):
    """Compensated summation (Kahan 1965): keeps the rounding error of each write and adds it at the next step.

    The error is kept in the parameter's dtype, 2 bytes per element in bf16 and fp16, as `weight.compensation`. The
    weight that is stepped is `param + compensation`, and the parameter is that sum rounded to nearest. A write rounds
    the sum by at most 2**-17 of itself in bf16, in fp16 by 2**-23 of itself or by 2**-25, whichever is more;
    `Split(16)` is exact for the same bytes. A parameter that is overwritten from outside keeps a compensation of at
    most 2**-8 of its old value (2**-11 in fp16).

    fp32 and fp64 parameters are written plainly.
    """

    def resolve(self, spec: ParamSpec) -> Weights:
        return self if spec.dtype in (torch.bfloat16, torch.float16) else Plain()

    def fields(self, spec: ParamSpec) -> dict[str, FieldSpec]:
        return FieldSpec.of(spec, store_layouts.kahan_layouts(spec.shape))

    def codec(self, spec: ParamSpec, step: int, fields: Mapping[str, Tensor]) -> WeightCodec:
        return _Compensated(fields["compensation"].view(-1))


@dataclass(frozen=True)
class _Compensated(WeightCodec):
    """The codec of `Kahan`; `compensation` is that of the whole local parameter, flat."""

    compensation: Tensor

    adds_bits = True

    @cached_property
    def compiled(self) -> CompiledCodec:
        return CompiledCodec(WriteKind.KAHAN, self.compensation)

    def read(self, param: Tensor, start: int, out: Tensor) -> Tensor:
        return out.copy_(param).add_(self._of(param, start))

    def write(self, param: Tensor, value: Tensor, start: int) -> None:
        compensation = self._of(param, start)
        param.copy_(value)
        # Infinity minus infinity, where a weight overflowed, must not become NaN.
        compensation.copy_(torch.sub(value, param).nan_to_num_(0.0, 0.0, 0.0))
        # A compensation rounded up to half a place may call for the parameter's neighbour. Taking that one makes the
        # parameter what the sum rounds to, so that a step of size zero changes no bit.
        param.add_(compensation)
        compensation.copy_(value.sub_(param).nan_to_num_(0.0, 0.0, 0.0))

    def _of(self, param: Tensor, start: int) -> Tensor:
        return self.compensation[start : start + param.numel()].view(param.shape)
