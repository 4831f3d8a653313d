"""Checking what users hand to an optimizer: parameters, groups, gradients."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from optstate.distributed.placement import Placement, placement_of
from optstate.naming import CanonicalNames
from optstate.optimizer.group_keys import refuse_unknown
from optstate.spec import ROLES, ParamSpec, Region, accumulator_dtype, can_be_stepped, is_fake
from optstate.updates import Chain, Route

__all__ = [
    "UsedValues",
    "check_values",
    "checked_gradient",
    "checked_group",
    "checked_params",
    "name_group",
    "names_in",
    "refuse_inference_mode",
    "shared_defaults",
    "spec_of",
    "split_by_chain",
]


def checked_params(params: Any) -> list[dict[str, Any]]:
    """Return parameters, named parameters or groups as groups whose `params` are lists.

    Raises:
        TypeError: for a single tensor, a module, or a dict; ValueError: for nothing at all.
    """
    if isinstance(params, Tensor | torch.nn.Module | Mapping):
        kind = type(params).__name__
        raise TypeError(f"params is a {kind}: pass model.parameters(), model.named_parameters() or a list of groups")
    items = list(params)
    if not items:
        raise ValueError("the optimizer got no parameters (an exhausted generator?): pass model.named_parameters()")
    if not isinstance(items[0], Mapping):
        return [{"params": items}]
    return [_listed(item) for item in items]


def _listed(group: Any) -> dict[str, Any]:
    if not isinstance(group, Mapping) or "params" not in group:
        what = (
            f"one with {', '.join(map(repr, group)) or 'nothing'}"
            if isinstance(group, Mapping)
            else type(group).__name__
        )
        raise TypeError(f"a param group must be a dict with the key 'params', not {what}")
    given = group["params"]
    if not isinstance(given, Iterable) or isinstance(given, str | Mapping):
        raise TypeError(f"the parameters of a group are a {type(given).__name__}: give tensors, or pairs with names")
    if isinstance(given, set | frozenset):
        raise TypeError("the parameters of a group are a set, which has another order in every run: give a list")
    return {**group, "params": [given] if isinstance(given, Tensor) else list(given)}


def names_in(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names that come with the parameters of listed groups."""
    names: list[str] = []
    for group in groups:
        names += [item[0] for item in group["params"] if isinstance(item, tuple) and isinstance(item[0], str)]
        names += [name for name in group.get("param_names") or () if isinstance(name, str)]
    return list(dict.fromkeys(names))


def refuse_inference_mode(action: str) -> None:
    """Raise RuntimeError under `torch.inference_mode()`, whose tensors no step may change afterwards."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{action} under torch.inference_mode() would make state that can never be updated: do so outside of it"
        )


def checked_group(param_group: Any, taken: Collection[Tensor]) -> dict[str, Any]:
    """Return a param group whose parameters can be added: `params` a list of tensors, `param_names` if there are any.

    Frozen parameters may be of any dtype: they are never stepped. A group may be empty.

    Raises:
        TypeError, ValueError: for parameters that are not dense floating-point leaf tensors, are given twice, or have
            names in part.
    """
    group = _listed(param_group)
    if not isinstance(group.get("role", ""), str):
        raise TypeError(f"role={group['role']!r} must be a string, such as 'embedding'")
    role = group.get("role", "")
    near = difflib.get_close_matches(role.lower(), ROLES, n=1, cutoff=0.8)
    if near and role not in ROLES:
        raise ValueError(f"role={role!r} in a param group is nearly {near[0]!r}: spell it so, or choose another name")
    head_size = group.get("head_size")
    if head_size is not None and (isinstance(head_size, bool) or not isinstance(head_size, int) or head_size < 1):
        raise ValueError(f"head_size={head_size!r} must be a whole number of rows, at least 1")
    names, params = _named(group)
    seen: dict[int, str] = {}
    for i, param in enumerate(params):
        name = names[i] if names else f"number {i}"
        _check_parameter(name, param)
        if id(param) in seen:
            raise ValueError(f"parameter {name!r} is the same tensor as {seen[id(param)]!r}: pass each parameter once")
        if taken and param in taken:
            raise ValueError(f"parameter {name!r} is in another group already: pass each parameter once")
        seen[id(param)] = name
    group.pop("param_names", None)
    return {**group, "params": params, **({"param_names": names} if names else {})}


def _named(group: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    """Return the names of a group's parameters (an empty list without names), and the parameters."""
    items, names = list(group["params"]), group.get("param_names")
    pairs = [item for item in items if isinstance(item, tuple)]
    if pairs:
        if len(pairs) < len(items) or any(len(pair) != 2 for pair in pairs):
            raise ValueError("some parameters of a group have no names: pass pairs of a name and a parameter, or none")
        names, items = [name for name, _ in pairs], [param for _, param in pairs]
    if not names:
        return [], items
    if not isinstance(names, list | tuple) or len(names) != len(items):
        raise ValueError(f"a param group has {len(items)} parameters and param_names={names!r}: give each one name")
    odd = next((name for name in names if not isinstance(name, str)), None)
    if odd is not None or None in names:
        raise TypeError(f"a parameter's name is {odd!r}, a {type(odd).__name__}: it must be a string")
    return list(names), items


def name_group(group: dict[str, Any], names: CanonicalNames, others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Put canonical names into a checked group whose parameters have names; gives the names as they were given.

    names: of the parameters that are there. others: the groups that are there.

    Raises:
        ValueError: if two parameters have one name, or only some of the optimizer's parameters have names.
    """
    given = group.get("param_names", [])
    other = next((other for other in others if other["params"]), None)
    if group["params"] and other is not None and bool(given) != ("param_names" in other):
        has, have = ("names", "none") if given else ("no names", "some")
        raise ValueError(
            f"the parameters of a group have {has}, and those of the other groups have {have}: pass pairs of a name "
            "and a parameter in every group, as model.named_parameters() gives them, or in none"
        )
    canonical = names.canonical(given)
    found: dict[str, str] = {}
    for name, short in zip(given, canonical, strict=True):
        if short in found or short in names:
            first = found.get(short) or names.given(short)
            made_of = "" if first == name else f", as {first!r} and {name!r} are without what wrappers put into them"
            raise ValueError(
                f"two parameters are named {short!r}{made_of}: a name decides how a weight is rounded and which state "
                "is its own. Give the parameters of each model a prefix: "
                "[('encoder.' + name, param) for name, param in encoder.named_parameters()]"
            )
        found[short] = name
    if given:
        group["param_names"] = canonical
    return list(given)


def split_by_chain(
    group: dict[str, Any], route: Route, given: Mapping[str, str], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One complete group per chain that the route picks for the parameters, in the order of the route's rules.

    A hyper-parameter given in the group goes to the chains that have it. Without a route there is one chain and
    the group stays whole. An empty group stays one, too.

    given: names as they were given, by canonical ones. defaults: the learning rate, and what an empty group has.

    Raises:
        TypeError, ValueError: for a hyper-parameter that no chosen chain has, or a value out of range.
    """
    names = group.get("param_names")
    if group["params"] and not names and any(isinstance(rule, str) for rule, _ in route.rules):
        raise ValueError("the route matches parameter names, but there are none: pass model.named_parameters()")
    picked: dict[Chain, list[int]] = {chain: [] for chain in route.chains}
    if not route.rules:
        picked[route.default] = list(range(len(group["params"])))
    else:
        for i, param in enumerate(group["params"]):
            name = names[i] if names else ""
            picked[route.pick(spec_of(name, param, group, given.get(name, "")))[0]].append(i)
    chosen = {chain: places for chain, places in picked.items() if places}
    everywhere = set[str]().union(*(chain.hyper for chain in route.chains))
    if not chosen:
        known = everywhere | {"lr"}
        refuse_unknown(group, known, ())
        part = {**defaults, **group}
        for chain in route.chains:
            check_values({**chain.hyper, **part}, chain)
        return [part]
    known = {"lr"}.union(*(chain.hyper for chain in chosen))
    refuse_unknown(group, known, everywhere)
    parts = []
    for chain, places in chosen.items():
        own = {"lr": defaults["lr"], **chain.hyper}
        others = known - set(own)
        part = {**own, **{k: v for k, v in group.items() if k not in others}}
        for key in ("params", "param_names") if names else ("params",):
            part[key] = [group[key][i] for i in places]
        check_values(part, chain)
        parts.append(part)
    return parts


def shared_defaults(chains: Sequence[Chain]) -> dict[str, Any]:
    """Return the hyper-parameters that all of these chains have, with the defaults of the first chain."""
    first, *others = chains
    return {key: value for key, value in first.hyper.items() if all(key in chain.hyper for chain in others)}


def check_values(group: Mapping[str, Any], chain: Chain) -> None:
    """Raise TypeError or ValueError if a group's learning rate or a hyper-parameter of its chain is out of range."""
    _check_lr(group["lr"])
    for hyper in chain.hypers:
        hyper.check(group)
    chain.check_slots(group)


class UsedValues:
    """Checks the values of param groups when they are used, where they are others than at the last time."""

    def __init__(self) -> None:
        self._checked: dict[int, tuple[tuple[str, ...], list[Any]]] = {}

    def require(self, groups: Sequence[Mapping[str, Any]], chains: Mapping[int, Chain]) -> None:
        """Raise TypeError or ValueError if a learning rate or a hyper-parameter cannot be used for a step.

        Numbers that are on an accelerator are not read.

        chains: of each group that has parameters, by its place.
        """
        for place, chain in chains.items():
            group = groups[place]
            lr = group.get("lr")
            if type(lr) is not float or not 0.0 <= lr < math.inf:
                with _in_group(place):
                    _check_lr(lr)
            keys, before = self._checked.get(place, ((), None))
            values = list(map(group.get, keys))
            try:
                is_known = before == values
            except (RuntimeError, ValueError, TypeError):  # tensors and arrays of several numbers
                is_known = False
            if not is_known:
                with _in_group(place):
                    check_values(group, chain)
                keys = tuple(chain.hyper)
                self._checked[place] = keys, [_kept(group[key]) for key in keys]


def _kept(value: Any) -> Any:
    """Return a value that stays as it is when the group's value changes in place."""
    return list(value) if isinstance(value, list) else value


@contextmanager
def _in_group(place: int) -> Iterator[None]:
    """Say that a value came to be what it is after the optimizer was built."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(
            f"param group {place} cannot be stepped: {error}. It was changed after the optimizer was built, by a "
            "scheduler, perhaps; nothing was updated"
        ) from None


def spec_of(name: str, param: Tensor, group: Mapping[str, Any], given: str = "") -> ParamSpec:
    """Make the specification of a parameter, on which every decision about the parameter is based.

    Args:
        name: canonical name.
        param: the parameter.
        group: the param group, with the role and the head size.
        given: the name before wrappers' words were left out.

    Raises:
        ValueError: if the parameter is distributed in a way that cannot be stepped.
    """
    try:
        placement = placement_of(param)
    except ValueError as error:
        raise ValueError(f"parameter {name!r} cannot be stepped as it is distributed: {error}") from None
    region = None if placement is None else placement.region
    spec = _nameless(tuple(param.shape), param.dtype, group.get("role", ""), group.get("head_size"), region)
    return spec.renamed(name, "" if given == name else given)


@lru_cache(maxsize=1024)
def _nameless(
    shape: tuple[int, ...], dtype: torch.dtype, role: str, head_size: int | None, region: Region | None
) -> ParamSpec:
    """Return what the specifications of all parameters of one kind have in common."""
    return ParamSpec(name="", shape=shape, dtype=dtype, role=role, head_size=head_size, region=region)


def checked_gradient(param: Tensor, spec: ParamSpec, placement: Placement | None = None) -> Tensor:
    """Return the gradient's part on this device, after checking that the parameter is still as planned.

    Raises:
        RuntimeError, TypeError: if the parameter or its gradient cannot be stepped.
    """
    name, grad = spec.name, param.grad
    if param.dtype != spec.dtype or param.shape != spec.shape:
        raise RuntimeError(
            f"{name!r} was {spec.dtype} {spec.shape} when the optimizer was built and is {param.dtype} "
            f"{tuple(param.shape)} now: cast and reshape the model first, then build the optimizer"
        )
    if not can_be_stepped(spec.dtype):
        raise TypeError(f"{name!r} is {param.dtype}, which cannot be stepped: freeze it, or cast it to bfloat16")
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
    else:
        try:
            number = float(lr)
        except OverflowError:
            raise ValueError("lr is too large for a number: it must be at least 0 and finite") from None
        if not 0.0 <= number < math.inf:
            raise ValueError(f"lr={lr!r} is out of range: it must be at least 0 and finite")


def _check_parameter(name: str, param: Any) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(f"parameter {name!r} is a {type(param).__name__}: the optimizer steps tensors")
    if is_lazy(param):
        raise ValueError(
            f"parameter {name!r} has no shape yet, as its layer is lazy: run a batch through the model, then build the "
            "optimizer"
        )
    if not param.requires_grad:
        return  # frozen: kept in its place and never stepped, whatever it is, as torch does
    if param.is_complex():
        raise TypeError(f"parameter {name!r} is complex ({param.dtype}): pass torch.view_as_real(param) instead")
    if not can_be_stepped(param.dtype):
        raise TypeError(
            f"parameter {name!r} is {param.dtype}, whose steps are too coarse to train: keep the weights in bfloat16 "
            "or float32 and let the layers cast them, or freeze it"
        )
    if param.layout != torch.strided:
        raise TypeError(f"parameter {name!r} is {param.layout}: only dense tensors can be stepped")
    if not param.is_leaf:
        raise ValueError(f"parameter {name!r} is not a leaf tensor: pass the nn.Parameter it was computed from")
    if param.is_inference():
        raise ValueError(f"parameter {name!r} was made under torch.inference_mode(): build the model outside of it")
