"""The lazy operand of every kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optstate.kernels.chunking import Piece

__all__ = ["Product", "Scalar"]

Scalar = float | Tensor
"""A Python number, or a 0-d tensor where reading the number would wait for the device."""


@dataclass(slots=True)
class Product:
    """`scale * clamp(dense, -bound, bound) * factors[0] * factors[1] * ...`, not yet multiplied out.

    Never changed once made; not declared frozen only because that makes building one slow.

    dense: any shape, any floating dtype; never copied, never written.
    factors: tensors with as many dimensions as `dense`, each of size 1 or of `dense`'s size: `[..., m, 1]`
        one number per row, `[..., 1, n]` one per column, or a full tensor.
    scale: one number for the whole tensor.
    bound: symmetric clamp of `dense`, before anything multiplies it.
    finite: 0-d bool that is False if the gradient was not finite and the device cannot be asked now; values
        then read as finite numbers, and the caller's scale and weights are already zero.
    """

    dense: Tensor
    factors: tuple[Tensor, ...] = ()
    scale: Scalar = 1.0
    bound: float | None = None
    finite: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the value: that of `dense`."""
        return self.dense.shape

    def piece(self, piece: Piece) -> Product:
        """The same product of a piece of the tensor."""
        factors = tuple(piece.of(factor) for factor in self.factors)
        return Product(piece.of(self.dense), factors, self.scale, self.bound, self.finite)
