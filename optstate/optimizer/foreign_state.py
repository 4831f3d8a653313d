"""State that another library's optimizer gave, handed to ours as it is: only where a step does what it did."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from optstate.other_libraries import OtherRule, departures, find_rule_by_keys, followed, strays, visible
from optstate.updates import Chain

__all__ = ["check_foreign_rule"]

ANYWAY = "optstate.load(optimizer, file, allow_lossy=True) takes the statistics over all the same"


def check_foreign_rule(
    saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], chains: Sequence[Chain]
) -> None:
    """Raise if saved param groups are of an optimizer that follows another rule than the chains of our groups.

    saved: of a `state_dict` that does not say that it is ours. own, chains: our groups in the same order, and where a
    step of each goes through. Empty groups follow no rule. State of ours that lost its header has no hyper-parameters
    but its own, and passes.

    Raises:
        ValueError: naming the hyper-parameter, what it changes and what to do.
    """
    groups = {
        place: _of_others(theirs, ours, chain)
        for place, (theirs, ours, chain) in enumerate(zip(saved, own, chains, strict=True))
        if len(theirs["params"])
    }
    if not groups:
        return
    rule = find_rule_by_keys([saved[place] for place in groups])
    if rule is not None and not rule.recipe:
        raise ValueError(f"the saved state is of {rule.kind}'s {rule.optimizer}: {rule.why}; {ANYWAY}")
    for place, group in groups.items():
        _check_group(rule, place, group, str(chains[place]))
    if rule is not None:
        _warn_of_doubts(rule, list(groups.values()))


def _of_others(theirs: Mapping[str, Any], ours: Mapping[str, Any], chain: Chain) -> dict[str, Any]:
    """Return the keys of a group that ours does not have with the same value, tensors of one number as numbers."""
    plain = {key: value.item() if _is_number(value) else value for key, value in theirs.items()}
    return {key: value for key, value in plain.items() if key in chain.hyper or not _same(value, ours.get(key))}


def _is_number(value: Any) -> bool:
    """Whether a value is a tensor of one number, or one of NumPy's numbers and truth values."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return getattr(value, "ndim", 1) == 0 and hasattr(value, "item")


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and isinstance(value, bool | int | float | str) and value == other


def _check_group(rule: OtherRule | None, place: int, group: Mapping[str, Any], chain: str) -> None:
    by_recipe, others = followed(rule, group)
    if chain in others or (by_recipe and (rule is None or chain == rule.chain)):
        return
    found = [departure for departure in departures(rule, [{}] * place + [group]) if departure.group == place]
    clauses = [f"{each}" + (f" ({each.advice})" if each.advice else "") for each in found]
    if not clauses and rule is not None:
        clauses = [f"param group {place} went through {rule.chain}"]
    raise ValueError(f"the saved state follows another rule: {'; '.join(clauses)}; here it is {chain}; {ANYWAY}")


def _warn_of_doubts(rule: OtherRule, groups: Sequence[Mapping[str, Any]]) -> None:
    """Say what the groups do not tell, and which of their keys nobody knows."""
    decaying = [group for group in groups if group.get("weight_decay")]
    coupled = rule.switches.get("decoupled_weight_decay")
    untold = coupled is not None and any("decoupled_weight_decay" not in group for group in decaying)
    what = "whether weight decay is decoupled" if untold else rule.untold
    if decaying and what:
        taken = "decoupled" if untold else "not"
        warnings.warn(f"the saved state does not say {what}: it is taken for {taken}", stacklevel=7)
    if keys := strays(rule, groups):
        warnings.warn(
            f"hyper-parameters that are not known here are carried along: {', '.join(map(visible, keys))}", stacklevel=7
        )
