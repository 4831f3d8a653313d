"""The loops that every chain uses, in the backend that is there: compiled on a CPU, else in eager PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optstate.kernels import eager, native
from optstate.kernels.backend import choose_backend
from optstate.spec import is_fake

__all__ = ["all_finite"]


def all_finite(grad: Tensor, largest: float = math.inf) -> Tensor:
    """Return a 0-d bool tensor: whether no element of `grad` is infinite, NaN, or beyond `largest` in magnitude.

    The tensor is read once. In eager PyTorch elements so large that their sum overflows count as infinite, too.
    """
    if not _is_compiled(grad):
        return eager.all_finite(grad, largest)
    kernel, address, kind, outside = native.function("within"), grad.data_ptr(), native.NUMBERS[grad.dtype], []

    def check(begin: int, end: int) -> None:
        if not kernel(address, kind, largest, begin, end):
            outside.append(begin)

    native.share(check, grad.numel(), native.TILE, grad.numel())
    return torch.tensor(not outside, device="cpu")


def _is_compiled(tensor: Tensor) -> bool:
    """Whether C code may be given the address of a tensor."""
    known = tensor.dtype in native.NUMBERS and tensor.device.type == "cpu" and tensor.is_contiguous()
    return known and not is_fake(tensor) and choose_backend("auto", tensor.device)[0] == "native"
