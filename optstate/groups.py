"""Checking what users hand to an optimizer: parameters, groups, gradients."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from optstate.placement import Placement, placement_of
from optstate.spec import ROLES, ParamSpec, accumulator_dtype, is_fake
from optstate.updates import Chain, Route

__all__ = ["check_values", "checked_gradient", "checked_group", "checked_params", "spec_of", "split_by_chain"]

DECLARATIONS = {"params", "param_names", "role", "head_size"}
SCHEDULER_KEYS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "name"}


def checked_params(params: Any) -> list[Any]:
    """The parameters, named parameters or groups as a list.

    Raises:
        TypeError: for a single tensor, a module, or a dict; ValueError: for nothing at all.
    """
    if isinstance(params, Tensor | torch.nn.Module | Mapping):
        kind = type(params).__name__
        raise TypeError(f"params is a {kind}: pass model.parameters(), model.named_parameters() or a list of groups")
    items = list(params)
    if not items:
        raise ValueError("the optimizer got no parameters (an exhausted generator?): pass model.named_parameters()")
    return items


def checked_group(param_group: Any, taken: set[Tensor]) -> dict[str, Any]:
    """A param group whose parameters can be added, in a list.

    Raises:
        TypeError, ValueError: for parameters that are not dense floating-point leaf tensors, or given twice.
    """
    if not isinstance(param_group, dict) or "params" not in param_group:
        raise TypeError(f"a param group must be a dict with the key 'params', not {type(param_group).__name__}")
    given = param_group["params"]
    params = [given] if isinstance(given, Tensor) else list(given)
    if not params:
        raise ValueError("a param group has no parameters: leave it out, or fix the filter that made it")
    if not isinstance(param_group.get("role", ""), str):
        raise TypeError(f"role={param_group['role']!r} must be a string, such as 'embedding'")
    role = param_group.get("role", "")
    near = difflib.get_close_matches(role.lower(), ROLES, n=1, cutoff=0.8)
    if near and role not in ROLES:
        raise ValueError(f"role={role!r} in a param group is nearly {near[0]!r}: spell it so, or choose another name")
    head_size = param_group.get("head_size")
    if head_size is not None and (isinstance(head_size, bool) or not isinstance(head_size, int) or head_size < 1):
        raise ValueError(f"head_size={head_size!r} must be a whole number of rows, at least 1")
    seen: dict[Tensor, str] = {}
    for i, item in enumerate(params):
        name, param = item if isinstance(item, tuple) else (f"number {i}", item)
        if name in seen.values():
            raise ValueError(f"two parameters are named {name!r}: give each its own name")
        _check_parameter(name, param)
        if param in seen:
            raise ValueError(f"parameter {name!r} is the same tensor as {seen[param]!r}: pass each parameter once")
        if param in taken:
            raise ValueError(f"parameter {name!r} is in another group already: pass each parameter once")
        seen[param] = name
    return {**param_group, "params": params}


def split_by_chain(group: dict[str, Any], route: Route, lr: Any) -> list[dict[str, Any]]:
    """One complete group per chain that the route picks for the parameters, in the order of the route's rules.

    A hyper-parameter given in the group goes to the chains that have it. Without a route there is one chain and
    the group stays whole.

    Raises:
        TypeError, ValueError: for a hyper-parameter that no chosen chain has, or a value out of range.
    """
    picked: dict[Chain, list[Any]] = {chain: [] for chain in route.chains}
    for item in group["params"]:
        name, param = item if isinstance(item, tuple) else ("", item)
        if not name and any(isinstance(rule, str) for rule, _ in route.rules):
            raise ValueError("the route matches parameter names, but there are none: pass model.named_parameters()")
        picked[route.pick(spec_of(name, param, group))[0]].append(item)
    chosen = {chain: params for chain, params in picked.items() if params}
    known = {"lr"}.union(*(chain.hyper for chain in chosen))
    unknown = sorted(set(group) - known - DECLARATIONS - SCHEDULER_KEYS)
    if unknown:
        names = ", ".join(sorted(known))
        raise ValueError(f"unknown hyper-parameter {unknown[0]!r} in a param group: its chain has {names}")
    parts = []
    for chain, params in chosen.items():
        defaults = {"lr": lr, **chain.hyper}
        others = known - set(defaults)
        part = {**defaults, **{k: v for k, v in group.items() if k not in others}, "params": params}
        check_values(part, chain)
        parts.append(part)
    return parts


def check_values(group: Mapping[str, Any], chain: Chain) -> None:
    """Raise TypeError or ValueError if a group's learning rate or a hyper-parameter of its chain is out of range."""
    _check_lr(group["lr"])
    for hyper in chain.hypers:
        hyper.check(group)
    chain.check_slots(group)


def spec_of(name: str, param: Tensor, group: Mapping[str, Any]) -> ParamSpec:
    """What every decision about a parameter is based on.

    Raises:
        ValueError: if it is distributed in a way that cannot be stepped.
    """
    try:
        placement = placement_of(param)
    except ValueError as error:
        raise ValueError(f"parameter {name!r} cannot be stepped as it is distributed: {error}") from None
    return ParamSpec(
        name=name,
        shape=tuple(param.shape),
        dtype=param.dtype,
        role=group.get("role", ""),
        head_size=group.get("head_size"),
        region=None if placement is None else placement.region,
    )


def checked_gradient(param: Tensor, spec: ParamSpec, placement: Placement | None = None) -> Tensor:
    """What of the gradient is here, if it can be stepped and the parameter is still what was planned."""
    name, grad = spec.name, param.grad
    if param.dtype != spec.dtype or param.shape != spec.shape:
        raise RuntimeError(
            f"{name!r} was {spec.dtype} {spec.shape} when the optimizer was built and is {param.dtype} "
            f"{tuple(param.shape)} now: cast and reshape the model first, then build the optimizer"
        )
    if grad is None:
        raise RuntimeError(f"{name!r} has no gradient: call backward() first")
    if grad.layout != torch.strided:
        raise TypeError(
            f"the gradient of {name!r} is {str(grad.layout).removeprefix('torch.')}: use a dense one "
            "(nn.Embedding(..., sparse=False))"
        )
    if grad.is_complex():
        raise TypeError(f"the gradient of {name!r} is complex ({grad.dtype}): step torch.view_as_real(param) instead")
    if placement is not None:
        grad = placement.gradient(grad)
    # Arithmetic follows the parameter: an fp64 gradient of an fp32 parameter is read in fp32, and the other way.
    return grad if accumulator_dtype(grad.dtype) == spec.accumulator else grad.to(spec.accumulator)


def _check_lr(lr: Any) -> None:
    if isinstance(lr, Tensor):
        if lr.ndim:
            raise TypeError(f"lr has shape {tuple(lr.shape)}: a tensor must hold one number and have no dimensions")
        if lr.device.type == "cpu" and not is_fake(lr):
            _check_lr(lr.item())
    elif isinstance(lr, bool) or not isinstance(lr, Real):
        raise TypeError(f"lr={lr!r} is a {type(lr).__name__}: it must be a number")
    elif not 0.0 <= float(lr) < float("inf"):
        raise ValueError(f"lr={lr!r} is out of range: it must be at least 0 and finite")


def _check_parameter(name: str, param: Any) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(f"parameter {name!r} is a {type(param).__name__}: the optimizer steps tensors")
    if param.is_complex():
        raise TypeError(f"parameter {name!r} is complex ({param.dtype}): pass torch.view_as_real(param) instead")
    if not param.is_floating_point():
        raise TypeError(f"parameter {name!r} is {param.dtype}: only floating-point tensors can be stepped")
    if param.layout != torch.strided:
        raise TypeError(f"parameter {name!r} is {param.layout}: only dense tensors can be stepped")
    if not param.is_leaf:
        raise ValueError(f"parameter {name!r} is not a leaf tensor: pass the nn.Parameter it was computed from")
