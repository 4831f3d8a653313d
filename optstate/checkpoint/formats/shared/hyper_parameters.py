"""Hyper-parameters from the words of our recipes into those of a library's class. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optstate.checkpoint.formats.shared.tree_writer import LayoutError, TreeWriter, numbers
from optstate.text import shown

__all__ = ["NEEDED", "check_numbers", "find_pair", "translate"]

NEEDED = object()
"""In the place of a default: the document must have it."""

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


def check_numbers(writer: TreeWriter) -> None:
    """Raise LayoutError if what must be numbers in a group are none: a file may say anything."""
    for place, group in enumerate(writer.document.groups):
        for key, value in ((key, numbers(group.hyper[key])) for key in _NUMBERS if key in group.hyper):
            several = key in ("betas", "eps") and isinstance(value, tuple | list)
            if not all(part is None or isinstance(part, int | float) for part in (value if several else (value,))):
                raise LayoutError(
                    f"param group {place} has {key}={shown(repr(value))}, which {writer.layout} cannot read"
                )


def find_pair(writer: TreeWriter, place: int, hyper: Mapping[str, Any], key: str) -> tuple[Any, Any]:
    """Return the two numbers under a key.

    Raises:
        LayoutError: if there are none.
    """
    value = hyper.get(key)
    if not isinstance(value, tuple | list) or len(value) != 2 or None in value:
        raise LayoutError(f"param group {place} has {key}={shown(repr(value))}: {writer.layout} needs two numbers")
    return value[0], value[1]


def translate(writer: TreeWriter, place: int, hyper: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of group `place` as a class has them.

    hyper: in our words, `TreeWriter.common`. words: the keys of the class with their defaults. Keys that no library has
    are a user's own or a scheduler's, and stay.

    Raises:
        LayoutError: for one that is missing, or whose value cannot be expressed.
    """
    made = {}
    for key, default in words.items():
        value = hyper.get(key, default)
        if value is NEEDED:
            raise LayoutError(f"param group {place} has no {key!r}, which {writer.layout} needs")
        made[key] = default if value == default and default is not NEEDED else value
    for key, value in hyper.items():
        if key in words or key in HOW:
            continue
        if key not in NEUTRAL:
            made[key] = value
        elif value != NEUTRAL[key]:
            raise LayoutError(
                f"param group {place} has {key}={value!r}, which {writer.layout} cannot express: it does as with "
                f"{key}={NEUTRAL[key]!r}"
            )
    return made
