"""Hyper-parameters from one library's words into another's. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optstate.checkpoint.document.document import Group
from optstate.checkpoint.formats.tree_writer import Given, LayoutError, numbers
from optstate.text import shown

__all__ = [
    "BITSANDBYTES",
    "CAME",
    "LION",
    "SM3",
    "TORCHAO",
    "TORCH_ADAMW",
    "TORCH_SGD",
    "check",
    "common",
    "pair",
    "translated",
]

NEEDED = object()
"""In the place of a default: the document must have it."""

# Keys and defaults in the order of each class: torch 2.13, bitsandbytes 0.50, torchao 0.18, lion-pytorch 0.2,
# pytorch_optimizer 4.1.
TORCH_ADAMW: Mapping[str, Any] = {
    "lr": NEEDED,
    "betas": NEEDED,
    "eps": NEEDED,
    "weight_decay": NEEDED,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
TORCH_SGD: Mapping[str, Any] = {
    "lr": NEEDED,
    "momentum": 0,
    "dampening": 0,
    "weight_decay": NEEDED,
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
}
BITSANDBYTES: Mapping[str, Mapping[str, Any]] = {
    "adam": {
        "lr": NEEDED,
        "betas": NEEDED,
        "eps": NEEDED,
        "weight_decay": NEEDED,
        "alpha": 0.0,
        "t_alpha": None,
        "t_beta3": None,
    },
    "lion": {"lr": NEEDED, "betas": NEEDED, "eps": 0.0, "weight_decay": NEEDED},
    "sgd": {"lr": NEEDED, "betas": NEEDED, "eps": 0.0, "weight_decay": NEEDED},
}
TORCHAO: Mapping[str, Any] = {
    "lr": NEEDED,
    "betas": NEEDED,
    "eps": NEEDED,
    "weight_decay": NEEDED,
    "amsgrad": False,
}
LION: Mapping[str, Any] = {"lr": NEEDED, "betas": NEEDED, "weight_decay": NEEDED}
CAME: Mapping[str, Any] = {
    "lr": NEEDED,
    "foreach": None,
    "betas": NEEDED,
    "weight_decay": NEEDED,
    "weight_decouple": True,
    "fixed_decay": False,
    "ams_bound": False,
    "eps1": NEEDED,
    "eps2": NEEDED,
}
SM3: Mapping[str, Any] = {"lr": NEEDED, "momentum": 0.0, "beta": 0.0, "eps": NEEDED, "foreach": None}

HOW = ("foreach", "fused", "capturable", "differentiable")
"""These choose an implementation and change no result."""

_NUMBERS = ("lr", "betas", "eps", "weight_decay", "momentum", "beta1", "clip_threshold", "decay_rate", "eps1", "eps2")

NEUTRAL: Mapping[str, Any] = {
    "alpha": 0.0,
    "ams_bound": False,
    "amsgrad": False,
    "beta": 0.0,
    "clip_grad_norm": None,
    "clip_grad_value": None,
    "correct_bias": True,
    "dampening": 0,
    "decoupled_weight_decay": True,
    "fixed_decay": False,
    "maximize": False,
    "nesterov": False,
    "t_alpha": None,
    "t_beta3": None,
    "weight_decouple": True,
}
"""What a library without such a hyper-parameter does."""


def check(given: Given) -> None:
    """Raise LayoutError if what must be numbers in a group are none: a file may say anything."""
    for place, group in enumerate(given.document.groups):
        for key, value in ((key, numbers(group.hyper[key])) for key in _NUMBERS if key in group.hyper):
            several = key in ("betas", "eps") and isinstance(value, tuple | list)
            if not all(part is None or isinstance(part, int | float) for part in (value if several else (value,))):
                raise LayoutError(
                    f"param group {place} has {key}={shown(repr(value))}, which {given.layout} cannot read"
                )


def pair(given: Given, place: int, hyper: Mapping[str, Any], key: str) -> tuple[Any, Any]:
    """The two numbers under a key.

    Raises:
        LayoutError: if there are none.
    """
    value = hyper.get(key)
    if not isinstance(value, tuple | list) or len(value) != 2 or None in value:
        raise LayoutError(f"param group {place} has {key}={shown(repr(value))}: {given.layout} needs two numbers")
    return value[0], value[1]


def common(given: Given, group: Group) -> dict[str, Any]:
    """The hyper-parameters of a group in the words that most libraries share, small tensors as numbers."""
    hyper = {key: numbers(value) for key, value in group.hyper.items()}
    if given.tool == "bitsandbytes" and given.document.recipe in ("sgd", "sgdm8bit"):
        momentum = hyper.pop("betas", None)
        hyper["momentum"] = momentum[0] if isinstance(momentum, tuple | list) and momentum else None
        hyper.pop("eps", None)
    elif given.tool == "bitsandbytes" and given.document.recipe in ("lion", "lion8bit"):
        hyper.pop("eps", None)
    if given.tool == "pytorch_optimizer":
        hyper.pop("step", None)
    if isinstance(hyper.get("betas"), list):  # of a file in JSON
        hyper["betas"] = tuple(hyper["betas"])
    if hyper.get("decoupled_weight_decay") is False and not hyper.get("weight_decay"):
        del hyper["decoupled_weight_decay"]  # nothing decays
    return hyper


def translated(given: Given, place: int, hyper: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of group `place` as a class has them.

    hyper: in common words. words: the keys of the class with their defaults. Keys that no library has are a user's own
    or a scheduler's, and stay.

    Raises:
        LayoutError: for one that is missing, or whose value cannot be expressed.
    """
    made = {}
    for key, default in words.items():
        value = hyper.get(key, default)
        if value is NEEDED:
            raise LayoutError(f"param group {place} has no {key!r}, which {given.layout} needs")
        made[key] = default if value == default and default is not NEEDED else value
    for key, value in hyper.items():
        if key in words or key in HOW:
            continue
        if key not in NEUTRAL:
            made[key] = value
        elif value != NEUTRAL[key]:
            raise LayoutError(
                f"param group {place} has {key}={value!r}, which {given.layout} cannot express: it does as with "
                f"{key}={NEUTRAL[key]!r}"
            )
    return made
