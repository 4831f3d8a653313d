"""Save an optimizer to a safetensors file and go on from it exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from optstate import resume
from optstate.checkpoint.container import Entry, read_header
from optstate.checkpoint.document import (
    KEY,
    WEIGHT,
    Document,
    DocumentError,
    Group,
    Parameter,
    SlotRecord,
    TensorValue,
    document_of,
    tensor_key,
    to_json,
)
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.tensors import DTYPES, bytes_of, read_into
from optstate.checkpoint.writer import NewEntry, layout, write
from optstate.optimizer import Optimizer
from optstate.plan import ParamPlan, Plan

__all__ = ["load", "save"]

Path = str | os.PathLike[str]


def save(optimizer: Optimizer, path: Path, *, overwrite: bool = True) -> None:
    """Write everything that `optimizer` needs to go on into one safetensors file.

    Tensors are named `<parameter>/<slot>` or `<parameter>/<slot>.<field>` and keep the dtypes they have; groups, steps
    and stores are a JSON document under the metadata key `optstate`. Equal optimizers give equal bytes. The file is
    replaced at once or not at all. Memory: none for tensors on the CPU, else one tensor.

    Give the optimizer `model.named_parameters()`: parameters without names are saved by their place, as `#0`, `#1` ...

    Raises:
        InconsistentStateError: if a step broke off half-way.
        CheckpointError: if the file cannot be written, exists although `overwrite` is false, or the optimizer holds
            what has no place in it.
    """
    saved, plan = optimizer.state_dict(), optimizer.plan()
    try:
        resume.check(optimizer, plan, saved)  # what could not be loaded again is not written either
        document = _described(optimizer, plan, saved)
        text = to_json(document)
    except ValueError as error:
        raise CheckpointError(path, f"not saved: {error}", refused=True) from None
    tensors = {
        tensor_key(_names(optimizer, plan)[i], key): value
        for i, state in saved["state"].items()
        for key, value in state.items()
        if key != "step"
    }
    entries = [NewEntry(name, DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    in_order = (tensors[entry.name] for entry in layout(entries))
    write(path, {KEY: text}, entries, (bytes_of(tensor) for tensor in in_order), overwrite=overwrite)


def load(optimizer: Optimizer, path: Path) -> None:
    """Continue exactly where the run that saved `path` stopped: state, steps and hyper-parameters.

    Strict: the file must hold what `optimizer.plan()` keeps, parameter by parameter and in the same stores, nothing
    less and nothing more. Nothing is cast. All of this is checked before anything is changed. Memory: none for state
    on the CPU, else one tensor.

    Model weights are not in the file: load them before or afterwards. A learning rate scheduler has its own state.

    Raises:
        CheckpointError: if the file is unreadable or another optimizer's, naming the first difference. If reading
            fails half-way, the optimizer refuses to step until a load succeeds.
    """
    header = read_header(path)
    document = document_of(header)
    plan = optimizer.plan()
    entries = {entry.name: entry for entry in header.tensors}
    try:
        sources = _matched(optimizer, plan, document, entries)
        view = _as_state_dict(optimizer, plan, document, sources)
        places = {id(tensor): entries[key] for key, tensor in sources.items()}
        with open(path, "rb", buffering=0) as file:
            optimizer.load_with(view, lambda own, theirs: read_into(own, file, places[id(theirs)]))
    except (ValueError, TypeError) as error:  # a hyper-parameter of the wrong kind is a TypeError
        hint = "nothing was changed; build the optimizer as the saved run did"
        raise CheckpointError(path, str(error), hint, refused=True) from None
    except OSError as error:
        reason = f"reading failed half-way: {error}"
        raise CheckpointError(path, reason, "the state is incomplete: load again before the next step") from error


# --- what is saved ------------------------------------------------------------------------------------------------


def _described(optimizer: Optimizer, plan: Plan, saved: Mapping[str, Any]) -> Document:
    names = _names(optimizer, plan)
    groups, parameters, first = [], [], 0
    for g, group in enumerate(saved["param_groups"]):
        members = range(first, first + len(group["params"]))
        first += len(members)
        hyper = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        role, head_size = hyper.pop("role", ""), hyper.pop("head_size", None)
        inside = tuple(names[i] for i in members)
        groups.append(Group(hyper=hyper, parameters=inside, role=role, head_size=head_size))
        parameters += [_parameter(names[i], g, plan.params[i], saved["state"].get(i), group) for i in members]
    return Document(
        recipe=_recipe(optimizer),
        groups=tuple(groups),
        parameters=tuple(parameters),
        clip_grad_norm=saved[resume.KEY]["clip_grad_norm"],
        source={"tool": "optstate", "version": _version()},
        codebooks=_codebooks(plan),
    )


def _codebooks(plan: Plan) -> dict[str, tuple[float, ...]]:
    """The values of all codes in use, so that the file can be read by those who do not have them."""
    books = (slot.store.codebook for param in plan for slot in param.slots.values())
    return {book.id: tuple(book.values.tolist()) for book in books if book is not None}


def _parameter(
    name: str, group: int, plan: ParamPlan, state: Mapping[str, Any] | None, hyper: Mapping[str, Any]
) -> Parameter:
    return Parameter(
        name=name,
        shape=plan.spec.shape,
        dtype=_short(plan.spec.dtype),
        group=group,
        step=None if state is None else int(state["step"]),
        chain=str(plan.chain),
        weights=str(plan.weights),
        slots={} if state is None else _slots(name, plan, hyper),
    )


def _slots(name: str, plan: ParamPlan, hyper: Mapping[str, Any]) -> dict[str, SlotRecord]:
    """What the plan keeps for a parameter of a group with these hyper-parameters, as the document says it."""
    declared, slots = plan.chain.declared_slots(hyper), {}
    for key, slot in plan.slots.items():
        book = slot.store.codebook
        slots[key] = SlotRecord(
            store=str(slot.store),
            signed=declared[key].signed,
            fields={field: tensor_key(name, key, field) for field in slot.fields},
            codebook="" if book is None else book.id,
            block=slot.fields["absmax"].per if "absmax" in slot.fields else 0,
            of=declared[key].of,
            beta=declared[key].beta,
        )
    if plan.weight_keys:
        fields = {field: tensor_key(name, WEIGHT, field) for field in plan.weight_keys}
        slots[WEIGHT] = SlotRecord(store=str(plan.weights), signed=True, fields=fields)
    return slots


def _names(optimizer: Optimizer, plan: Plan) -> list[str]:
    """The parameters' names in order; `#<index>` where they have none."""
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
    """The class's name in lower case, as recipes are listed; nothing for a chain without a class of its own."""
    return "" if type(optimizer) is Optimizer else type(optimizer).__name__.lower()


def _plain(value: Any) -> Any:
    """Hyper-parameters without tensors of torch's."""
    if isinstance(value, Tensor):
        return TensorValue(_short(value.dtype), tuple(value.shape), tuple(value.detach().reshape(-1).tolist()))
    if isinstance(value, tuple | list):
        return type(value)(_plain(item) for item in value)
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version() -> str:
    try:
        return version("optstate")
    except PackageNotFoundError:  # run from a source folder
        return "unknown"


# --- what is loaded -----------------------------------------------------------------------------------------------


def _matched(optimizer: Optimizer, plan: Plan, document: Document, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """A stand-in without values for every tensor of the file, if all of them are what this optimizer keeps.

    Raises:
        ValueError: at the first difference.
    """
    names = _names(optimizer, plan)
    if len(names) != len(document.parameters):
        raise ValueError(f"it was saved for {len(document.parameters)} parameters, this optimizer has {len(names)}")
    found: dict[str, Tensor] = {}
    for name, own, saved in zip(names, plan, document.parameters, strict=True):
        if saved.name != name:
            raise ValueError(f"it has {saved.name!r} where this optimizer has {name!r}: the model or its order differs")
        _match_parameter(own, saved)
        if saved.step is None:
            continue
        for key, spec in own.fields.items():
            entry = entries.get(tensor_key(name, key))
            if entry is None:
                raise ValueError(f"the tensor '{tensor_key(name, key)}' is missing")
            if (entry.dtype, entry.shape) != (DTYPES[spec.dtype], spec.shape):
                there, here = f"{entry.dtype} {entry.shape}", f"{DTYPES[spec.dtype]} {spec.shape}"
                raise ValueError(f"the tensor '{entry.name}' is {there}, here it is {here}")
            found[entry.name] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    stray = next((name for name in entries if name not in found), None)
    if stray is not None:
        raise ValueError(f"the tensor '{stray}' belongs to no statistic of this optimizer")
    return found


def _match_parameter(own: ParamPlan, saved: Parameter) -> None:
    """Raise ValueError if what was saved of a parameter is not what is kept of it here."""
    name = saved.name
    there, here = f"{saved.dtype} {saved.shape}", f"{_short(own.spec.dtype)} {own.spec.shape}"
    if there != here:
        raise ValueError(f"{name!r} was {there} when it was saved, here it is {here}")
    if saved.chain != str(own.chain):
        raise ValueError(f"{name!r} went through the chain {saved.chain}, here it is {own.chain}: another recipe")
    if saved.weights != str(own.weights):
        raise ValueError(f"{name!r} was written by {saved.weights}, here it is by {own.weights}")
    if saved.step is None:
        return
    kept = _slots(name, own, {})
    if saved.slots.keys() != kept.keys():
        raise ValueError(f"{name!r} was saved with {_listed(saved.slots)}, here it keeps {_listed(kept)}")
    for slot, ours in kept.items():
        theirs = saved.slots[slot]
        if theirs.store != ours.store:
            what = "convert the file, or keep the statistic as it was" if slot != WEIGHT else "write it as before"
            raise ValueError(f"{name!r}: {slot} was saved in {theirs.store}, here it is kept in {ours.store}; {what}")
        if theirs.codebook != ours.codebook:
            raise ValueError(f"{name!r}: {slot} has codes of {theirs.codebook or 'no map'}, here of {ours.codebook}")
        if replace(theirs, of=ours.of, beta=ours.beta) != ours:  # these two say only what the chain says, too
            raise ValueError(f"{name!r}: {slot} was saved as {theirs}, here it is {ours}")


def _listed(slots: Mapping[str, SlotRecord]) -> str:
    return ", ".join(slots) or "no statistics"


def _as_state_dict(
    optimizer: Optimizer, plan: Plan, document: Document, sources: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The file as the `state_dict` it was made from, with stand-ins for its tensors."""
    state: dict[int, dict[str, Any]] = {}
    stores: dict[int, dict[str, str]] = {}
    groups: list[dict[str, Any]] = []
    first = 0
    for i, (own, saved) in enumerate(zip(plan, document.parameters, strict=True)):
        stores[i] = own.stores
        if saved.step is not None:
            tensors = {key: sources[tensor_key(saved.name, key)] for key in own.fields}
            state[i] = {"step": saved.step, **tensors}
    for g, group in enumerate(document.groups):
        if g >= len(optimizer.param_groups):
            break  # `resume.check` counts them
        ours = optimizer.param_groups[g]
        # What a parameter is, is this run's to say; stores that follow from it were compared.
        declared = {key: value for key, value in ours.items() if key in ("role", "head_size")}
        hyper: dict[str, Any] = {key: _with_tensors(value, ours.get(key)) for key, value in group.hyper.items()}
        members = list(range(first, first + len(group.parameters)))
        groups.append({**hyper, **declared, "params": members})
        first += len(members)
    header = {"version": resume.VERSION, "stores": stores, "clip_grad_norm": document.clip_grad_norm}
    return {"state": state, "param_groups": groups, resume.KEY: header}


def _with_tensors(value: Any, own: Any) -> Any:
    """Hyper-parameters with tensors where there were some, on the device of this optimizer's own."""
    if isinstance(value, TensorValue):
        dtype = getattr(torch, value.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"a hyper-parameter is a tensor of {value.dtype!r}, which this torch does not have")
        device = own.device if isinstance(own, Tensor) else None
        return torch.tensor(value.values, dtype=dtype, device=device).reshape(value.shape)
    if isinstance(value, tuple | list):
        owns = own if isinstance(own, tuple | list) and len(own) == len(value) else [None] * len(value)
        return type(value)(_with_tensors(item, o) for item, o in zip(value, owns, strict=True))
    if isinstance(value, dict):
        return {
            key: _with_tensors(item, own.get(key) if isinstance(own, dict) else None) for key, item in value.items()
        }
    return value
