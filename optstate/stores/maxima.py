"""The largest magnitudes that codes are multiplied by."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_maxima", "kept_maxima"]

SMALLEST_MAXIMUM = 2.0**-120
"""The least that is kept: the smallest code times a smaller one would underflow to zero."""


def kept_maxima(maxima: Tensor) -> Tensor:
    """The maxima, in place, within what codes can be multiplied by without becoming zero or infinite."""
    return maxima.clamp_(SMALLEST_MAXIMUM, torch.finfo(torch.float32).max)


def block_maxima(flat: Tensor, block: int) -> Tensor:
    """The largest magnitude of every block of consecutive elements, as it is kept; the last block may be short."""
    whole = flat.numel() // block * block
    magnitude = flat.abs()
    maxima = magnitude[:whole].view(-1, block).amax(-1)
    if whole < flat.numel():
        maxima = torch.cat([maxima, magnitude[whole:].amax().view(1)])
    return kept_maxima(maxima)
