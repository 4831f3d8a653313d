"""Walking through tensors of any shape in pieces that fit a processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from optstate.kernels.rehearsal import STAND_IN

__all__ = ["Piece", "chunk_elements", "chunks", "pieces", "slice_elements"]

CPU_CHUNK = 1 << 19
"""One fp32 buffer of 2**19 elements is 2 MB: two stay near a core's L2 cache and well under the 8 MB scratch limit."""

DEVICE_CHUNK = 1 << 22
"""On an accelerator a launch costs more than a cache miss: 16 MB buffers, under the 64 MB scratch limit."""


def chunk_elements(device: torch.device) -> int:
    """How many elements of a parameter one pass of a kernel takes at once on `device`."""
    return CPU_CHUNK if (STAND_IN.get() or device.type) in ("cpu", "meta") else DEVICE_CHUNK


def slice_elements(device: torch.device) -> int:
    """How many elements an elementwise chain takes at once: fewer, as each transform holds temporaries of its own."""
    return chunk_elements(device) // 2


def chunks(tensors: Sequence[Tensor], limit: int) -> Iterator[tuple[Tensor, ...]]:
    """Views of all `tensors`, together, in pieces of at most `limit` elements of the first.

    The first tensor gives the shape; every other has its sizes or 1 where it broadcasts, and is then repeated.
    Pieces come in row-major order of the first tensor and each is a contiguous range of it in that order,
    whatever its strides, so a running count of elements gives each piece's flat index.
    """
    shape = tensors[0].shape
    numel = tensors[0].numel()
    if numel <= limit:
        if numel:
            yield tuple(tensors)
        return
    rows = shape[0]
    inner = numel // rows
    if inner <= limit:
        step = limit // inner
        yield from zip(*(torch.split(t, step) if t.shape[0] == rows else repeat(t) for t in tensors), strict=False)
        return
    for i in range(rows):
        yield from chunks([t[i] if t.shape[0] == rows else t[0] for t in tensors], limit)


@dataclass(frozen=True)
class Piece:
    """A contiguous range of a parameter's elements in row-major order: what `pieces` cuts a shape into.

    index, rows: places in the leading dimensions, then a range of the next one; every later dimension is whole.
    start, stop: the range of flat indices.
    """

    index: tuple[int, ...]
    rows: slice
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor with the parameter's dimensions, each of full size or 1 where it broadcasts."""
        for i in self.index:
            tensor = tensor[i if tensor.shape[0] > 1 else 0]
        return tensor[self.rows] if tensor.shape[0] > 1 else tensor

    def of_field(self, field: Tensor, per: int) -> Tensor:
        """The entries, flat, of a contiguous tensor with one entry per `per` consecutive elements."""
        return field.view(-1)[self.start // per : -(-self.stop // per)]

    def write_back(self, tensor: Tensor, part: Tensor) -> None:
        """Make `part`, which `of` gave and which may have been written to, this piece of the tensor."""


@dataclass(frozen=True)
class GatheredPiece(Piece):
    """A range that is no sub-tensor, as a flat copy: for blocks that neither begin nor end where rows do."""

    shape: tuple[int, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        views = _views(tensor.expand(self.shape), self.start, self.stop)
        return torch.cat([view.reshape(-1) for view in views])

    def write_back(self, tensor: Tensor, part: Tensor) -> None:
        done = 0
        for view in _views(tensor, self.start, self.stop):
            view.copy_(part[done : done + view.numel()].view(view.shape))
            done += view.numel()


def pieces(shape: Sequence[int], limit: int, align: int = 1) -> list[Piece]:
    """Cut a shape of at least one dimension into pieces of about `limit` elements that begin at multiples of `align`.

    Pieces are sub-tensors as long as that keeps them within the limit.
    """
    shape = tuple(shape)
    if not math.prod(shape):
        return []
    found = list(_pieces(shape, limit, align, (), 0))
    if all(piece.stop - piece.start <= max(limit, align) for piece in found):
        return found
    step, numel = max(limit // align, 1) * align, math.prod(shape)
    ranges = [(start, min(start + step, numel)) for start in range(0, numel, step)]
    return [GatheredPiece((), slice(0), start, stop, shape) for start, stop in ranges]


def _views(tensor: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """Views that follow each other in row-major order and together are the elements `start` to `stop`."""
    if tensor.ndim <= 1:
        yield tensor[start:stop]
        return
    inner = math.prod(tensor.shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        yield from _views(tensor[first], start - first * inner, stop - first * inner)
        return
    if start % inner:
        yield from _views(tensor[first], start - first * inner, inner)
        first += 1
    whole = stop // inner
    if whole > first:
        yield tensor[first:whole]
    if stop % inner:
        yield from _views(tensor[whole], 0, stop - whole * inner)


def _pieces(shape: tuple[int, ...], limit: int, align: int, index: tuple[int, ...], start: int) -> Iterator[Piece]:
    rows, inner = shape[0], math.prod(shape[1:])
    if inner > limit and (rows == 1 or inner % align == 0):
        for i in range(rows):
            yield from _pieces(shape[1:], limit, align, (*index, i), start + i * inner)
        return
    together = align // math.gcd(inner, align)
    step = max(limit // inner // together, 1) * together
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield Piece(index, slice(first, last), start + first * inner, start + last * inner)
