"""Stochastic rounding: unbiased, with random bits that are a hash of seed, name, step and index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from optstate.kernels import CompiledCodec, Noise, WeightCodec, round_bf16, round_fp16
from optstate.kernels.native import WriteKind
from optstate.spec import ParamSpec
from optstate.weights.base import Weights
from optstate.weights.plain import Plain

__all__ = ["StochasticRounding"]


@dataclass(frozen=True)
class StochasticRounding(Weights):
    """Rounding up or down at random, so that the mean of many roundings is the exact value.

    Steps far smaller than a bf16 weight's spacing then still move the weight on average. The 16 random bits of an
    element are a hash of (seed, parameter name, step, flat index in the global parameter): nothing to save, no
    generator touched, the same whatever the chunking or sharding. For bf16 the probability is exact to 2**-16 of
    the spacing, for fp16 to 2**-13.

    fp32 and fp64 parameters hold results exactly and are written plainly.
    """

    seed: int = 0

    is_random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"StochasticRounding(seed={self.seed!r}): the seed must be a whole number")

    def resolve(self, spec: ParamSpec) -> Weights:
        return self if spec.dtype in (torch.bfloat16, torch.float16) else Plain()

    def codec(self, spec: ParamSpec, step: int, fields: Mapping[str, Tensor]) -> WeightCodec:
        return _Stochastic(Noise(spec.name, step, self.seed, region=spec.region))


@dataclass(frozen=True)
class _Stochastic(WeightCodec):
    """The codec of `StochasticRounding`."""

    noise: Noise

    @cached_property
    def compiled(self) -> CompiledCodec:
        return CompiledCodec(WriteKind.STOCHASTIC, noise=self.noise)

    def write(self, param: Tensor, value: Tensor, start: int) -> None:
        bits = self.noise.at(start).bits16(value.numel(), value.device).view(value.shape)
        param.copy_(round_bf16(value, bits) if param.dtype == torch.bfloat16 else round_fp16(value, bits))
