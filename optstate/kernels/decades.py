"""Where the codes of an 8-bit dynamic map lie: places within a decade are linear in the magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from optstate.kernels.codebook import Codebook

__all__ = ["find_decades"]


def find_decades(book: Codebook) -> Tensor | None:
    """Return where each decade of an 8-bit dynamic map begins, and how its codes follow from a magnitude: `[4, 8]`.

    Within a decade the values are equally far apart, so that the place of the nearest one is linear in the magnitude.
    The rows are the largest magnitude of the decade below; the slope and the offset of the place; and the last place.
    None for another codebook.
    """
    is_dynamic = len(book.values) == 256 and float(book.values[-1]) == 1.0 and bool((book.values == 0).any())
    if not is_dynamic or bool(book.values.isnan().any()):
        return None
    zero = int((book.values == 0).nonzero()[0])
    magnitudes = book.values[zero:].double()
    places = torch.zeros(4, 8, dtype=torch.float64, device="cpu")
    first, count = 1, 1 if zero else 2
    for decade in range(7):
        last = first + count - 1
        width = 0.9 * 10.0 ** (decade - 6) / count
        start = 0.1 * 10.0 ** (decade - 6)
        between = (magnitudes[first - 1] + magnitudes[first]) / 2
        places[:, decade] = places.new_tensor([float(between), 1 / width, first - start / width, last])
        first, count = last + 1, 2 * count
    places[:, 7] = places.new_tensor([float(magnitudes[-2] + magnitudes[-1]) / 2, 0.0, first, first])
    return places.float().contiguous()
