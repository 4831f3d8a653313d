"""The operand of every kernel: a tensor times factors, not yet multiplied out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optstate.kernels.chunking import Piece

__all__ = ["Product", "Scalar"]

Scalar = float | Tensor
"""A Python float, or a 0-d tensor where reading the number would make the host wait for the device."""


@dataclass(slots=True)
class Product:
    """The lazy product `scale * clamp(dense, -bound, bound) * factors[0] * factors[1] * ...`.

    A product never changes once made; the class is not frozen only because building a frozen one is slow.

    Attributes:
        dense: any shape, any floating dtype; never copied, never written.
        factors: tensors with as many dimensions as `dense`, each dimension of `dense`'s size or 1: `[..., m, 1]` holds
            one number per row, `[..., 1, n]` one per column.
        scale: one number for the whole tensor.
        bound: symmetric clamp of `dense`, before anything multiplies it; None for no clamp.
        finite: 0-d bool tensor, False if the gradient was not finite and the host cannot wait to know. The kernels then
            read every element as a finite number, and the caller has already set its scale and weights to zero. None
            if the gradient is known to be finite.
    """

    dense: Tensor
    factors: tuple[Tensor, ...] = ()
    scale: Scalar = 1.0
    bound: float | None = None
    finite: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the product, which is that of `dense`."""
        return self.dense.shape

    def piece(self, piece: Piece) -> Product:
        """Return this product restricted to one piece of the tensor."""
        factors = tuple(piece.of(factor) for factor in self.factors)
        return Product(piece.of(self.dense), factors, self.scale, self.bound, self.finite)
