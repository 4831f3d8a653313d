"""Master weights in two parts: the bf16 parameter, and the bits that bf16 leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from optstate import store_layouts
from optstate.kernels import CompiledCodec, WeightCodec, known_finite
from optstate.kernels.native import WriteKind
from optstate.spec import FieldSpec, ParamSpec
from optstate.weights.base import Weights
from optstate.weights.plain import Plain

__all__ = ["Split"]

QUIET_NAN = 0x7FC00000


@dataclass(frozen=True)
class Split(Weights):
    """A bf16 parameter plus correction bits in the state, `weight.correction`: together one master weight.

    Args:
        bits: 16 keeps an exact fp32 master weight in 2 bytes per element beside the parameter, where a separate copy
            costs 4; the parameter is the master weight rounded to bf16, to nearest with ties away from zero. 8 keeps 24
            of the 32 bits in 1 byte: each write rounds the master weight to 16 significant bits, an error of at most
            2**-16 of the weight, so smaller steps are lost.

    The correction is in units of the bits below the parameter's last place and starts at zero. A parameter that is
    overwritten from outside, by loading other weights, keeps a correction of at most half of that last place; a zero
    is zero.

    fp32 and fp64 parameters hold results exactly and are written plainly.

    Raises:
        ValueError: for other numbers of bits; when an optimizer is built, for fp16 parameters.
    """

    bits: int = 16

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (8, 16):
            raise ValueError(f"Split(bits={self.bits!r}): give 8 or 16 correction bits")

    def __str__(self) -> str:
        return f"Split(bits={self.bits})"

    def resolve(self, spec: ParamSpec) -> Weights:
        if spec.dtype == torch.float16:
            raise ValueError(
                f"{spec.name!r} is fp16, whose bits are not the upper half of an fp32 number: train it in bf16 to use "
                "Split, or write it with weights.Kahan() or weights.StochasticRounding()"
            )
        return self if spec.dtype == torch.bfloat16 else Plain()

    def fields(self, spec: ParamSpec) -> dict[str, FieldSpec]:
        return FieldSpec.of(spec, store_layouts.split_layouts(spec.shape, self.bits))

    def codec(self, spec: ParamSpec, step: int, fields: Mapping[str, Tensor]) -> WeightCodec:
        return _Halves(fields["correction"].view(-1), dropped=16 - self.bits)


@dataclass(frozen=True)
class _Halves(WeightCodec):
    """The codec of `Split`: as integers, `master = (param << 16) + (correction << dropped)`.

    Attributes:
        correction: that of the whole local parameter, flat.
        dropped: number of low bits of fp32 that are not kept at all.
    """

    correction: Tensor
    dropped: int

    adds_bits = True

    @cached_property
    def compiled(self) -> CompiledCodec:
        return CompiledCodec(WriteKind.SPLIT8 if self.dropped else WriteKind.SPLIT16, self.correction)

    def read(self, param: Tensor, start: int, out: Tensor) -> Tensor:
        word, correction = out.view(torch.int32), self._of(param, start)
        word.copy_(correction).add_(param.view(torch.int16), alpha=1 << (16 - self.dropped))
        if self.dropped:
            word.bitwise_left_shift_(self.dropped)
        if not known_finite(out):  # below a zero that came from outside, a correction counts down into the NaNs
            word.masked_fill_((param == 0) & (correction < 0), 0)
        return out

    def write(self, param: Tensor, value: Tensor, start: int) -> None:
        word = value.view(torch.int32)
        if not known_finite(value):  # the lower bits of a NaN could carry into its sign
            word.masked_fill_(value.isnan(), QUIET_NAN)
        if self.dropped:
            word.add_(1 << (self.dropped - 1))
        param.view(torch.int16).copy_((word + (1 << 15)).bitwise_right_shift_(16))
        if self.dropped:
            word.bitwise_right_shift_(self.dropped)
        self._of(param, start).copy_(word)  # only the low bits fit: a signed number, below zero where p was rounded up

    def _of(self, param: Tensor, start: int) -> Tensor:
        return self.correction[start : start + param.numel()].view(param.shape)
