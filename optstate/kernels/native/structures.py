"""The structures that the C code reads, field by field as there: both change together, with `ABI_VERSION`."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any

import torch

__all__ = [
    "ABI_VERSION",
    "MOST_DIMENSIONS",
    "MOST_FACTORS",
    "NUMBERS",
    "BoxOperand",
    "Elementwise",
    "FactoredStep",
    "GradientOperand",
    "ManySteps",
    "MaximaStep",
    "MomentChange",
    "MomentKind",
    "MomentOperand",
    "ProductOperand",
    "SquareSums",
    "StepKind",
    "StepRule",
    "WeightOperand",
    "WriteKind",
]

ABI_VERSION = 4

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the C code calls the dtypes of parameters and gradients that it knows."""


class WriteKind(IntEnum):
    """How a weight is written."""

    PLAIN = 0
    STOCHASTIC = 1
    KAHAN = 2
    SPLIT16 = 3
    SPLIT8 = 4


class MomentKind(IntEnum):
    """How a moment is kept."""

    NOTHING = 0
    FULL32 = 1
    FULL16 = 2
    FULL16_RANDOM = 3
    SIGNED8 = 4
    UNSIGNED8 = 5
    SIGNED_E4M3 = 6
    UNSIGNED_E4M3 = 7
    SIGNED4 = 8
    LINEAR4 = 9
    SPREAD = 10
    """One number per `block` elements, moved beforehand."""
    OUTER = 11
    """One number per row times one per column, moved beforehand."""


class StepRule(IntEnum):
    """What a step makes of a gradient where every element goes its own way."""

    DESCENT = 0
    ADAM = 1
    LION = 2
    AVERAGE = 3
    HEAVY_BALL = 4
    ROOT_OF_SUM = 5


class StepKind(IntEnum):
    """What a table of steps has in the place of one parameter, and which functions make its step."""

    ELEMENTWISE = 0
    FACTORED = 1
    FULL = 2
    CONFIDENCE = 3
    """Two structures, one behind the other: the second moment, and the distances from the average."""
    MAXIMA = 4
    CHECKED = 5
    """The gradient is looked at, and something else makes the step."""


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def _counts(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


def _choices(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int32) for name in names]


def _numbers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_float) for name in names]


class WeightOperand(ctypes.Structure):
    """A parameter, what is kept beside it, and how new values are written."""

    _fields_ = [*_pointers("param", "extra"), *_counts("start"), *_choices("type", "how"), ("key", ctypes.c_uint32)]


class GradientOperand(ctypes.Structure):
    """A gradient, clamped to `bound` first, then multiplied by `scale`; `penalty` times the weight is added to it.

    largest: in a table of steps, the largest magnitude that is not refused; negative if nothing is compared.
    """

    _fields_ = [*_pointers("grad"), *_choices("type"), *_numbers("bound", "scale", "penalty", "largest")]


class MomentOperand(ctypes.Structure):
    """A statistic and the format that it is kept in."""

    _fields_ = [
        *_pointers("data", "scale", "values", "decades"),
        *_counts("start", "block"),
        *_choices("kind"),
        ("key", ctypes.c_uint32),
    ]


class Elementwise(ctypes.Structure):
    """A step in which every element, or block of elements, goes its own way.

    alive: what owns the tensors that this structure points to, kept while a thread may still work on them.
    """

    alive: Any = None

    _fields_ = [
        ("weight", WeightOperand),
        ("grad", GradientOperand),
        ("first", MomentOperand),
        ("second", MomentOperand),
        *_choices("rule", "nesterov", "moves_second"),
        *_numbers("first_weight", "second_weight", "mix", "inverse_correction", "eps", "step", "keep"),
    ]


class FactoredStep(ctypes.Structure):
    """A step whose second moment is factored, or one of a vector, whose second moment is kept in full.

    alive: as in `Elementwise`.
    """

    alive: Any = None

    _fields_ = [
        ("weight", WeightOperand),
        ("grad", GradientOperand),
        ("first", MomentOperand),
        *_counts("matrices", "rows", "cols", "parts"),
        *_pointers("row", "col", "row_factor", "col_factor", "col_parts", "squares"),
        *_numbers("averaging", "eps", "threshold", "least_rms", "step", "decay"),
        *_choices("decay_is_scaled"),
        *_numbers("first_weight", "after"),
    ]


class MaximaStep(ctypes.Structure):
    """A step that bounds sums of squares by the largest value of every row and column.

    alive: as in `Elementwise`.
    """

    alive: Any = None

    _fields_ = [
        ("weight", WeightOperand),
        ("grad", GradientOperand),
        ("first", MomentOperand),
        *_counts("rows", "cols", "parts"),
        *_pointers("row", "col", "col_parts"),
        *_numbers("eps", "step", "keep", "first_weight"),
    ]


MOST_FACTORS, MOST_DIMENSIONS = 4, 8
"""How many factors of a product and how many dimensions of a box there is room for."""


class ProductOperand(ctypes.Structure):
    """A product that is not multiplied out: a tensor, clamped first, times factors and a scale.

    The dimensions along which all factors run alike are joined, so that three are left: `strides` has three numbers for
    every factor, `rows` and `cols` are the sizes of the last two.
    """

    _fields_ = [
        ("dense", ctypes.c_void_p),
        ("factor", ctypes.c_void_p * MOST_FACTORS),
        ("strides", ctypes.c_int64 * (3 * MOST_FACTORS)),
        *_counts("rows", "cols"),
        *_choices("type", "factors"),
        *_numbers("bound", "scale"),
    ]


class BoxOperand(ctypes.Structure):
    """The part of a tensor that is here, where that is no run of consecutive elements."""

    _fields_ = [
        *_counts("dims"),
        ("shape", ctypes.c_int64 * MOST_DIMENSIONS),
        ("offset", ctypes.c_int64 * MOST_DIMENSIONS),
        ("whole", ctypes.c_int64 * MOST_DIMENSIONS),
    ]


class SquareSums(ctypes.Structure):
    """Where the sums of squares of rows and columns go."""

    _fields_ = [*_counts("matrices", "rows", "cols", "parts"), *_pointers("row", "col", "minus")]


class MomentChange(ctypes.Structure):
    """Adam's moments before and after a conversion."""

    _fields_ = [
        *_pointers("first", "second", "new_first", "new_second"),
        *_numbers("first_bias", "second_bias", "eps"),
    ]


class ManySteps(ctypes.Structure):
    """A table of steps: columns with one entry for each parameter.

    elements: of the parameter. steps: the address of a structure of the parameter. numbers: the address of a structure
    with the numbers of this step, which parameters share. updates: which step of the parameter this is; the keys of
    random bits in its structure are those of names alone. room_at: where the room of the parameter begins, in numbers
    of 8 bytes. fine: filled by `begin_many`: whether the gradient may be used. alive: as in `Elementwise`.
    """

    alive: Any = None

    _fields_ = [
        *_counts("count"),
        *_pointers("kinds", "elements", "steps", "numbers", "grads", "grad_types", "updates", "room_at"),
        *_pointers("room", "fine"),
    ]
