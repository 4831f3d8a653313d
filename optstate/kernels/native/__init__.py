"""Whole steps on a CPU, compiled from C: called with pointers, without torch's or Python's binary interface.

The library is optional. Where it is missing, the same steps run on the loops of `optstate.kernels.eager`.
"""

from optstate.kernels.native.loading import TILE, function, opened, why_missing
from optstate.kernels.native.structures import (
    MOST_DIMENSIONS,
    MOST_FACTORS,
    NUMBERS,
    BoxOperand,
    Elementwise,
    FactoredStep,
    GradientOperand,
    ManySteps,
    MaximaStep,
    MomentChange,
    MomentKind,
    MomentOperand,
    ProductOperand,
    SquareSums,
    StepKind,
    StepRule,
    WeightOperand,
    WriteKind,
)
from optstate.kernels.native.threads import WORTH_SHARING, parts_of, share

__all__ = [
    "MOST_DIMENSIONS",
    "MOST_FACTORS",
    "NUMBERS",
    "TILE",
    "WORTH_SHARING",
    "BoxOperand",
    "Elementwise",
    "FactoredStep",
    "GradientOperand",
    "ManySteps",
    "MaximaStep",
    "MomentChange",
    "MomentKind",
    "MomentOperand",
    "ProductOperand",
    "SquareSums",
    "StepKind",
    "StepRule",
    "WeightOperand",
    "WriteKind",
    "function",
    "opened",
    "parts_of",
    "share",
    "why_missing",
]
