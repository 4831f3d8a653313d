"""The hyper-parameters of a file in the words of our recipes, and what a recipe is built with to follow its rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optstate.checkpoint.document.document import Document, Group
from optstate.checkpoint.document.rules import library_of
from optstate.checkpoint.formats.adafactor_rules import AVERAGES_STEPS, FP32_EPS
from optstate.checkpoint.formats.meanings import RULES
from optstate.checkpoint.formats.tree_writer import number, numbers

__all__ = ["arguments_of", "hyper_of", "same_rule"]

DEFAULT_EPS = (1e-30, 1e-3)
CAPPED, WARM, SCHEDULED = "cap_by_inverse_root", "warm_relative_step", "scale_by_schedule"


def same_rule(recipe: str, other: str) -> bool:
    """Whether two recipes do the same with statistics that may be kept differently."""
    return bool(recipe) and RULES.get(recipe, recipe) == RULES.get(other, other)


def hyper_of(document: Document, group: Group) -> dict[str, Any]:
    """The hyper-parameters of a group under the keys and with the values that groups of the document's recipe have.

    What our recipe does not have stays as it is. lr of a relative step is 1, a factor.
    """
    hyper = {key: tuple(value) if isinstance(value, list) else value for key, value in group.hyper.items()}
    rule, library = RULES.get(document.recipe, ""), library_of(document)
    if rule == "adafactor" and "beta2_decay" in hyper:
        eps = hyper["eps"]
        hyper["eps"] = (FP32_EPS if eps[0] is None else eps[0], eps[1])
        hyper |= {"decay_rate": hyper.pop("beta2_decay"), "clip_threshold": hyper.pop("d")}
    if rule == "adafactor" and hyper.get("relative_step"):
        hyper["lr"] = 1.0
    if library == "bitsandbytes" and rule == "sgd":
        hyper["momentum"] = numbers(hyper.pop("betas"))[0]
    if library == "bitsandbytes" and rule in ("sgd", "lion"):
        hyper.pop("eps", None)  # which these rules do not have
    if library == "adam-mini" and {"beta1", "beta2"} <= hyper.keys():
        hyper["betas"] = (hyper.pop("beta1"), hyper.pop("beta2"))
    if rule in ("adalomo", "came") and {"eps1", "eps2"} <= hyper.keys():
        hyper["eps"] = (hyper.pop("eps1"), hyper.pop("eps2"))
    return hyper


def arguments_of(document: Document, group: Group, chain: str) -> dict[str, Any]:
    """What the document's recipe is built with, for its parameters to go through the chain that those of a group did.

    chain: in words, "" where the file does not tell it. Hyper-parameters that the recipe does not have are there, too.
    """
    hyper = {key: numbers(value) for key, value in hyper_of(document, group).items()}
    rule = RULES.get(document.recipe, "")
    if rule == "sgd" and chain:
        hyper["nesterov"] = "momentum(nesterov" in chain
    if rule == "adafactor":
        hyper |= _flags_of_adafactor(hyper, chain, of_torch="beta2_decay" in group.hyper)
    return hyper


def _flags_of_adafactor(hyper: Mapping[str, Any], chain: str, of_torch: bool) -> dict[str, Any]:
    """The arguments of our Adafactor that are no hyper-parameters of its groups."""
    capped = CAPPED in chain if chain else of_torch
    relative = SCHEDULED in chain and not capped if chain else bool(number(hyper.get("relative_step")))
    eps = tuple(hyper.get("eps", ()))
    return {
        "lr": None if relative else hyper.get("lr"),
        "eps": (*eps, *DEFAULT_EPS[len(eps) :]),  # without scaling groups have no second one
        "relative_step": relative,
        "scale_parameter": "scale_by_param_rms" in chain if chain else hyper.get("scale_parameter", True),
        "warmup_init": WARM in chain if chain else bool(hyper.get("warmup_init")),
        "momentum_before_lr": not chain.endswith(AVERAGES_STEPS) if chain else hyper.get("beta1") is None,
        "torch_compatible": capped,
    }
