"""Recipes that are not of AdaLomo's family, and the registry of all by name."""

from optstate.recipes.adamw import AdamW
from optstate.recipes.lion import Lion
from optstate.recipes.registry import describe, get, names
from optstate.recipes.sgd import SGD

__all__ = ["SGD", "AdamW", "Lion", "describe", "get", "names"]
