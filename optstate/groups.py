"""Checking what users hand to an optimizer: parameters, groups, gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from optstate.spec import ParamSpec
from optstate.updates import Hyper

__all__ = ["checked_gradient", "checked_group", "checked_params"]

DECLARATIONS = {"params", "param_names", "role", "head_size"}
SCHEDULER_KEYS = {"initial_lr", "max_lr", "min_lr", "name"}


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


def checked_group(
    param_group: Any, defaults: Mapping[str, Any], hypers: Iterable[Hyper], taken: set[Tensor]
) -> dict[str, Any]:
    """A param group that can be added as it is, its parameters in a list."""
    if not isinstance(param_group, dict) or "params" not in param_group:
        raise TypeError(f"a param group must be a dict with the key 'params', not {type(param_group).__name__}")
    given = param_group["params"]
    params = [given] if isinstance(given, Tensor) else list(given)
    group: dict[str, Any] = {**param_group, "params": params}
    if not params:
        raise ValueError("a param group has no parameters: leave it out, or fix the filter that made it")
    unknown = set(group) - set(defaults) - DECLARATIONS - SCHEDULER_KEYS
    if unknown:
        known = ", ".join(sorted(set(defaults)))
        raise ValueError(f"unknown hyper-parameter {sorted(unknown)[0]!r} in a param group: this recipe has {known}")
    values = {**defaults, **group}
    _check_lr(values["lr"])
    for hyper in hypers:
        hyper.check(values)
    seen: dict[Tensor, str] = {}
    for i, item in enumerate(params):
        name, param = item if isinstance(item, tuple) else (f"number {i}", item)
        _check_parameter(name, param)
        if param in seen:
            raise ValueError(f"parameter {name!r} is the same tensor as {seen[param]!r}: pass each parameter once")
        if param in taken:
            raise ValueError(f"parameter {name!r} is in another group already: pass each parameter once")
        seen[param] = name
    return group


def checked_gradient(param: Tensor, spec: ParamSpec) -> Tensor:
    """The parameter's gradient, if it is one that can be stepped and the parameter is still what was planned."""
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
    return grad


def _check_lr(lr: Any) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise TypeError(f"lr has shape {tuple(lr.shape)}: a tensor must hold exactly one number")
    elif isinstance(lr, bool) or not isinstance(lr, int | float):
        raise TypeError(f"lr={lr!r} is a {type(lr).__name__}: it must be a number")
    elif not 0.0 <= lr < float("inf"):
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
