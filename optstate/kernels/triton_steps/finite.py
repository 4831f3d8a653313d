"""The check of a gradient: one launch that reads the gradient once, and one that sets the flag beforehand."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from optstate.kernels.triton_steps.launching import OPTIONS, on_device, view_flag

__all__ = ["launch_finite_check"]

CHECKED = 4096
"""Elements that a program looks at."""


@triton.jit
def finite_kernel(grad, finite, count, largest, TILE: tl.constexpr):
    """Clear the flag if an element of a tile is not finite, or too large. All programs that write, write the same."""
    at = tl.program_id(0).to(tl.int64) * TILE
    j = tl.arange(0, TILE)
    x = tl.load(grad + at + j, mask=at + j < count, other=0.0).to(tl.float32)
    within = tl.abs(x) <= largest  # False for NaN
    bad = tl.max((within == 0).to(tl.int32), axis=0)
    tl.store(finite, 0, mask=bad != 0)


def launch_finite_check(grad: Tensor, largest: float = math.inf) -> Tensor:
    """Return a 0-d bool tensor on the device: whether all elements are finite and at most `largest` in magnitude."""
    finite = torch.ones((), dtype=torch.bool, device=grad.device)
    count = grad.numel()
    if count:
        limit = min(largest, torch.finfo(torch.float32).max)
        with on_device(grad):
            finite_kernel[(triton.cdiv(count, CHECKED),)](
                grad, view_flag(finite), count, limit, TILE=CHECKED, num_warps=4, **OPTIONS
            )
    return finite
