"""The small matrix that makes a few long vectors orthonormal, from their inner products alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["make_orthonormal"]


def make_orthonormal(gram: Tensor) -> Tensor:
    """Return the matrix that makes vectors with this Gram matrix orthonormal, one after the other, as QR does.

    A vector that adds next to nothing to those before becomes zero, and no arbitrary one.
    """
    size = gram.diagonal().amax().clamp(min=1e-300)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    lower = torch.linalg.cholesky_ex(gram + identity * (size * 1e-14))[0]
    made: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    is_lost = lower.diagonal().square() <= size * 1e-12
    return made.masked_fill_(is_lost.unsqueeze(-1), 0.0).nan_to_num_(0.0)
