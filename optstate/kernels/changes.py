"""What a conversion changes in Adam's moments, and in the steps that follow from them, in one pass."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from optstate.kernels import native
from optstate.kernels.addresses import functions_reading

__all__ = ["measure_adam"]

FIGURES = 7


def measure_adam(
    old: tuple[Tensor, Tensor], new: tuple[Tensor | None, Tensor | None], biases: tuple[float, float], eps: float
) -> list[list[float]] | None:
    """Measure a change of one or both of Adam's moments; None where C code cannot, or where squares overflow.

    Args:
        old: the averages of gradients and of their squares as they were, flat fp32.
        new: as they are now; None where one is kept.
        biases: what the averages are of those proper.
        eps: what is added to the root of the second one.

    Returns:
        Of the first moment, of the second one, and of the update with both changes: the sums of squares of the numbers,
        of their error, of the update, of its error and of the new update; how many numbers became zero; and the most
        that the second moment shrank, as a factor.
    """
    given = [tensor for tensor in (*old, *new) if tensor is not None]
    functions, count = functions_reading(*given), old[0].numel()
    if functions is None or any(t.dtype != torch.float32 or t.numel() != count for t in given):
        return None
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in (*old, *new)]
    change, figures = native.MomentChange(*addresses, *biases, eps), (ctypes.c_double * (3 * FIGURES))()
    functions["measure_change"](ctypes.byref(change), figures, 0, count)
    found = list(figures)
    if not all(map(math.isfinite, found)):
        return None
    return [found[start : start + FIGURES] for start in range(0, len(found), FIGURES)]
