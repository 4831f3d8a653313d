"""What every launch has in common: the device, and options of the compiler that decide about results."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = ["OPTIONS", "on_device", "view_flag"]

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""A multiplication and an addition stay two operations, each of which rounds: as in the loops of eager PyTorch."""


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the device of a tensor."""
    return torch.cuda.device_of(tensor)


def view_flag(finite: Tensor | None) -> Tensor | None:
    """Return a 0-d bool tensor as the byte that kernels read and clear."""
    return None if finite is None else finite.view(torch.uint8)
