"""What an optimizer keeps, as the document of a file says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from optstate import naming
from optstate.checkpoint.document.document import (
    WEIGHT,
    Document,
    DocumentError,
    Group,
    Parameter,
    SlotRecord,
    TensorValue,
    find_version,
    tensor_key,
)
from optstate.optimizer import state_dict
from optstate.optimizer.optimizer import Optimizer
from optstate.optimizer.plan import ParamPlan, Plan
from optstate.updates import Around, transform_words

__all__ = ["add_tied_names", "describe_optimizer", "describe_slots", "list_names", "name_dtype", "restore_tensors"]


def describe_optimizer(optimizer: Optimizer, plan: Plan, saved: Mapping[str, Any]) -> Document:
    """Make the document of an optimizer with this plan and `state_dict`.

    Raises:
        DocumentError: if it holds what has no place in a document.
    """
    names = list_names(optimizer, plan)
    groups, parameters, first = [], [], 0
    for g, group in enumerate(saved["param_groups"]):
        members = range(first, first + len(group["params"]))
        first += len(members)
        hyper = {key: replace_tensors(value) for key, value in group.items() if key not in ("params", "param_names")}
        role, head_size = hyper.pop("role", ""), hyper.pop("head_size", None)
        inside = tuple(names[i] for i in members)
        groups.append(Group(hyper=hyper, parameters=inside, role=role, head_size=head_size))
        parameters += [_parameter(names[i], g, plan.params[i], saved["state"].get(i), group) for i in members]
    return Document(
        recipe=_recipe(optimizer),
        groups=tuple(groups),
        parameters=tuple(parameters),
        clip_grad_norm=saved[state_dict.KEY]["clip_grad_norm"],
        source={"tool": "optstate", "version": find_version()},
        codebooks=_codebooks(plan),
    )


def add_tied_names(document: Document, optimizer: Optimizer, model: nn.Module) -> Document:
    """Return the document with the other names that `model` has for the optimizer's parameters."""
    names: dict[int, list[str]] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    for name, (_, param) in zip(naming.canonical_names([name for name, _ in named]), named, strict=True):
        names.setdefault(id(param), []).append(name)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    parameters = []
    for described_param, param in zip(document.parameters, params, strict=True):
        others = tuple(name for name in names.get(id(param), []) if name != described_param.name)
        parameters.append(replace(described_param, tied=others))
    return replace(document, parameters=tuple(parameters))


def _codebooks(plan: Plan) -> dict[str, tuple[float, ...]]:
    """Return the values of all codes in use, so that the file can be read by those who do not have them."""
    books = (slot.store.codebook for param in plan for slot in param.slots.values())
    return {book.id: tuple(book.values.tolist()) for book in books if book is not None}


def _parameter(
    name: str, group: int, plan: ParamPlan, state: Mapping[str, Any] | None, hyper: Mapping[str, Any]
) -> Parameter:
    return Parameter(
        name=name,
        shape=plan.spec.shape,
        dtype=name_dtype(plan.spec.dtype),
        group=group,
        step=None if state is None else int(state["step"]),
        chain=str(plan.chain),
        weights=str(plan.weights),
        slots={} if state is None else describe_slots(name, plan, hyper),
    )


def describe_slots(name: str, plan: ParamPlan, hyper: Mapping[str, Any]) -> dict[str, SlotRecord]:
    """Describe what the plan keeps for a parameter of a group with these hyper-parameters."""
    declared, slots = plan.chain.slots(plan.spec, hyper), {}
    around = {
        key: transform_words(transform)
        for transform in plan.chain.transforms
        if isinstance(transform, Around)
        for key in transform.slots(plan.spec, hyper)
    }
    for key, slot in plan.slots.items():
        book = slot.store.codebook
        slots[key] = SlotRecord(
            store=str(slot.store),
            signed=declared[key].signed,
            fields={field: tensor_key(name, key, field) for field in slot.fields},
            codebook="" if book is None else book.id,
            block=slot.store.scale_block,
            of=declared[key].of,
            beta=declared[key].beta,
            shape=None if slot.of is None else slot.of.shape,
            within=around.get(key, ""),
        )
    if plan.weight_keys:
        fields = {field: tensor_key(name, WEIGHT, field) for field in plan.weight_keys}
        slots[WEIGHT] = SlotRecord(store=str(plan.weights), signed=True, fields=fields)
    return slots


def list_names(optimizer: Optimizer, plan: Plan) -> list[str]:
    """Return the parameters' names in order; `#<index>` where they have none."""
    named = "param_names" in optimizer.param_groups[0]
    names = [param.spec.name if named else f"#{i}" for i, param in enumerate(plan)]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DocumentError(f"two parameters are named {name!r}: give each its own name")
        seen.add(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DocumentError(f"the name {name!r} is not valid text") from None
    return names


def _recipe(optimizer: Optimizer) -> str:
    """Return the class's name in lower case, as recipes are listed; nothing for a chain without a class of its own."""
    return "" if type(optimizer) is Optimizer else type(optimizer).__name__.lower()


def replace_tensors(value: Any) -> Any:
    """Hyper-parameters without tensors of torch's."""
    if isinstance(value, Tensor):
        return TensorValue(name_dtype(value.dtype), tuple(value.shape), tuple(value.detach().reshape(-1).tolist()))
    if isinstance(value, tuple | list):
        return type(value)(replace_tensors(item) for item in value)
    return {key: replace_tensors(item) for key, item in value.items()} if isinstance(value, dict) else value


def name_dtype(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def restore_tensors(value: Any, own: Any) -> Any:
    """Hyper-parameters with tensors where there were some, on the device of this optimizer's own."""
    if isinstance(value, TensorValue):
        dtype = getattr(torch, value.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"a hyper-parameter is a tensor of {value.dtype!r}, which this torch does not have")
        device = own.device if isinstance(own, Tensor) else None
        return torch.tensor(value.values, dtype=dtype, device=device).reshape(value.shape)
    if isinstance(value, tuple | list):
        owns = own if isinstance(own, tuple | list) and len(own) == len(value) else [None] * len(value)
        return type(value)(restore_tensors(item, o) for item, o in zip(value, owns, strict=True))
    if isinstance(value, dict):
        return {
            key: restore_tensors(item, own.get(key) if isinstance(own, dict) else None) for key, item in value.items()
        }
    return value
