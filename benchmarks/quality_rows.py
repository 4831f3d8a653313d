"""The rows of the quality benchmark: one per recipe, store and way to write weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import recipes, stores, weights

__all__ = ["LEARNING_RATES", "PAPER_LR", "ROWS", "Row", "grid", "match", "needed", "row_of", "searching_row"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    recipe: whose learning rate the row takes; the first row of a recipe chooses it for all.
    build: the optimizer from parameters and learning rate; looks its parts up only when called.
    fused: updated inside the backward pass.
    reference: the row that the loss is divided by.
    at_most: a goal, the bound on that ratio.
    above: the opposite goal, a ratio that is exceeded visibly.
    lr: a fixed learning rate in place of the recipe's.
    params: what the optimizer is built from.
    """

    name: str
    recipe: str
    build: Callable[[Iterable[Any], float], optstate.Optimizer]
    dtype: str = "float32"
    fused: bool = False
    reference: str | None = "AdamW"
    at_most: float | None = None
    above: float | None = None
    lr: float | None = None
    params: Callable[[nn.Module], Iterable[Any]] = nn.Module.named_parameters

    def optimizer(self, model: nn.Module, lr: float) -> optstate.Optimizer:
        """Build the row's optimizer over the model's parameters."""
        optimizer = self.build(self.params(model), lr)
        if self.fused:
            optstate.fuse_backward(optimizer)
        return optimizer


LEARNING_RATES = {
    "AdamW": 1e-3,
    "Lion": 1.5e-4,
    "SGDM": 1.5e-2,
    "CAME": 1e-4,
    "SM3": 5e-3,
    "Adafactor": 1e-3,
    "AdaLomo": 5e-2,
    "Lomo": 5e-2,
}
"""The middle of each recipe's grid, from a coarse search by the loss on the selection text after 300 steps.

The demo trains longer and with other rates (examples/lm.py).
"""

PAPER_LR = 1e-3
"""AdaLomo's paper has 5e-4 to 1e-3, for trained models. This one starts from nothing and would take much more."""

ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.01}
"""Options of every row with Adam's moments: the betas customary for language models, torch's weight decay."""

BF16 = "bfloat16"

ROWS = [
    Row("AdamW", "AdamW", lambda p, lr: recipes.AdamW(p, lr, **ADAM), reference=None),
    Row("AdamW8bit", "AdamW", lambda p, lr: recipes.AdamW8bit(p, lr, **ADAM), at_most=1.005),
    Row("AdamW4bit", "AdamW", lambda p, lr: recipes.AdamW4bit(p, lr, **ADAM)),
    Row(
        "AdamW, Float8 moments",
        "AdamW",
        lambda p, lr: recipes.AdamW(p, lr, **ADAM, first=stores.Float8(), second=stores.Float8()),
    ),
    Row("AdamFactor", "AdamW", lambda p, lr: recipes.AdamFactor(p, lr, **ADAM), at_most=1.01),
    Row(
        "AdamMini",
        "AdamW",
        lambda p, lr: recipes.AdamMini(p, lr, **ADAM),
        params=lambda model: optstate.declare_roles(model),
    ),
    Row("Lion", "Lion", lambda p, lr: recipes.Lion(p, lr)),
    Row("Lion8bit", "Lion", lambda p, lr: recipes.Lion8bit(p, lr), reference="Lion"),
    Row("SGD, momentum 0.9", "SGDM", lambda p, lr: recipes.SGD(p, lr, momentum=0.9)),
    Row("SGDM8bit", "SGDM", lambda p, lr: recipes.SGDM8bit(p, lr, momentum=0.9), reference="SGD, momentum 0.9"),
    Row("CAME", "CAME", lambda p, lr: recipes.CAME(p, lr)),
    Row("SM3, momentum 0.9", "SM3", lambda p, lr: recipes.SM3(p, lr, momentum=0.9)),
    # Steps relative to the parameter's size would make it AdaLomo's rule once more.
    Row("Adafactor, absolute steps", "Adafactor", lambda p, lr: Adafactor(p, lr, scale_parameter=False)),
    Row("AdaLomo, fused", "AdaLomo", lambda p, lr: AdaLomo(p, lr), fused=True),
    Row("Lomo, fused", "Lomo", lambda p, lr: Lomo(p, lr), fused=True),
    Row(
        "AdamW, bf16 Plain",
        "AdamW",
        lambda p, lr: recipes.AdamW(p, lr, **ADAM, weights=weights.Plain()),
        dtype=BF16,
    ),
    Row(
        "AdamW, bf16 StochasticRounding",
        "AdamW",
        lambda p, lr: recipes.AdamW(p, lr, **ADAM, weights=weights.StochasticRounding()),
        dtype=BF16,
    ),
    Row(
        "AdamW, bf16 Kahan",
        "AdamW",
        lambda p, lr: recipes.AdamW(p, lr, **ADAM, weights=weights.Kahan()),
        dtype=BF16,
    ),
    Row(
        "AdamW8bit, bf16 Split(8)",
        "AdamW",
        lambda p, lr: recipes.AdamW8bit(p, lr, **ADAM, weights=weights.Split(8)),
        dtype=BF16,
    ),
    Row(
        "AdamW, bf16 Split(8)",
        "AdamW",
        lambda p, lr: recipes.AdamW(p, lr, **ADAM, weights=weights.Split(8)),
        dtype=BF16,
        at_most=1.005,
    ),
    Row(
        "AdamW, bf16 Split(16)",
        "AdamW",
        lambda p, lr: recipes.AdamW(p, lr, **ADAM, weights=weights.Split(16)),
        dtype=BF16,
    ),
    Row(
        "AdamW, bf16 auto, bf16 moments",
        "AdamW",
        lambda p, lr: recipes.AdamW(p, lr, **ADAM, first=stores.Full(BF16), second=stores.Full(BF16)),
        dtype=BF16,
    ),
    Row(
        "AdaLomo, fused, bf16 auto",
        "AdaLomo",
        lambda p, lr: AdaLomo(p, lr),
        dtype=BF16,
        fused=True,
        reference="AdaLomo, fused",
        at_most=1.01,
    ),
    Row(
        "AdaLomo, fused, bf16 Plain",
        "AdaLomo",
        lambda p, lr: AdaLomo(p, lr, weights=weights.Plain()),
        dtype=BF16,
        fused=True,
        reference="AdaLomo, fused",
    ),
    Row(
        "AdaLomo, paper lr, fused",
        "AdaLomo",
        lambda p, lr: AdaLomo(p, lr),
        fused=True,
        reference="AdaLomo, fused",
        lr=PAPER_LR,
    ),
    Row(
        "AdaLomo, paper lr, fused, bf16 auto",
        "AdaLomo",
        lambda p, lr: AdaLomo(p, lr),
        dtype=BF16,
        fused=True,
        reference="AdaLomo, paper lr, fused",
        lr=PAPER_LR,
    ),
    Row(
        "AdaLomo, paper lr, fused, bf16 Plain",
        "AdaLomo",
        lambda p, lr: AdaLomo(p, lr, weights=weights.Plain()),
        dtype=BF16,
        fused=True,
        reference="AdaLomo, paper lr, fused, bf16 auto",
        above=1.01,
        lr=PAPER_LR,
    ),
]

_BY_NAME = {row.name: row for row in ROWS}


def row_of(name: str) -> Row:
    """Return the row of this name."""
    return _BY_NAME[name]


def searching_row(recipe: str) -> Row:
    """Return the row that chooses a recipe's learning rate: its first."""
    return next(row for row in ROWS if row.recipe == recipe)


def grid(recipe: str) -> list[float]:
    """Return the learning rates that a recipe chooses from."""
    return [LEARNING_RATES[recipe] * factor for factor in (0.5, 1.0, 2.0)]


def match(patterns: Iterable[str]) -> list[Row]:
    """Return the rows whose name fits one of the shell patterns, in any case, in the table's order.

    Raises:
        LookupError: with the first pattern that fits none.
    """
    found: set[str] = set()
    for pattern in patterns:
        fitting = {row.name for row in ROWS if fnmatchcase(row.name.lower(), pattern.lower())}
        if not fitting:
            raise LookupError(pattern)
        found |= fitting
    return [row for row in ROWS if row.name in found]


def needed(chosen: Iterable[Row]) -> list[Row]:
    """Return the chosen rows and all that they are compared with, directly or not, in the table's order."""
    names: set[str] = set()
    for row in chosen:
        names.add(row.name)
        while row.reference is not None:
            row = _BY_NAME[row.reference]
            names.add(row.name)
    return [row for row in ROWS if row.name in names]
