"""The bytes of state that every recipe keeps for given parameters. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from optstate.store_layouts import Shape, kept_bytes

__all__ = ["RECIPES", "bytes_by_recipe"]

FULL, FACTORED, BLOCK8, BLOCK4 = "Full()", "Factored()", "Block8()", "Block4()"
OF_MATRICES = "of matrices: "
"""Before the words of a store: only parameters of two or more dimensions have the statistic."""

RECIPES: dict[str, tuple[str, ...]] = {
    "adafactor": (FACTORED,),
    "adalomo": (FACTORED,),
    "adamfactor": (BLOCK8, FACTORED),
    "adammini": (FULL, "Grouped(by='row')"),
    "adamw": (FULL, FULL),
    "adamw4bit": (BLOCK4, BLOCK4),
    "adamw8bit": (BLOCK8, BLOCK8),
    "came": (FACTORED, FULL, OF_MATRICES + FACTORED),
    "lion": (FULL,),
    "lion8bit": (BLOCK8,),
    "lomo": (),
    "sgd": (),
    "sgdm8bit": (BLOCK8,),
    "sm3": ("AxisMax()",),
}
"""The stores of every recipe with its defaults, for parameters of any dtype but fp64 that declare no role. Recipes
themselves cannot be asked: they are built on torch."""


def bytes_by_recipe(shapes: Iterable[Shape]) -> dict[str, int]:
    """Return the bytes of state that every recipe keeps for parameters of these shapes, the smallest first."""
    counted = Counter(shapes)
    totals = {
        name: sum(count * _bytes(words, shape) for shape, count in counted.items() for words in stores)
        for name, stores in RECIPES.items()
    }
    return dict(sorted(totals.items(), key=lambda item: (item[1], item[0])))


def _bytes(words: str, shape: Shape) -> int:
    if words.startswith(OF_MATRICES):
        return kept_bytes(words.removeprefix(OF_MATRICES), shape) if len(shape) >= 2 else 0
    return kept_bytes(words, shape)
