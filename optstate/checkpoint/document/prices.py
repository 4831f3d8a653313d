"""What recipes keep for given parameters, in closed formulas. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from math import prod

__all__ = ["RECIPES", "bytes_by_recipe"]

Shape = tuple[int, ...]

FP32 = 4
FEWEST_ELEMENTS = 4096
"""Smaller parameters are kept in full by stores of few bits."""


def full(shape: Shape) -> int:
    """One fp32 number per element."""
    return FP32 * prod(shape)


def factored(shape: Shape) -> int:
    """A mean per row and per column of every matrix in the last two dimensions."""
    if len(shape) < 2:
        return full(shape)
    *batch, rows, cols = shape
    return FP32 * prod(batch) * (rows + cols)


def of_matrices(shape: Shape) -> int:
    """The same, and nothing for parameters below two dimensions."""
    return factored(shape) if len(shape) >= 2 else 0


def block8(shape: Shape) -> int:
    """A byte per element and a maximum per 256."""
    count = prod(shape)
    return full(shape) if count < FEWEST_ELEMENTS else count + FP32 * -(-count // 256)


def block4(shape: Shape) -> int:
    """Half a byte per element and a maximum per 128."""
    count = prod(shape)
    return full(shape) if count < FEWEST_ELEMENTS else -(-count // 2) + FP32 * -(-count // 128)


def by_row(shape: Shape) -> int:
    """A mean per index of the first dimension."""
    return FP32 * shape[0] if len(shape) >= 2 else full(shape)


def axes(shape: Shape) -> int:
    """A maximum per index of every dimension."""
    return FP32 * sum(shape) if len(shape) >= 2 else full(shape)


RECIPES: dict[str, tuple[Callable[[Shape], int], ...]] = {
    "adafactor": (factored,),
    "adalomo": (factored,),
    "adamfactor": (block8, factored),
    "adammini": (full, by_row),
    "adamw": (full, full),
    "adamw4bit": (block4, block4),
    "adamw8bit": (block8, block8),
    "came": (factored, full, of_matrices),
    "lion": (full,),
    "lion8bit": (block8,),
    "lomo": (),
    "sgd": (),
    "sgdm8bit": (block8,),
    "sm3": (axes,),
}
"""The statistics of every recipe with its defaults, for parameters of any dtype but fp64 that declare no role."""


def bytes_by_recipe(shapes: Iterable[Shape]) -> dict[str, int]:
    """Bytes of state that every recipe keeps for parameters of these shapes, the smallest first."""
    counted = Counter(shapes)
    totals = {
        name: sum(count * price(shape) for shape, count in counted.items() for price in prices)
        for name, prices in RECIPES.items()
    }
    return dict(sorted(totals.items(), key=lambda item: (item[1], item[0])))
