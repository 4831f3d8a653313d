"""Remembering what rounding cut off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optstate.kernels import WeightCodec
from optstate.spec import FieldSpec, ParamSpec
from optstate.weights.base import Weights
from optstate.weights.plain import Plain

__all__ = ["Kahan"]


@dataclass(frozen=True)
class Kahan(Weights):
    """Compensated summation (Kahan 1965): the rounding error of each write is kept and added at the next step.

    The error is kept in the parameter's dtype, 2 bytes per element in bf16 and fp16, as `weight.compensation`. The
    weight that is stepped, `param + compensation`, has 8 more significant bits than bf16 alone (11 more than fp16): a write
    rounds it by at most 2**-16 of itself in bf16; `Split(16)` is exact for the same bytes.

    fp32 and fp64 parameters are written plainly.
    """

    def resolve(self, spec: ParamSpec) -> Weights:
        return self if spec.dtype in (torch.bfloat16, torch.float16) else Plain()

    def fields(self, spec: ParamSpec) -> dict[str, FieldSpec]:
        return {"compensation": FieldSpec(spec.shape, spec.dtype, tuple(range(spec.ndim)))}

    def codec(self, spec: ParamSpec, step: int, fields: Mapping[str, Tensor]) -> WeightCodec:
        return _Compensated(fields["compensation"].view(-1))


@dataclass(frozen=True)
class _Compensated(WeightCodec):
    """compensation: of the whole parameter, flat."""

    compensation: Tensor

    adds_bits = True

    def read(self, param: Tensor, start: int, out: Tensor) -> Tensor:
        return out.copy_(param).add_(self._of(param, start))

    def write(self, param: Tensor, value: Tensor, start: int) -> None:
        param.copy_(value)
        lost = value.sub_(param)  # infinity minus infinity, where a weight overflowed, must not become NaN
        self._of(param, start).copy_(lost.nan_to_num_(0.0, 0.0, 0.0))

    def _of(self, param: Tensor, start: int) -> Tensor:
        return self.compensation[start : start + param.numel()].view(param.shape)
