"""The tensors that every store of this library keeps, computed from shapes alone. Imports no torch.

`Store.fields` and `Weights.fields` build what is allocated from these functions, and reading a file without torch
judges its tensors by the same ones: there is one source of sizes. A store of another package writes its own `fields`
and has no layout here; without torch its tensors are not judged, with torch its class is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import isqrt, prod
from typing import Any, NamedTuple

from optstate.text import parsed_call

__all__ = [
    "ACCUMULATOR",
    "FEWEST_CODED",
    "PARAMETER",
    "SIGNS_PER_BYTE",
    "FieldLayout",
    "Layouts",
    "Shape",
    "axis_maxima_layouts",
    "axis_names",
    "blocks",
    "factored_layouts",
    "full_layouts",
    "group_means",
    "is_group_each",
    "is_low_rank_larger",
    "is_small",
    "kahan_layouts",
    "kept_bytes",
    "layouts_of",
    "low_rank_layouts",
    "packed_blocks",
    "rank_one_codes",
    "sign_rank1_layouts",
    "split_layouts",
    "square_shape",
]

Shape = tuple[int, ...]

ACCUMULATOR = "accumulator"
"""The dtype of arithmetic: float32, or float64 for parameters of that dtype."""

PARAMETER = "parameter"
"""The dtype of the parameter itself."""

SIZES = {ACCUMULATOR: 4, "float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "float8_e4m3fn": 1}
"""Bytes of one element, for parameters of any dtype but float64."""

FEWEST_CODED = 4096
"""Statistics of fewer elements stay in fp32, as in bitsandbytes and torchao: they weigh nothing and are the sensitive
ones."""


SIGNS_PER_BYTE = 8


class FieldLayout(NamedTuple):
    """One tensor of a statistic, with the meaning of `optstate.stores.FieldSpec`; dtype is torch's name as text."""

    shape: Shape
    dtype: str
    dims: tuple[int | None, ...] = ()
    per: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * SIZES[self.dtype]


Layouts = dict[str, FieldLayout]


# --- statistics ---------------------------------------------------------------------------------------------------


def full_layouts(shape: Shape, dtype: str | None = None, stochastic: bool | None = None) -> Layouts:
    """Return the layout of one number per element."""
    return {"": _alike(shape, dtype or ACCUMULATOR)}


def factored_layouts(shape: Shape) -> Layouts:
    """Return the layout of the row and column means of the last two dimensions.

    Raises:
        ValueError: for fewer than two dimensions.
    """
    *batch, rows, cols = shape
    dims = tuple(range(len(shape)))
    return {
        "row": FieldLayout((*batch, rows), ACCUMULATOR, dims[:-1]),
        "col": FieldLayout((*batch, cols), ACCUMULATOR, (*dims[:-2], dims[-1])),
    }


def group_means(shape: Shape, by: str | int, cut: bool = False) -> Layouts:
    """Return the layout of one mean per group of rows; `by` and the groups are those of `optstate.stores.Grouped`.

    cut: whether a group's rows may be on several devices, each of which then has all means.

    Raises:
        ValueError: for a `by` without a number of rows.
    """
    if by == "tensor":
        return {"mean": FieldLayout((), ACCUMULATOR)}
    return {"mean": FieldLayout((shape[0] // (1 if by == "row" else int(by)),), ACCUMULATOR, () if cut else (0,))}


def axis_names(ndim: int) -> list[str]:
    """Return `row` and `col` for the last two dimensions, `axis0`, `axis1`, ... for those before."""
    return [*(f"axis{i}" for i in range(ndim - 2)), "row", "col"]


def axis_maxima_layouts(shape: Shape, dtype: str = ACCUMULATOR) -> Layouts:
    """Return the layout of one number per index of every dimension.

    Raises:
        ValueError: for fewer than two dimensions.
    """
    return {
        name: FieldLayout((size,), dtype, (i,))
        for i, (name, size) in enumerate(zip(axis_names(len(shape)), shape, strict=True))
    }


def blocks(shape: Shape, block: int = 256, signed: bool = True, codes: str = "uint8") -> Layouts:
    """Return the layout of one code per element and one fp32 maximum per block of consecutive elements."""
    return {"codes": _alike(shape, codes), "absmax": _per_block(shape, block)}


def packed_blocks(shape: Shape, block: int = 128, rank1: bool = False, signed: bool = True) -> Layouts:
    """Return the layout of two codes a byte and one fp32 maximum per block; per row and column with `rank1`."""
    if rank1:
        return rank_one_codes(shape)
    return {"codes": _per_byte(shape), "absmax": _per_block(shape, block)}


def rank_one_codes(shape: Shape) -> Layouts:
    """Return the layout of two codes a byte and one fp32 maximum per index of every dimension."""
    return {"codes": _per_byte(shape), **axis_maxima_layouts(shape, "float32")}


def low_rank_layouts(shape: Shape, rank: int = 4, signed: bool = True) -> Layouts:
    """Return the layout of the two factors of a matrix, and of what negative elements are read as where none can be.

    Raises:
        ValueError: for anything but two dimensions.
    """
    m, n = shape
    factors = {
        "u": FieldLayout((m, rank), ACCUMULATOR, (0, None)),
        "v": FieldLayout((rank, n), ACCUMULATOR, (None, 1)),
    }
    return factors if signed else {**factors, "fill": FieldLayout((), ACCUMULATOR)}


def sign_rank1_layouts(shape: Shape, signed: bool = True) -> Layouts:
    """Return the layout of eight signs a byte, if there are any, and of a number per row and column."""
    signs = {"signs": _per_byte(shape, SIGNS_PER_BYTE)} if signed else {}
    return {**signs, **factored_layouts(shape)}


def square_shape(count: int) -> Shape:
    """Return two factors of a number that differ least, the larger first; (0, 0) for 0."""
    side = next((i for i in range(isqrt(count), 0, -1) if count % i == 0), 0)
    return (count // side, side) if side else (0, 0)


def _alike(shape: Shape, dtype: str) -> FieldLayout:
    return FieldLayout(shape, dtype, tuple(range(len(shape))))


def _per_block(shape: Shape, block: int) -> FieldLayout:
    return FieldLayout((-(-prod(shape) // block),), "float32", (), block)


def _per_byte(shape: Shape, per: int = 2) -> FieldLayout:
    return FieldLayout((-(-prod(shape) // per),), "uint8", (), per)


# --- what is kept for writing weights -----------------------------------------------------------------------------


def kahan_layouts(shape: Shape) -> Layouts:
    """Return the layout of what `weights.Kahan` keeps: a number of the parameter's dtype per element."""
    return {"compensation": _alike(shape, PARAMETER)}


def split_layouts(shape: Shape, bits: int) -> Layouts:
    """Return the layout of what `weights.Split` keeps: 8 or 16 more bits per element."""
    return {"correction": _alike(shape, f"int{bits}")}


# --- by the words of a store --------------------------------------------------------------------------------------


def _float8(shape: Shape, block: int = 256, signed: bool = True) -> Layouts:
    return blocks(shape, block, codes="float8_e4m3fn")


_LAYOUTS: dict[str, Callable[..., Layouts]] = {
    "axismax": axis_maxima_layouts,
    "block4": packed_blocks,
    "block8": blocks,
    "factored": factored_layouts,
    "float8": _float8,
    "full": full_layouts,
    "grouped": group_means,
    "kahan": kahan_layouts,
    "lowrank": low_rank_layouts,
    "signrank1": sign_rank1_layouts,
    "split": split_layouts,
}

_DTYPES = {*SIZES, PARAMETER, "int8", "int16"}

_CODED = ("block4", "block8", "float8")


@lru_cache(maxsize=4096)
def layouts_of(words: str, shape: Shape, block: int = 0) -> Layouts | None:
    """Return the tensors of a statistic in the store that `words` name, which is fitted to this shape already.

    The words of a way to write weights give what is kept for the weight.

    block: the elements per scale if a file gives them beside the words, 0 if not.

    Returns None for stores that are not this library's, and {} where ours cannot keep this shape or is impossible.
    """
    call = _call(words)
    if call is None or call[0] not in _LAYOUTS:
        return None
    name, arguments, named = call
    if block and name in _CODED:
        arguments, named = (), {**named, "block": block}
    try:
        found = _LAYOUTS[name](shape, *arguments, **named)
    except (TypeError, ValueError, IndexError, ArithmeticError):
        return {}
    known = all(isinstance(field.dtype, str) and field.dtype in _DTYPES for field in found.values())
    return found if known else {}


def is_small(shape: Shape) -> bool:
    """Return whether stores of few bits keep a statistic of this shape in full."""
    return prod(shape) < FEWEST_CODED


def is_group_each(shape: Shape, by: str | int) -> bool:
    """Return whether every element is a group of its own, so that `optstate.stores.Grouped` keeps all in full."""
    return not shape or (len(shape) == 1 and by in ("row", 1))


def is_low_rank_larger(shape: Shape, rank: int = 4, signed: bool = True) -> bool:
    """Return whether two factors of this rank have as many numbers as the matrix, or there is no matrix."""
    return len(shape) != 2 or rank * sum(shape) >= prod(shape)


@lru_cache(maxsize=4096)
def kept_bytes(words: str, shape: Shape) -> int:
    """Return the bytes of a statistic for which a recipe asks for the store that `words` name, on one device.

    Stores keep some shapes in full. Parameters of any dtype but float64.
    """
    name, arguments, named = _call(words) or ("", (), {})
    if name in _CODED:
        in_full = is_small(shape)
    elif name == "grouped":
        in_full = is_group_each(shape, *arguments, **named)
    elif name == "lowrank":
        in_full = is_low_rank_larger(shape, *arguments, **named)
    else:
        in_full = name != "full" and len(shape) < 2
    found = full_layouts(shape) if in_full else layouts_of(words, shape)
    return sum(field.nbytes for field in (found or {}).values())


@lru_cache(maxsize=256)
def _call(words: str) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    """Return the name in lower case, the arguments and the named arguments of words; None if they are no such call."""
    try:
        return parsed_call(words)
    except ValueError:
        return None
