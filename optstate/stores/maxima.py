"""The largest magnitudes that codes are multiplied by."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_maxima", "kept_maxima"]

SMALLEST_MAXIMUM = 2.0**-120
"""The least maximum that is kept: the smallest code times a smaller maximum would underflow to zero."""


def kept_maxima(maxima: Tensor) -> Tensor:
    """Clamp maxima in place so that codes times a maximum become neither zero nor infinite, and return them."""
    return maxima.clamp_(SMALLEST_MAXIMUM, torch.finfo(torch.float32).max)


def block_maxima(flat: Tensor, block: int) -> Tensor:
    """Return the largest magnitude of every block of consecutive elements, clamped; the last block may be short."""
    whole = flat.numel() // block * block
    magnitude = flat.abs()
    maxima = magnitude[:whole].view(-1, block).amax(-1)
    if whole < flat.numel():
        maxima = torch.cat([maxima, magnitude[whole:].amax().view(1)])
    return kept_maxima(maxima)
