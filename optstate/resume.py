"""Strict loading of an optimizer's `state_dict`: check everything, then change something."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from optstate.gaps import Gap, rule
from optstate.groups import check_values
from optstate.plan import ParamPlan, Plan

__all__ = [
    "COMPLETE",
    "KEY",
    "check",
    "entries",
    "header",
    "loaded_groups",
    "warn_if_unclipped",
    "warn_if_written_otherwise",
]

KEY = "optstate"
VERSION = 1

COMPLETE = "complete"
"""Key of the header: whether there is state for all parameters that trained, as there is unless it says otherwise."""


def header(plan: Plan, clip_grad_norm: float | None) -> dict[str, Any]:
    """What `state_dict` says besides: a version, by parameter index the store of every slot and how the weight is
    written, the fused norm clip."""
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


def loaded_groups(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved hyper-parameters with this optimizer's parameters and names."""
    groups = []
    for ours, theirs in zip(own, saved, strict=True):
        kept = {key: ours[key] for key in ("params", "param_names") if key in ours}
        groups.append(deepcopy(theirs) | kept)
    return groups


def check(optimizer: torch.optim.Optimizer, plan: Plan, saved: Mapping[str, Any]) -> list[Gap]:
    """What becomes of the state of each parameter, in order.

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
    stores = saved.get(KEY, {}).get("stores", {})
    complete = saved.get(KEY, {COMPLETE: False}).get(COMPLETE, True)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in saved["param_groups"] for i in group["params"]]
    found = []
    for param, planned, index in zip(params, plan, indices, strict=True):
        _check_stores(planned, stores.get(index))
        kept = index in saved["state"]
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
    own = optimizer.param_groups
    if len(own) != len(saved):
        raise ValueError(f"the saved optimizer had {len(saved)} param groups, this one has {len(own)}")
    first = 0
    for i, (ours, theirs) in enumerate(zip(own, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            counts = f"{len(theirs['params'])} parameters, here it has {len(ours['params'])}"
            raise ValueError(f"param group {i} was saved with {counts}")
        if "param_names" in ours and "param_names" in theirs:
            for here, there in zip(ours["param_names"], theirs["param_names"], strict=True):
                if here != there:
                    raise ValueError(
                        f"param group {i} has {here!r} where {there!r} was saved: the order or model differs"
                    )
        chain = plan.params[first].chain
        missing = {"lr", *chain.hyper} - set(theirs)
        if missing:
            raise ValueError(f"param group {i} was saved without {sorted(missing)[0]!r}: it comes from another recipe")
        check_values(theirs, chain)
        first += len(ours["params"])


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
    if isinstance(step, bool) or not isinstance(step, int | float) or step != int(step) or step < 0:
        raise ValueError(f"{name!r} was saved at step {step!r}, which is not a count")
    for key, field in own.items():
        value = saved[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r}: {key} was saved as a {type(value).__name__}, not as a tensor")
        if tuple(value.shape) not in (field.shape, field.layout(param.spec)[0]) or value.dtype != field.dtype:
            there, here = f"{value.dtype} {tuple(value.shape)}", f"{field.dtype} {field.shape}"
            raise ValueError(f"{name!r}: {key} was saved as {there}, here it is {here}")


def _listed(items: Any) -> str:
    if isinstance(items, Mapping) and all(isinstance(v, str) for v in items.values()):
        return ", ".join(f"{k} in {v}" for k, v in items.items()) or "no statistics"
    return ", ".join(items)
