"""Cut tensors of any shape into contiguous ranges of elements that fit a processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from optstate.kernels.rehearsal import RECORDED, STAND_IN

__all__ = ["Piece", "chunk_elements", "chunks", "cut_into_pieces", "slice_elements"]

CPU_CHUNK = 1 << 19
"""Elements per chunk on a CPU: one fp32 buffer is 2 MB; two stay near a core's L2 cache and under 8 MB of scratch."""

DEVICE_CHUNK = 1 << 22
"""Elements per chunk on an accelerator, where a launch costs more than a cache miss: 16 MB in fp32, 64 MB allowed."""

WHOLE = 1 << 62
"""More elements than a tensor has: a step that is recorded, to be compiled, is not cut."""


def chunk_elements(device: torch.device) -> int:
    """Return how many elements of a parameter a kernel holds in one fp32 buffer on `device`."""
    kind = STAND_IN.get() or device.type
    if kind in ("cpu", "meta"):
        return CPU_CHUNK
    return WHOLE if kind == RECORDED else DEVICE_CHUNK


def slice_elements(device: torch.device) -> int:
    """Return how many elements of a parameter an elementwise chain steps at once on `device`.

    Half a chunk, as each transform of the chain holds temporaries of its own.
    """
    return chunk_elements(device) // 2


def chunks(tensors: Sequence[Tensor], limit: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of all `tensors` side by side, each covering at most `limit` elements of the first tensor.

    Chunks come in row-major order of the first tensor, and each is a contiguous range of its elements in that order,
    whatever the strides; a running count of elements therefore gives the flat index at which a chunk begins.

    Args:
        tensors: the first gives the shape; every other has the same number of dimensions, each of the same size or of
            size 1 (a broadcast dimension, whose one entry is repeated).
        limit: largest number of elements per chunk, at least 1.

    Yields:
        One tuple of views per chunk, in the order of `tensors`; nothing if the first tensor is empty.
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
    """A contiguous range of a parameter's elements in row-major order, one of those `cut_into_pieces` returns.

    Attributes:
        index: places in the leading dimensions.
        rows: range of the dimension after those; every later dimension is whole.
        start, stop: the range of flat indices.
    """

    index: tuple[int, ...]
    rows: slice
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of this piece in a tensor with the parameter's dimensions, each of full size or of size 1."""
        for i in self.index:
            tensor = tensor[i if tensor.shape[0] > 1 else 0]
        return tensor[self.rows] if tensor.shape[0] > 1 else tensor

    def of_field(self, field: Tensor, per: int) -> Tensor:
        """Return the flat view of this piece's entries in a contiguous tensor with one entry per `per` elements."""
        return field.view(-1)[self.start // per : -(-self.stop // per)]

    def write_back(self, tensor: Tensor, part: Tensor) -> None:
        """Copy `part`, which `of` returned and the caller may have changed, back into this piece of `tensor`.

        Nothing is left to copy here, as `part` is a view of `tensor`; a piece that is a copy overrides this.
        """


@dataclass(frozen=True)
class GatheredPiece(Piece):
    """A piece that is no sub-tensor of the parameter and is therefore read and written as a flat copy.

    Needed for blocks that neither begin nor end where rows do. `shape` is the parameter's.
    """

    shape: tuple[int, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        views = _views(tensor.expand(self.shape), self.start, self.stop)
        return torch.cat([view.reshape(-1) for view in views])

    def write_back(self, tensor: Tensor, part: Tensor) -> None:
        done = 0
        for view in _views(tensor, self.start, self.stop):
            view.copy_(part[done : done + view.numel()].view(view.shape))
            done += view.numel()


def cut_into_pieces(shape: Sequence[int], limit: int, align: int = 1) -> list[Piece]:
    """Cut a shape of at least one dimension into pieces of about `limit` elements that begin at multiples of `align`.

    The pieces are sub-tensors where sub-tensors of at most `max(limit, align)` elements exist, else flat copies.

    Args:
        shape: sizes of the parameter.
        limit: wanted number of elements per piece.
        align: every piece begins at a multiple of this many elements of the flattened parameter.

    Returns:
        The pieces in row-major order; an empty list for a shape without elements.
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
    """Yield views that follow each other in row-major order and together hold the elements `start` to `stop` - 1."""
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
