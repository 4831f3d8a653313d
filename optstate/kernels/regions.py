"""Indices, in the whole parameter, of the elements that one device holds."""

from __future__ import annotations

import torch
from torch import Tensor

from optstate.spec import Region

__all__ = ["global_index"]


def global_index(region: Region, start: int, count: int, device: torch.device) -> Tensor:
    """Return the indices, in the flattened parameter, of `count` consecutive elements of the flattened region.

    Args:
        region: the part of the parameter on this device.
        start: flat index in the region of the first element.
        count: number of elements.
        device: where the result is made.

    Returns:
        int64 `[count]`.
    """
    rest = torch.arange(start, start + count, device=device)
    if region.start is not None:
        return rest.add_(region.start)
    index, stride = torch.zeros_like(rest), 1
    for size, offset, whole in zip(region.shape[::-1], region.offset[::-1], region.whole[::-1], strict=True):
        index += (rest % size + offset) * stride
        rest //= size
        stride *= whole
    return index
