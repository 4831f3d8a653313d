"""The hyper-parameters of a file in the words of our recipes, and what a recipe is built with to follow its rule."""

from __future__ import annotations

from typing import Any

from optstate.checkpoint.document.chain_words import parse_chain
from optstate.checkpoint.document.document import Document, Group
from optstate.checkpoint.formats.registry import translate_group
from optstate.checkpoint.formats.shared.adafactor import find_arguments
from optstate.checkpoint.formats.shared.statistics import RULES
from optstate.checkpoint.formats.shared.tree_writer import numbers

__all__ = ["arguments_of", "hyper_of", "same_rule"]


def same_rule(recipe: str, other: str) -> bool:
    """Whether two recipes do the same with statistics that may be kept differently."""
    return bool(recipe) and RULES.get(recipe, recipe) == RULES.get(other, other)


def hyper_of(document: Document, group: Group) -> dict[str, Any]:
    """The hyper-parameters of a group under the keys and with the values that groups of the document's recipe have.

    What our recipe does not have stays as it is. lr of a relative step is 1, a factor.
    """
    hyper = translate_group(document, group)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in hyper.items()}


def arguments_of(document: Document, group: Group, chain: str) -> dict[str, Any]:
    """What the document's recipe is built with, for its parameters to go through the chain that those of a group did.

    chain: in words, "" where the file does not tell it. Hyper-parameters that the recipe does not have are there, too.
    """
    hyper = {key: numbers(value) for key, value in hyper_of(document, group).items()}
    rule, transforms = RULES.get(document.recipe, ""), parse_chain(chain)
    if rule == "sgd" and chain:
        hyper["nesterov"] = transforms.has("momentum", "nesterov")
    if rule == "adafactor":
        hyper |= find_arguments(hyper, transforms, of_torch="beta2_decay" in group.hyper)
    return hyper
