"""Whole steps on CUDA devices, in Triton: kernels and the functions that launch them.

Triton is optional. This package names what needs none of it; the kernels are imported when the first step is made.
"""

from optstate.kernels.triton_steps.availability import interprets, why_no_triton
from optstate.kernels.triton_steps.operands import (
    TILE,
    GradientTensor,
    MomentTensor,
    WeightTensor,
    make_table,
)

__all__ = [
    "TILE",
    "GradientTensor",
    "MomentTensor",
    "WeightTensor",
    "interprets",
    "make_table",
    "why_no_triton",
]
