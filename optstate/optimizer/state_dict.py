"""Strict loading of an optimizer's `state_dict`: check everything, then change something."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from optstate import naming
from optstate.optimizer.foreign_state import check_foreign_rule
from optstate.optimizer.missing_state import Gap, rule
from optstate.optimizer.param_groups import check_values
from optstate.optimizer.parameters import Leaf
from optstate.optimizer.plan import ParamPlan, Plan
from optstate.spec import is_fake
from optstate.updates import Chain

__all__ = [
    "COMPLETE",
    "KEY",
    "NAMES_COMPARED",
    "check_state_dict",
    "entries",
    "header",
    "loaded_groups",
    "names_to_take_over",
    "paired",
    "warn_if_rounded_otherwise",
    "warn_if_unclipped",
    "warn_if_unnamed",
    "warn_if_written_otherwise",
]

KEY = "optstate"
VERSION = 1

MOST_STEPS = 1 << 63

COMPLETE = "complete"
"""Key of the header: whether there is state for all parameters that trained, as there is unless it says otherwise."""

NAMES_COMPARED = "names_compared"
"""Key of the header of what was read from a file: names were compared there, and are not in the groups."""


def header(plan: Plan, clip_grad_norm: float | None) -> dict[str, Any]:
    """Return what `state_dict` adds to torch's keys: a version, stores and ways to write weights, and the norm clip.

    Stores and ways to write weights are given by parameter index.
    """
    stores = {i: param.stores for i, param in enumerate(plan)}
    weights = {i: str(param.weights) for i, param in enumerate(plan)}
    return {"version": VERSION, "stores": stores, "weights": weights, "clip_grad_norm": clip_grad_norm}


def warn_if_unclipped(saved: Mapping[str, Any], clip_grad_norm: float | None) -> None:
    """Warn if the saved run clipped by another norm than this one will: the run would go on differently."""
    theirs = saved.get(KEY, {}).get("clip_grad_norm", clip_grad_norm)
    if theirs != clip_grad_norm:
        warnings.warn(
            f"the saved run was fused with clip_grad_norm={theirs}, this optimizer has {clip_grad_norm}: "
            f"call optstate.fuse_backward(optimizer, clip_grad_norm={theirs}) before loading to go on alike",
            stacklevel=4,
        )


def warn_if_written_otherwise(saved: Mapping[str, Any], plan: Plan) -> None:
    """Warn if the saved run rounded weights in another way than this one will: the run would go on differently."""
    theirs = saved.get(KEY, {}).get("weights", {})
    for i, param in enumerate(plan):
        if theirs.get(i, str(param.weights)) != str(param.weights):
            warnings.warn(
                f"{param.spec.name!r} was written by {theirs[i]} in the saved run, here it is by {param.weights}: "
                "give the optimizer the same weights=... to go on alike",
                stacklevel=4,
            )
            return


def entries(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Pairs of a parameter and its saved state, matched by order; the state is empty where nothing was saved."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    indices = (i for group in saved["param_groups"] for i in group["params"])
    for param, index in zip(params, indices, strict=True):
        yield param, saved["state"].get(index, {})


def paired(own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any] | None]:
    """Return the saved group for each of this optimizer's own, None for an empty one that was not saved.

    Trainers make an empty group or leave it out, as parameters happen to need it: it holds no state either way.

    Raises:
        ValueError: if other groups than empty ones are there on one side only.
    """
    counts = [[len(group["params"]) for group in groups] for groups in (own, saved)]
    filled = [[count for count in sizes if count] for sizes in counts]
    if counts[0] != counts[1] and filled[0] == filled[1]:
        left = iter(group for group in saved if len(group["params"]))
        return [next(left) if len(group["params"]) else None for group in own]
    if len(own) != len(saved):
        raise ValueError(f"the saved optimizer had {len(saved)} param groups, this one has {len(own)}")
    return list(saved)


def loaded_groups(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the saved hyper-parameters with this optimizer's parameters and names, and with keys of its own."""
    groups = []
    for ours, theirs in zip(own, paired(own, saved), strict=True):
        hyper = {key: value for key, value in (theirs or {}).items() if key not in ("params", "param_names")}
        groups.append(ours | deepcopy(hyper))
    return groups


# --- names --------------------------------------------------------------------------------------------------------


def warn_if_unnamed(own: Sequence[Mapping[str, Any]], leaf: Callable[[Tensor], Leaf]) -> None:
    """Warn if weights or statistics are rounded by random bits that follow places, as there are no names.

    leaf: returns what is known of a parameter.
    """
    unnamed = [(param, group) for group in own if "param_names" not in group for param in group["params"]]
    for param, group in unnamed:
        plan = leaf(param).plan
        if is_fake(param) or not (plan.trainable and plan.rounds_by_name(group)):
            continue
        warnings.warn(
            "the parameters have no names, and some are rounded by random bits that follow from names: they follow "
            "from places now, so another order or number of parameters changes the rounding. Pass "
            "model.named_parameters(), or groups of such pairs",
            stacklevel=4,
        )
        return


def _names(saved: Mapping[str, Any]) -> list[str] | None:
    """Return the saved parameters' names in order; None if they have none."""
    groups = [group for group in saved["param_groups"] if len(group["params"])]
    if not groups or not all(len(group.get("param_names") or ()) == len(group["params"]) for group in groups):
        return None
    return [str(name) for group in groups for name in group["param_names"]]


def names_to_take_over(optimizer: torch.optim.Optimizer, plan: Plan, saved: Mapping[str, Any]) -> list[str]:
    """Names that come with the saved state for an optimizer that has none: the run then rounds as it did.

    None where names exist, come twice, or stand for a parameter that would be stepped by another chain.
    """
    names = _names(saved)
    if names is None or any("param_names" in group for group in optimizer.param_groups):
        return []
    names = naming.canonical_names(names)
    route = getattr(optimizer, "recipe", None)
    fits = all(
        route is None or route.pick(replace(param.spec, name=name))[0] == param.chain
        for param, name in zip(plan, names, strict=True)
    )
    return names if fits and len(set(names)) == len(names) else []


def warn_if_rounded_otherwise(
    saved: Mapping[str, Any], own: Sequence[Mapping[str, Any]], plan: Plan, taken_over: Sequence[str]
) -> None:
    """Warn if random rounding goes on with other bits than in the saved run, as the names are others.

    Warns, too, if state was matched by places, and names were taken over with the state.
    """
    if saved.get(KEY, {}).get(NAMES_COMPARED, False):
        return
    ours_too = saved.get(KEY, {}).get("weights", {})  # state of other libraries was not rounded so
    names = _names(saved) or [naming.by_place(i) for i in range(len(plan))]
    groups = [group for group in own for _ in group["params"]]
    for i, (name, param, group) in enumerate(zip(names, plan, groups, strict=True)):
        if i not in ours_too or not param.trainable or not param.rounds_by_name(group):
            continue
        if taken_over:
            warnings.warn(
                "this optimizer was built without names and the saved state has some: it was matched by the order of "
                "parameters, and the names were taken over, so that random rounding goes on as in the saved run. Pass "
                "model.named_parameters() to have names compared",
                stacklevel=4,
            )
            return
        if name != param.spec.name:
            warnings.warn(
                f"{param.spec.name!r} was rounded at random under the name {name!r} in the saved run, so rounding goes "
                "on with other random bits: give the optimizer the same names, or none if it had none, to go on alike",
                stacklevel=4,
            )
            return


# --- checking -----------------------------------------------------------------------------------------------------


def check_state_dict(optimizer: torch.optim.Optimizer, plan: Plan, saved: Mapping[str, Any]) -> list[Gap]:
    """Check saved state against this optimizer, and return what becomes of each parameter's state, in order.

    Raises:
        ValueError: at the first difference between what was saved and what this optimizer keeps.
    """
    for key in ("state", "param_groups"):
        if key not in saved:
            raise ValueError(f"this is not an optimizer's state_dict: it has no {key!r}")
    version = saved.get(KEY, {}).get("version", VERSION)
    if version != VERSION:
        raise ValueError(
            f"the state_dict has format version {version}, this optstate reads {VERSION}: upgrade optstate"
        )
    _check_groups(optimizer, plan, saved["param_groups"])
    if KEY not in saved:
        _check_rule(optimizer, plan, saved["param_groups"])
    stores = saved.get(KEY, {}).get("stores", {})
    complete = saved.get(KEY, {COMPLETE: False}).get(COMPLETE, True)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in saved["param_groups"] for i in group["params"]]
    found = []
    for param, planned, index in zip(params, plan, indices, strict=True):
        _check_stores(planned, stores.get(index))
        kept = bool(saved["state"].get(index))
        here, trains = param in optimizer.state, param.requires_grad
        found.append(rule(planned.spec.name, saved=kept, here=here, trains=trains, complete=complete))
        if kept:
            _check_state(planned, saved["state"][index])
    if not saved["state"] and any(planned.fields for planned, gap in zip(plan, found, strict=True) if gap is Gap.ANEW):
        raise ValueError("the saved state has no statistics at all: no step was made before it was saved")
    stray = set(saved["state"]) - set(indices)
    if stray:
        raise ValueError(
            f"the saved state has entries that belong to no parameter, such as {sorted(stray, key=str)[0]!r}"
        )
    return found


def _check_groups(optimizer: torch.optim.Optimizer, plan: Plan, saved: list[dict[str, Any]]) -> None:
    own, first = optimizer.param_groups, 0
    for i, (ours, theirs) in enumerate(zip(own, paired(own, saved), strict=True)):
        if theirs is None:
            continue
        if len(ours["params"]) != len(theirs["params"]):
            counts = f"{len(theirs['params'])} parameters, here it has {len(ours['params'])}"
            raise ValueError(f"param group {i} was saved with {counts}")
        if not ours["params"]:
            continue
        chain = plan.params[first].chain
        missing = {"lr", *chain.hyper} - set(theirs)
        if missing:
            raise ValueError(f"param group {i} was saved without {sorted(missing)[0]!r}: it comes from another recipe")
        check_values(theirs, chain)
        first += len(ours["params"])
    _check_names(own, paired(own, saved))


def _check_names(own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any] | None]) -> None:
    """Names must be the same where both sides have them, whatever wrappers put into them."""
    pairs = [
        (i, here, str(there))
        for i, (ours, theirs) in enumerate(zip(own, saved, strict=True))
        if theirs is not None and theirs.get("param_names") and "param_names" in ours
        for here, there in zip(ours["param_names"], theirs["param_names"], strict=True)
    ]
    same = naming.same_names([here for _, here, _ in pairs], [there for _, _, there in pairs])
    for (i, here, there), alike in zip(pairs, same, strict=True):
        if not alike:
            raise ValueError(f"param group {i} has {here!r} where {there!r} was saved: the order or model differs")


def _check_rule(optimizer: torch.optim.Optimizer, plan: Plan, saved: Sequence[Mapping[str, Any]]) -> None:
    """State without our header is another library's: its groups must follow our chains. Empty groups follow none."""
    theirs = [group or {"params": []} for group in paired(optimizer.param_groups, saved)]
    chains, first = [], 0
    for group in optimizer.param_groups:
        chains.append(plan.params[first].chain if group["params"] else Chain())
        first += len(group["params"])
    check_foreign_rule(theirs, optimizer.param_groups, chains)


def _check_stores(param: ParamPlan, saved: Mapping[str, str] | None) -> None:
    own = param.stores
    if saved is not None and dict(saved) != own:
        raise ValueError(
            f"{param.spec.name!r} was saved as {_listed(saved)}, here it is {_listed(own)}: keep it as it was, or "
            "write it with optstate.save and convert it with optstate.load(..., allow_lossy=True)"
        )


def _check_state(param: ParamPlan, saved: Mapping[str, Any]) -> None:
    name = param.spec.name
    own = param.fields
    if set(saved) != {"step", *own}:
        raise ValueError(f"{name!r} was saved with {_listed(saved)}, here it keeps {_listed(['step', *own])}")
    step = saved["step"]
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if not _is_count(step):
        raise ValueError(f"{name!r} was saved at step {step!r}, which is not a count")
    for key, field in own.items():
        value = saved[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r}: {key} was saved as a {type(value).__name__}, not as a tensor")
        if tuple(value.shape) not in (field.shape, param.layouts[key].shape) or value.dtype != field.dtype:
            there, here = f"{value.dtype} {tuple(value.shape)}", f"{field.dtype} {field.shape}"
            raise ValueError(f"{name!r}: {key} was saved as {there}, here it is {here}")


def _is_count(value: Any) -> bool:
    """Whether it is a whole number, of any library, that can be a count of steps."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and bool(0 <= value < MOST_STEPS) and value == int(value)


def _listed(items: Any) -> str:
    if isinstance(items, Mapping) and all(isinstance(v, str) for v in items.values()):
        return ", ".join(f"{k} in {v}" for k, v in items.items()) or "no statistics"
    return ", ".join(items)
