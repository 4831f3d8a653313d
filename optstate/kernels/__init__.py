"""The few loops that touch every element of a parameter, and nothing else."""

from optstate.kernels.chunking import chunk_elements, chunks, slice_elements
from optstate.kernels.eager import (
    WriteChunk,
    all_finite,
    apply,
    ema,
    ema_of_square,
    evaluate,
    sum_of_squares,
    sums,
)
from optstate.kernels.product import Product, Scalar

__all__ = [
    "Product",
    "Scalar",
    "WriteChunk",
    "all_finite",
    "apply",
    "chunk_elements",
    "chunks",
    "ema",
    "ema_of_square",
    "evaluate",
    "slice_elements",
    "sum_of_squares",
    "sums",
]
