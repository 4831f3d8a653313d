"""Whole steps on a CPU, compiled from C: called with pointers, without torch's or Python's binary interface.

The library is optional. Where it is missing, the same steps run on the loops of `optstate.kernels.eager`.
"""

from optstate.kernels.native.loading import TILE, function, why_missing
from optstate.kernels.native.structures import (
    NUMBERS,
    Elementwise,
    FactoredStep,
    GradientOperand,
    MaximaStep,
    MomentKind,
    MomentOperand,
    StepRule,
    WeightOperand,
    WriteKind,
)
from optstate.kernels.native.threads import WORTH_SHARING, share

__all__ = [
    "NUMBERS",
    "TILE",
    "WORTH_SHARING",
    "Elementwise",
    "FactoredStep",
    "GradientOperand",
    "MaximaStep",
    "MomentKind",
    "MomentOperand",
    "StepRule",
    "WeightOperand",
    "WriteKind",
    "function",
    "share",
    "why_missing",
]
