"""Find and open the compiled library: an optional part of an installation, made by the platform's C compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from optstate.kernels.native.structures import ABI_VERSION

__all__ = ["TILE", "find_library", "function", "functions_for", "opened", "why_missing"]

TILE = 1024
"""Elements that the C code steps at once; a block of codes lies within one tile."""

SUFFIXES = (".so", ".pyd", ".dylib")

SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "within": (
        ctypes.c_int32,
        (ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_int64, ctypes.c_int64),
    ),
    "decode": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "encode": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "step_elementwise": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "weight_squares": (ctypes.c_double, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "row_squares": (
        None,
        (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ),
    "sum_factored": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "finish_sums": (ctypes.c_int32, (ctypes.c_void_p,)),
    "move_factored": (None, (ctypes.c_void_p,)),
    "measure_factored": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "apply_factored": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "move_full": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "apply_full": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "average_updates": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "apply_average": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "step_maxima": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "finish_maxima": (None, (ctypes.c_void_p,)),
    "multiply_out": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "move_towards": (
        None,
        (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32),
            *(ctypes.c_float, ctypes.c_float, ctypes.c_int64, ctypes.c_int64),
        ),
    ),
    "invert_roots": (
        None,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_float, ctypes.c_int64, ctypes.c_int64),
    ),
    "sum_squares": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "join_columns": (None, (ctypes.c_void_p,)),
    "sum_rows": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "measure_product": (
        None,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
    ),
    "measure_weight": (
        None,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
    ),
    "fill_random_bits": (
        None,
        (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
    ),
    "apply_product": (
        None,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int64, ctypes.c_int64),
    ),
    "store_weight": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "add_weight": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int64, ctypes.c_int64)),
    "encode_blocks": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "decode_blocks": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "measure_change": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "begin_many": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    "finish_many": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
}
"""Result and arguments of every function; each has a name for each kind of processor."""


def find_library() -> Path | None:
    """Return the path of the compiled library; None if there is none."""
    here = Path(__file__).parent
    return min((path for path in here.glob("_steps*") if path.suffix in SUFFIXES), default=None)


@cache
def opened() -> tuple[dict[str, Callable[..., Any]], str]:
    """Return the functions for this processor by name, and why there are none; "" if there are."""
    path = find_library()
    if path is None:
        return {}, "it was not compiled when optstate was installed, which needs a C compiler such as gcc"
    try:
        library = ctypes.CDLL(str(path))
        version = int(library.abi_version())
    except (OSError, AttributeError) as error:
        return {}, f"it cannot be opened: {error}"
    if version != ABI_VERSION or library.tile_elements() != TILE:
        return {}, "it was compiled from another version of optstate: install optstate again"
    library.best_kind.restype = ctypes.c_char_p
    return functions_for(library, library.best_kind().decode()), ""


def functions_for(library: ctypes.CDLL, kind: str) -> dict[str, Callable[..., Any]]:
    """Return the functions of an opened library by name, for one kind of processor: "", "_v3" or "_v4"."""
    functions = {}
    for name, (result, arguments) in SIGNATURES.items():
        each = getattr(library, name + kind)
        each.restype, each.argtypes = result, arguments
        functions[name] = each
    return functions


def why_missing() -> str:
    """Return why the compiled library cannot be used here, as the end of a sentence; "" if it can."""
    return opened()[1]


def function(name: str) -> Callable[..., Any]:
    """Return a function of the library.

    Raises:
        RuntimeError: if the library cannot be used here.
    """
    functions, why = opened()
    if why:
        raise RuntimeError(f"the compiled steps of optstate cannot be used: {why}")
    return functions[name]
