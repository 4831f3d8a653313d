"""The hot loops of a step: every function that touches each element of a parameter.

A kernel reads a `Product` (a gradient times its factors, not yet multiplied out) chunk by chunk, in fp32, and either
sums it up or writes it into a parameter. Kernels know nothing of recipes, stores or optimizers.
"""

from optstate.kernels.addresses import hold_room
from optstate.kernels.backend import compiled_functions
from optstate.kernels.blocks import BlockCodes, decode_blocks, encode_blocks, write_blocks
from optstate.kernels.changes import measure_adam
from optstate.kernels.chunking import Piece, chunk_elements, chunks, cut_into_pieces, slice_elements
from optstate.kernels.codebook import Codebook, dynamic_map, linear_map
from optstate.kernels.primitives import (
    add_weight,
    all_finite,
    apply_update,
    ema,
    ema_of_square,
    inverse_root,
    moved,
    moved_to_square,
    multiply_out,
    rounded_bf16,
    sum_of_squares,
    sums,
    sums_of_difference,
    sums_of_rows,
    values,
    weight_sum_of_squares,
)
from optstate.kernels.product import Product, Scalar
from optstate.kernels.recording import Recording, recorded
from optstate.kernels.regions import global_index
from optstate.kernels.rehearsal import device_type, rehearsal, rehearsing, worth_running
from optstate.kernels.rounding import Noise, known_finite, name_key, noise_key, round_bf16, round_fp16, word_key
from optstate.kernels.weight_codec import CompiledCodec, WeightCodec

__all__ = [
    "BlockCodes",
    "Codebook",
    "CompiledCodec",
    "Noise",
    "Piece",
    "Product",
    "Recording",
    "Scalar",
    "WeightCodec",
    "add_weight",
    "all_finite",
    "apply_update",
    "chunk_elements",
    "chunks",
    "compiled_functions",
    "cut_into_pieces",
    "decode_blocks",
    "device_type",
    "dynamic_map",
    "ema",
    "ema_of_square",
    "encode_blocks",
    "global_index",
    "hold_room",
    "inverse_root",
    "known_finite",
    "linear_map",
    "measure_adam",
    "moved",
    "moved_to_square",
    "multiply_out",
    "name_key",
    "noise_key",
    "recorded",
    "rehearsal",
    "rehearsing",
    "round_bf16",
    "round_fp16",
    "rounded_bf16",
    "slice_elements",
    "sum_of_squares",
    "sums",
    "sums_of_difference",
    "sums_of_rows",
    "values",
    "weight_sum_of_squares",
    "word_key",
    "worth_running",
    "write_blocks",
]
