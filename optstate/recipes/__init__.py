"""Recipes: optimizers made of a chain, each on one screen (without AdaLomo's family), and the registry by name."""

from optstate.recipes.adam_mini import AdamMini
from optstate.recipes.adamfactor import AdamFactor
from optstate.recipes.adamw import AdamW
from optstate.recipes.came import CAME
from optstate.recipes.lion import Lion
from optstate.recipes.low_bit import AdamW4bit, AdamW8bit, Lion8bit, SGDM8bit
from optstate.recipes.registry import describe, get, names
from optstate.recipes.sgd import SGD
from optstate.recipes.sm3 import SM3

__all__ = [
    "CAME",
    "SGD",
    "SM3",
    "AdamFactor",
    "AdamMini",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "Lion",
    "Lion8bit",
    "SGDM8bit",
    "describe",
    "get",
    "names",
]
