"""Walking through tensors of any shape in pieces that fit a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

__all__ = ["chunk_elements", "chunks", "slice_elements"]

CPU_CHUNK = 1 << 19
"""One fp32 buffer of 2**19 elements is 2 MB: two stay near a core's L2 cache and well under the 8 MB scratch limit."""

DEVICE_CHUNK = 1 << 22
"""On an accelerator a launch costs more than a cache miss: 16 MB buffers, under the 64 MB scratch limit."""


def chunk_elements(device: torch.device) -> int:
    """How many elements of a parameter one pass of a kernel takes at once on `device`."""
    return CPU_CHUNK if device.type in ("cpu", "meta") else DEVICE_CHUNK


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
