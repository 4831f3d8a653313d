"""The bytes of state that every recipe keeps for given parameters. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from math import prod

from optstate.store_layouts import Shape, kept_bytes, square_shape

__all__ = ["RECIPES", "bytes_by_recipe"]

FULL, FACTORED, BLOCK8, BLOCK4 = "Full()", "Factored()", "Block8()", "Block4()"
OF_MATRICES, OF_OTHERS = "of matrices: ", "of others: "
OF_OTHER_THAN_PLANES = "of other than two dimensions: "
AS_SQUARE, AS_NUMBER, AS_GRAM = "as a square: ", "as a number: ", "as Gram matrices: "
AS_PROJECTION = "as a projection and its basis: "

LONGEST_TURNED, PROJECTED_RANK = 10000, 128

OF_PLANES, ROWS, NUMBERS_OF_ROWS = "of two dimensions: ", "as chosen rows: ", "a number of chosen rows: "
NUMBERS_OF_PLANES = {1: "a number of two dimensions: ", 5: "five numbers of two dimensions: "}
LEFT_OUT = "a number for each line that is left out: "


def basis_of(rank: int) -> str:
    """Return what stands before the store of the vectors that matrices are projected on."""
    return f"as a basis of {rank}: "


def projected_on(rank: int) -> str:
    """Return what stands before the store of a statistic of projected gradients."""
    return f"projected on {rank}: "


def _projected(rank: int, basis: str = "", first: str = FULL, second: str = FULL, others: str = FULL) -> list[str]:
    """Return the stores of a recipe that projects matrices for two moments, and keeps full moments of all others."""
    moments = [projected_on(rank) + first, projected_on(rank) + second, *[OF_OTHER_THAN_PLANES + others] * 2]
    return [basis_of(rank) + basis, *moments] if basis else moments


def _thin(shape: Shape) -> list[Shape]:
    """Return the shapes of a projection and of the vectors it is made with, of a matrix."""
    if len(shape) != 2:
        return []
    rank = min(PROJECTED_RANK, *shape)
    return [(shape[0], rank), (rank, shape[1])]


def _of_planes(shapes: Callable[[int, int], list[Shape]]) -> Callable[[Shape], list[Shape]]:
    """Return what gives shapes for the sides of a parameter of two dimensions, and nothing for any other."""
    return lambda shape: shapes(*shape) if len(shape) == 2 else []


def _vectors_along(side: Callable[[int, int], int], rank: int) -> Callable[[Shape], list[Shape]]:
    """Return what gives the shape of `rank` vectors along the shorter (min) or the longer side (max) of a matrix."""
    return _of_planes(lambda m, n: [(min(rank, m, n), side(m, n))])


TENSORS: dict[str, Callable[[Shape], list[Shape]]] = {
    OF_MATRICES: lambda shape: [shape] if len(shape) >= 2 else [],
    OF_OTHERS: lambda shape: [shape] if len(shape) < 2 else [],
    OF_OTHER_THAN_PLANES: lambda shape: [shape] if len(shape) != 2 else [],
    AS_SQUARE: lambda shape: [square_shape(prod(shape))],
    AS_NUMBER: lambda shape: [()],
    AS_GRAM: lambda shape: [(n, n) for n in shape if n <= LONGEST_TURNED] if len(shape) >= 2 else [],
    AS_PROJECTION: _thin,
    OF_PLANES: _of_planes(lambda m, n: [(m, n)]),
    NUMBERS_OF_PLANES[1]: _of_planes(lambda m, n: [()]),
    NUMBERS_OF_PLANES[5]: _of_planes(lambda m, n: [(5,)]),
    ROWS: _of_planes(lambda m, n: [(min(PROJECTED_RANK, m), n)]),
    NUMBERS_OF_ROWS: _of_planes(lambda m, n: [(min(PROJECTED_RANK, m),)]),
    LEFT_OUT: _of_planes(lambda m, n: [(max(m, n),)] if min(m, n) > PROJECTED_RANK else []),
}
for _rank in (1, 16, PROJECTED_RANK, 256):
    TENSORS[basis_of(_rank)] = _vectors_along(min, _rank)
    TENSORS[projected_on(_rank)] = _vectors_along(max, _rank)
"""What may stand before the words of a store: the shapes of the tensors that the statistic is of, for a parameter."""

RECIPES: dict[str, tuple[str, ...]] = {
    "adafactor": (FACTORED,),
    "adalomo": (FACTORED,),
    "adamfactor": (BLOCK8, FACTORED),
    "adammini": (FULL, "Grouped(by='row')"),
    "adamem": (*_projected(PROJECTED_RANK, FULL, second=FACTORED), LEFT_OUT + FULL),
    "adamw": (FULL, FULL),
    "adamw4bit": (BLOCK4, BLOCK4),
    "adamw8bit": (BLOCK8, BLOCK8),
    "adamsmn": (FULL,),
    "adarankgrad": (*_projected(PROJECTED_RANK, FULL), NUMBERS_OF_PLANES[1] + FULL),
    "apollo": (*_projected(256), NUMBERS_OF_PLANES[1] + FULL),
    "apollomini": (*_projected(1), NUMBERS_OF_PLANES[1] + FULL),
    "ademamix": (FULL, FULL, FULL),
    "came": (FACTORED, FULL, OF_MATRICES + FACTORED),
    "fira": (*_projected(PROJECTED_RANK, FULL), NUMBERS_OF_PLANES[1] + FULL),
    "galore": (*_projected(PROJECTED_RANK, FULL),),
    "galore2": (*_projected(PROJECTED_RANK, FULL),),
    "grass": (ROWS + FULL, ROWS + FULL, NUMBERS_OF_ROWS + FULL, *[OF_OTHER_THAN_PLANES + FULL] * 2),
    "ldadam": (*_projected(16, FULL), OF_PLANES + FULL),
    "lion": (FULL,),
    "lion8bit": (BLOCK8,),
    "lomo": (),
    "mlorc": ("LowRank()", "LowRank(signed=False)"),
    "mlorclion": ("LowRank()",),
    "muon": (FULL, OF_OTHERS + FULL),
    "muon8bit": (BLOCK8, OF_OTHERS + BLOCK8),
    "qgalore": (
        *_projected(PROJECTED_RANK, "Block4(block=256)", BLOCK8, BLOCK8, BLOCK8),
        *(NUMBERS_OF_PLANES[count] + FULL for count in (1, 5)),
    ),
    "scale": (OF_OTHERS + FULL, OF_OTHERS + FULL),
    "schedulefreeadamw": (FULL, FULL, AS_NUMBER + FULL, AS_NUMBER + FULL),
    "sgd": (),
    "sgdm8bit": (BLOCK8,),
    "sm3": ("AxisMax()",),
    "smmf": (AS_SQUARE + "SignRank1()", AS_SQUARE + "SignRank1(signed=False)"),
    "soap": (FULL, FULL, AS_GRAM + FULL, AS_GRAM + FULL),
    "sumo": (AS_PROJECTION + FULL, OF_OTHER_THAN_PLANES + FULL, OF_OTHER_THAN_PLANES + FULL),
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
    prefix = next((prefix for prefix in TENSORS if words.startswith(prefix)), None)
    if prefix is None:
        return kept_bytes(words, shape)
    return sum(kept_bytes(words.removeprefix(prefix), tensor) for tensor in TENSORS[prefix](shape))
