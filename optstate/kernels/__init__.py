"""The hot loops of a step: every function that touches each element of a parameter.

A kernel reads a `Product` (a gradient times its factors, not yet multiplied out) chunk by chunk, in fp32, and either
sums it up or writes it into a parameter. Kernels know nothing of recipes, stores or optimizers.
"""

from optstate.kernels.chunking import Piece, chunk_elements, chunks, cut_into_pieces, slice_elements
from optstate.kernels.codebook import Codebook, dynamic_map, linear_map
from optstate.kernels.eager import (
    add_weight,
    apply_update,
    ema,
    ema_of_square,
    multiply_out,
    sum_of_squares,
    sums,
    sums_of_difference,
    sums_of_rows,
    values,
    weight_sum_of_squares,
)
from optstate.kernels.primitives import all_finite
from optstate.kernels.product import Product, Scalar
from optstate.kernels.regions import global_index
from optstate.kernels.rehearsal import device_type, rehearsal, rehearsing, worth_running
from optstate.kernels.rounding import Noise, known_finite, name_key, noise_key, round_bf16, round_fp16
from optstate.kernels.weight_codec import WeightCodec

__all__ = [
    "Codebook",
    "Noise",
    "Piece",
    "Product",
    "Scalar",
    "WeightCodec",
    "add_weight",
    "all_finite",
    "apply_update",
    "chunk_elements",
    "chunks",
    "cut_into_pieces",
    "device_type",
    "dynamic_map",
    "ema",
    "ema_of_square",
    "global_index",
    "known_finite",
    "linear_map",
    "multiply_out",
    "name_key",
    "noise_key",
    "rehearsal",
    "rehearsing",
    "round_bf16",
    "round_fp16",
    "slice_elements",
    "sum_of_squares",
    "sums",
    "sums_of_difference",
    "sums_of_rows",
    "values",
    "weight_sum_of_squares",
    "worth_running",
]
