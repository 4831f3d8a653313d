"""Where the elements that a device holds lie in the whole parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from optstate.spec import Region

__all__ = ["global_index"]


def global_index(region: Region, start: int, count: int, device: torch.device) -> Tensor:
    """int64 `[count]`: indices in the flattened parameter of consecutive elements of the flattened region.

    start: flat index of the first of them in the region.
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
