"""The loops that every chain uses, in the backend that is there: compiled on a CPU, else in eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from optstate.kernels import eager, native
from optstate.kernels.backend import choose_backend

__all__ = ["all_finite"]

YES, NO = torch.tensor(True, device="cpu"), torch.tensor(False, device="cpu")
"""Answers, which nobody writes to: making a tensor costs more than reading a small gradient."""


def all_finite(grad: Tensor, largest: float = math.inf) -> Tensor:
    """Return a 0-d bool tensor: whether no element of `grad` is infinite, NaN, or beyond `largest` in magnitude.

    The tensor is read once. In eager PyTorch elements so large that their sum overflows count as infinite, too.
    """
    within = _compiled_check() if _is_plain(grad) else None
    if within is None:
        return eager.all_finite_by_sums(grad, largest)
    address, kind, count = grad.data_ptr(), native.NUMBERS[grad.dtype], grad.numel()
    if count < native.WORTH_SHARING:
        return YES if within(address, kind, largest, 0, count) else NO
    outside: list[int] = []

    def check(begin: int, end: int) -> None:
        if not within(grad.data_ptr(), kind, largest, begin, end):
            outside.append(begin)

    native.share(check, (), count, native.TILE, count)
    return NO if outside else YES


def _is_plain(tensor: Tensor) -> bool:
    """Whether C code may be given the address of a tensor."""
    plain = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return plain and tensor.device.type == "cpu" and tensor.dtype in native.NUMBERS and tensor.is_contiguous()


@cache
def _compiled_check() -> Callable[..., int] | None:
    """Return the compiled check, or None if steps are not compiled; found once, as every call counts."""
    chosen, _ = choose_backend("auto", torch.device("cpu"))
    return native.function("within") if chosen == "native" else None
