"""A store of 16-bit whole numbers: `optstate convert opt.safetensors small.safetensors --slot exp_avg=int16`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from optstate.stores import Fields, FieldSpec, Full, Noise, ParamSpec, Shape, Store

LARGEST = 32767


@dataclass(frozen=True)
class Int16(Store):
    """Whole numbers of 16 bits and one fp32 unit per block of consecutive elements, for averages of gradients.

    Bytes per element: `2 + 4 / block`. Error of an element: at most 2**-16 of its block's largest magnitude.

    Raises:
        ValueError: when a chain puts a second moment into it, whose small elements would become zero.
    """

    block: int = 256

    @property
    def alignment(self) -> int:
        return self.block

    def check(self, signed: bool, smallest_weight: float) -> None:
        if not signed:
            raise ValueError("Int16() would round small second moments to zero, and steps divide by their root")

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        together = spec.keeps_together(self.block)
        return (self, "") if together else (Full(), f"split among devices within blocks of {self.block}: kept in full")

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        units = FieldSpec((-(-spec.numel // self.block),), torch.float32, (), per=self.block)
        return {"codes": FieldSpec(spec.shape, torch.int16, tuple(range(spec.ndim))), "unit": units}

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        codes, units = fields["codes"].reshape(-1), fields["unit"].reshape(-1)
        return (codes * units.repeat_interleave(self.block)[: codes.numel()]).view(tuple(shape))

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        flat = value.float().reshape(-1)
        blocks = F.pad(flat, (0, -flat.numel() % self.block)).view(-1, self.block)
        units = (blocks.abs().amax(1) / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        codes = (blocks / units[:, None]).round_().to(torch.int16)
        return {"codes": codes.view(-1)[: flat.numel()], "unit": units}
