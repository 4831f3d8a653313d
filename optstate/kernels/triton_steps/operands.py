"""The operands of the kernels: a parameter, a gradient and moments, as tensors and formats. Nothing imports Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optstate.kernels.codebook import Codebook
from optstate.kernels.decades import find_decades
from optstate.kernels.native import MomentKind, WriteKind

__all__ = ["TILE", "GradientTensor", "MomentTensor", "WeightTensor", "make_table", "signed_key"]

TILE = 1024
"""Elements that a program steps at once where every element goes its own way; a block of codes lies within a tile."""


@dataclass(frozen=True)
class WeightTensor:
    """A parameter, what is kept beside it, and how new values are written.

    Attributes:
        param: contiguous, fp32, bf16 or fp16.
        extra: compensation or correction, or None.
        how: how new values are written.
        start: flat index in the whole parameter of the first element here, for the random bits.
        key: of the random bits; of the name alone, if there is a clock.
        clock: int64, 0-d: the number of this step on the device, for all random bits; None if the host counts.
    """

    param: Tensor
    extra: Tensor | None = None
    how: WriteKind = WriteKind.PLAIN
    start: int = 0
    key: int = 0
    clock: Tensor | None = None


@dataclass(frozen=True)
class GradientTensor:
    """A gradient, clamped to `bound` first, then multiplied by `scale`, then joined by `penalty` times the weight.

    Attributes:
        grad: contiguous, fp32, bf16 or fp16.
        bound: None for no clamp.
        scale: a number, or an fp32 tensor of one element on the device, which the host does not read.
        penalty: 0.0 for none.
    """

    grad: Tensor
    bound: float | None = None
    scale: float | Tensor = 1.0
    penalty: float = 0.0

    @property
    def on_host(self) -> float:
        """The scale if the host knows it, else one."""
        return 1.0 if isinstance(self.scale, Tensor) else self.scale

    @property
    def on_device(self) -> Tensor | None:
        """The scale if only the device knows it."""
        return self.scale if isinstance(self.scale, Tensor) else None


@dataclass(frozen=True)
class MomentTensor:
    """A statistic and the format that it is kept in.

    Attributes:
        data: numbers, codes, one number per `block` elements, or one per row; None for no moment.
        scale: the largest magnitude of each block, or one number per column.
        kind: the format.
        table: of the format's codes, from `make_table`.
        block: elements per scale, per number, or per row.
        key, start: of the random bits, as in `WeightTensor`.
    """

    data: Tensor | None = None
    scale: Tensor | None = None
    kind: MomentKind = MomentKind.NOTHING
    table: Tensor | None = None
    block: int = 1
    key: int = 0
    start: int = 0


def signed_key(key: int) -> int:
    """Return the int32 number with the bits of an unsigned 32-bit key: one type of argument, whatever the key."""
    return key - (1 << 32) if key >= 1 << 31 else key


def make_table(book: Codebook, device: torch.device) -> Tensor:
    """Return all that kernels need of a codebook: fp32, on the device, made at the first use there.

    The values come first; then the bounds between them, with an infinite one at both ends; then, for an 8-bit dynamic
    map, the 32 numbers of `find_decades`.
    """
    return _table(book, str(device))


@cache
def _table(book: Codebook, device: str) -> Tensor:
    end = book.bounds.new_full((1,), torch.inf)
    parts: list[Any] = [book.values, -end, book.bounds, end]
    decades = find_decades(book)
    if decades is not None:
        parts.append(decades.view(-1))
    return torch.cat(parts).to(device)
