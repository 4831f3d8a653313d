"""Blocks of which several devices have parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from optstate import kernels
from optstate.kernels import Codebook, Noise, global_index
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores.base import Fields, Shape, Store
from optstate.stores.maxima import kept_maxima
from optstate.stores.requests import Largest, Requests
from optstate.stores.statistic import Statistic

if TYPE_CHECKING:
    from optstate.stores.blockwise import Blockwise

__all__ = ["SharedBlocks"]


@dataclass(frozen=True)
class SharedBlocks(Store):
    """What a blockwise store becomes where blocks do not end at the ends of a device's part.

    The format is that of `blocks`, and so are the codes. Each device has the codes of its part and the maxima of all
    blocks, `4 / block` bytes per element of the whole parameter, on which the devices agree at the end of every step.
    """

    blocks: Blockwise

    elementwise: ClassVar[bool] = False

    def __str__(self) -> str:
        return str(self.blocks)

    @property
    def alignment(self) -> int:
        return self.blocks.alignment

    @property
    def codebook(self) -> Codebook | None:
        return self.blocks.codebook

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return self.blocks.fields(spec, signed)

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        """Of the whole parameter: what conversion of a file works on."""
        return self.blocks.read(fields, shape)

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        """Of the whole parameter: what conversion of a file works on."""
        return self.blocks.encode(value, noise, weight)

    def factors_here(self, statistic: Statistic) -> tuple[Tensor, ...]:
        codes, absmax = (statistic.current[name].view(-1) for name in ("codes", "absmax"))
        value = absmax.new_empty(statistic.spec.local_numel)
        per_code = statistic.spec.local_numel // max(codes.numel(), 1)
        for first, last, block in self._pieces(statistic.spec, absmax.device):
            part = self.blocks.decode(codes[first // per_code : -(-last // per_code)], last - first)
            torch.mul(part, absmax[block], out=value[first:last])
        return (value.view(*statistic.shape),)

    def encode_part(self, statistic: Statistic, value: Tensor) -> Requests[Fields]:
        spec, flat = statistic.spec, value.to(torch.float32).reshape(-1)
        largest = flat.new_zeros(-(-spec.numel // self.blocks.block))
        for first, last, block in self._pieces(spec, flat.device):
            largest.scatter_reduce_(0, block, flat[first:last].abs(), "amax")
        absmax = kept_maxima((yield Largest(largest)))
        codes = [flat.new_empty(0, dtype=statistic.fields["codes"].dtype)]
        for first, last, block in self._pieces(spec, flat.device):
            codes.append(self.blocks.encode_scaled(flat[first:last] / absmax[block], flat[first:last]))
        return {"codes": torch.cat(codes), "absmax": absmax}

    def _pieces(self, spec: ParamSpec, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        """Ranges of the flattened part here, and the block that each element belongs to."""
        assert spec.region is not None
        step = 2 * max(kernels.slice_elements(device) // 8, 1)  # an index is as large as two numbers
        for first in range(0, spec.local_numel, step):
            last = min(first + step, spec.local_numel)
            yield first, last, global_index(spec.region, first, last - first, device) // self.blocks.block
