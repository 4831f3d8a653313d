"""What a param group may hold besides hyper-parameters, and what looks like one that was misspelled."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["DECLARATIONS", "refuse_unknown"]

DECLARATIONS = frozenset(("params", "param_names", "role", "head_size"))
"""What says which parameters are in the group, and what they are."""

OF_SCHEDULERS = frozenset(("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "name"))
"""What schedulers and those who watch them keep there."""

OURS = frozenset(
    (
        *("lr", "betas", "beta1", "beta2", "momentum", "dampening", "weight_decay", "eps", "floor", "param_rms_eps"),
        *("decay_rate", "clip_threshold", "clip_norm", "clip_grad_value"),
    )
)
"""Hyper-parameters of this library's transforms, under the names that they have unless a recipe chooses others."""

RULES = frozenset(("amsgrad", "maximize", "nesterov", "centered", "caution", "cautious"))
"""Switches of other libraries' optimizers that make another rule of theirs."""

DECOUPLED = ("decoupled_weight_decay", "weight_decouple")
"""What other libraries call a decay that is not part of the gradient, as it is not in this library's recipes."""

SYNONYMS = {"learning_rate": "lr", "epsilon": "eps", "weight_decay_rate": "weight_decay", "wd": "weight_decay"}


def refuse_unknown(group: Mapping[str, Any], known: Collection[str], elsewhere: Collection[str]) -> None:
    """Raise ValueError for a key of a param group that was meant to be a hyper-parameter and would have no effect.

    Keys that are nobody's hyper-parameter, such as `lr_scale`, are kept for those who read them.

    known: hyper-parameters that the group has. elsewhere: those that other groups of the same optimizer may have.
    """
    listed = ", ".join(sorted(known))
    for key in sorted(map(str, set(group) - set(known) - DECLARATIONS - OF_SCHEDULERS)):
        value = group.get(key)
        if key in RULES or key in OURS or key in elsewhere:
            if _is_off(value):
                continue  # a decay of zero, where there is no decay
            if key not in RULES:
                raise ValueError(f"unknown hyper-parameter {key!r} in a param group: its chain has {listed}")
            raise ValueError(
                f"{key}={value!r} in a param group asks for another rule than that of its chain, which has {listed}: "
                "leave it out, or choose a recipe that has it"
            )
        if key in DECOUPLED and value is False and not _is_off(group.get("weight_decay")):
            raise ValueError(
                f"{key}=False in a param group asks for a decay that is part of the gradient: leave it out, or compose "
                "a chain with add_decayed_weights before the moments"
            )
        meant = None if key in DECOUPLED else _meant(key, {*known, *elsewhere, *OURS})
        if meant is not None:
            raise ValueError(
                f"unknown hyper-parameter {key!r} in a param group: did you mean {meant!r}? Its chain has {listed}; "
                "a key of your own needs a name less like it"
            )


def _is_off(value: Any) -> bool:
    """Whether a value switches off what it is about."""
    return value is None or (isinstance(value, int | float) and not value)


def _meant(key: str, names: Collection[str]) -> str | None:
    """Return the hyper-parameter that a key nearly spells; a key with more words is another name."""
    spelled = key.lower().replace("-", "_")
    if spelled in SYNONYMS:
        return SYNONYMS[spelled]
    if spelled in names:
        return spelled
    for near in difflib.get_close_matches(spelled, sorted(names), n=1, cutoff=0.8):
        has_more_words = f"_{near}_" in f"_{spelled}_" and spelled.strip("_") != near
        return None if has_more_words else near
    return None
