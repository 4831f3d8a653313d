"""The codec of a parameter whose value is not simply what the parameter holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optstate.kernels.native import WriteKind
from optstate.kernels.rounding import Noise

__all__ = ["CompiledCodec", "WeightCodec"]


@dataclass(frozen=True)
class CompiledCodec:
    """What a codec does, in words that the compiled loops know.

    Attributes:
        how: the way of writing.
        extra: what is kept beside the parameter, of the whole local parameter, flat.
        noise: the random bits, from the first element of the local parameter on.
    """

    how: WriteKind
    extra: Tensor | None = None
    noise: Noise | None = None


class WeightCodec:
    """Reads and writes the value of a parameter of low precision, chunk by chunk.

    `start` is always the flat index of the chunk's first element in the part of the parameter on this device; chunks
    are ranges in row-major order.
    """

    adds_bits: ClassVar[bool] = False
    """Whether the value has more bits than the parameter holds, kept elsewhere by the codec."""

    @property
    def compiled(self) -> CompiledCodec | None:
        """What the codec does, for the compiled loops; None if they do not know its way."""
        return None

    def read(self, param: Tensor, start: int, out: Tensor) -> Tensor:
        """Write the fp32 value of the chunk `param` into `out`, a tensor of its shape, and return `out`."""
        return out.copy_(param)

    def write(self, param: Tensor, value: Tensor, start: int) -> None:
        """Make `value`, fp32 in the shape of `param`, the value of the chunk `param`; may overwrite `value`."""
        raise NotImplementedError
