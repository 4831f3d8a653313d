"""Rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass

from optstate.weights.base import Weights

__all__ = ["Plain"]


@dataclass(frozen=True)
class Plain(Weights):
    """Rounding to nearest, ties to even; exact for fp32 and fp64 parameters.

    A bf16 weight keeps 8 significant bits: a step smaller than about 2**-9 of the weight is lost. With AdaLomo
    at a learning rate of 5e-4 about nine weights in ten do not move.
    """
