"""Load state that must be converted on the way: another store, another recipe, another tool's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import contradictions
from optstate.checkpoint.document.document import WEIGHT, Document, Group, Parameter, tensor_key
from optstate.checkpoint.document.rules import doubts, is_own, stray_keys
from optstate.checkpoint.formats import own_state_dict
from optstate.checkpoint.formats.shared.tree_writer import numbers
from optstate.checkpoint.operations.convert_values import Recoder
from optstate.checkpoint.operations.describe_optimizer import described, slot_records, with_tensors
from optstate.checkpoint.operations.plan_conversion import Conversion
from optstate.checkpoint.operations.plan_recipe import COUNTED_FROM, change_of_rule, follows, onto
from optstate.checkpoint.operations.read_values import Values
from optstate.checkpoint.operations.rule_words import hyper_of
from optstate.checkpoint.operations.run_conversion import eps_of
from optstate.distributed.placement import copy_part, here
from optstate.optimizer import state_dict
from optstate.optimizer.missing_state import Gap, rule
from optstate.optimizer.optimizer import Optimizer
from optstate.optimizer.plan import ParamPlan, Plan
from optstate.text import shown

__all__ = ["Prepared", "conversion_onto", "is_complete", "prepared_conversion"]


def conversion_onto(optimizer: Optimizer, checkpoint: Checkpoint, *, anew: bool = False) -> Conversion:
    """What a checkpoint becomes in this optimizer: its plan, and the file's hyper-parameters where they mean the same.

    anew: whether what is kept for writing weights may begin anew, where the file's were of another dtype or written in
    another way. It is without transfers then.

    Raises:
        ValueError: if parameters differ in number, names, shapes or groups, or a statistic cannot be made.
    """
    plan, saved = optimizer.plan(), optimizer.state_dict()
    sources = _matched(described(optimizer, plan, saved), checkpoint, anew)
    _check_sizes(checkpoint, sources)
    steps = _steps(optimizer, plan, checkpoint, sources)
    own = described(optimizer, plan, {**saved, "state": {i: {"step": step} for i, step in steps.items()}})
    groups, changes, notes = _groups(own, plan, checkpoint.document, sources)
    parameters = [
        # what averages began at zero with is said by the hyper-parameters that they go on with
        replace(param, slots=slot_records(param.name, planned, _plain(groups[param.group]))) if param.slots else param
        for param, planned in zip(own.parameters, plan, strict=True)
    ]
    if anew:
        parameters = list(map(_without_begun, parameters, sources))
    document = replace(own, parameters=tuple(parameters), groups=groups)
    conversion = onto(checkpoint, document, list(plan), sources, notes, changes)
    conversion.check()
    return conversion


def is_complete(checkpoint: Checkpoint) -> bool:
    """Whether there is state for all parameters that trained: this library keeps it from the beginning, others make it
    at the first update, and torch.distributed.checkpoint leaves out what is frozen when it is saved."""
    document = checkpoint.document
    first = document.history[0] if document.history else {}
    origin = first.get("from") if isinstance(first, dict) else None
    source = origin.get("source") if isinstance(origin, dict) else document.source
    kind = source.get("kind", "") if isinstance(source, dict) else ""
    own = isinstance(source, dict) and source.get("tool") == "optstate" and kind in ("", own_state_dict.KIND)
    return own and own_state_dict.BY_TENSORS not in checkpoint.notes


def _steps(optimizer: Optimizer, plan: Plan, checkpoint: Checkpoint, sources: Sequence[Parameter]) -> dict[int, int]:
    """How often each parameter was updated, by its place; without those of which no state is to be loaded.

    Raises:
        ValueError: if state is missing that cannot begin anew.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    complete, steps = is_complete(checkpoint), {}
    anew = False
    for i, (param, source) in enumerate(zip(params, sources, strict=True)):
        name, here = plan.params[i].spec.name, param in optimizer.state
        gap = rule(name, saved=source.has_state, here=here, trains=param.requires_grad, complete=complete)
        if gap is Gap.FILL:
            steps[i] = COUNTED_FROM if source.step is None else source.step
        anew = anew or (gap is Gap.ANEW and bool(plan.params[i].fields))
    if anew and not steps:
        raise ValueError("the file has no statistics at all")
    return steps


def _plain(group: Group) -> dict[str, Any]:
    return {key: numbers(value) for key, value in group.hyper.items()}


def _without_begun(own: Parameter, source: Parameter) -> Parameter:
    """The parameter without what is kept for writing it, if the file keeps nothing for that."""
    theirs, ours = source.slots.get(WEIGHT), own.slots.get(WEIGHT)
    if ours is None or (theirs is not None and theirs.store == ours.store):
        return own
    return replace(own, slots={slot: record for slot, record in own.slots.items() if slot != WEIGHT})


Prepared = tuple[Mapping[str, Any], Callable[[Tensor, Tensor], Any]]
"""A `state_dict` with stand-ins for its tensors, and what copies the values of a stand-in into a tensor."""


def prepared_conversion(optimizer: Optimizer, conversion: Conversion) -> Prepared:
    """The conversion's numbers as a state dict, to be made one parameter at a time while they are copied.

    Copying raises OSError or UnreadableStatisticError if the file cannot be read, or holds numbers that are not finite
    where they would have to be changed.
    """
    source = _Source(conversion)
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for i, (param, plan) in enumerate(zip(conversion.document.parameters, optimizer.plan(), strict=True)):
        if param.step is not None:
            keys = {key: tensor_key(param.name, key) for key in plan.fields}
            state[i] = {key: source.stand_in(keys[key], spec.shape, spec.dtype) for key, spec in plan.fields.items()}
            state[i]["step"] = param.step
    for group, own in zip(conversion.document.groups, optimizer.param_groups, strict=True):
        first = sum(len(before["params"]) for before in groups)
        hyper: dict[str, Any] = {key: with_tensors(value, own.get(key)) for key, value in group.hyper.items()}
        # What a parameter is, is this run's to say.
        hyper |= {key: own[key] for key in ("role", "head_size") if key in own}
        groups.append({**hyper, "params": list(range(first, first + len(group.parameters)))})
    header = {
        "version": state_dict.VERSION,
        "clip_grad_norm": conversion.document.clip_grad_norm,
        "weights": {i: param.weights for i, param in enumerate(conversion.document.parameters) if param.weights},
        state_dict.COMPLETE: is_complete(conversion.checkpoint),
        state_dict.NAMES_COMPARED: True,
    }
    return {"state": state, "param_groups": groups, state_dict.KEY: header}, source.copy


class _Source:
    """Gives the converted tensors of a parameter when the first of them is asked for, and keeps no others."""

    def __init__(self, conversion: Conversion) -> None:
        self.conversion = conversion
        self.recoder = Recoder(Values(conversion.checkpoint))
        self.places: dict[int, str] = {}
        self.stand_ins: list[Tensor] = []  # alive, so that none takes another's id
        self.ready: dict[str, Tensor] = {}
        self.owners = {
            key: transfers[0].parameter
            for transfers in conversion.transfers.values()
            for transfer in transfers
            for key in transfer.record.fields.values()
        }

    def stand_in(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without values for the one of this key."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self.places[id(tensor)] = key
        self.stand_ins.append(tensor)
        return tensor

    def copy(self, own: Tensor, stand_in: Tensor) -> None:
        """Fill `own` with the values of a stand-in."""
        key = self.places[id(stand_in)]
        if key not in self.owners:  # it begins anew
            here(own).zero_()
            return
        if key not in self.ready:
            param = self.owners[key]
            hyper = self.conversion.checkpoint.document.groups[param.group].hyper
            self.ready = {}
            self.recoder.carry(param, self.conversion.transfers[param.name], eps_of(hyper), self.ready.__setitem__)
        copy_part(own, self.ready.pop(key))


def _matched(own: Document, checkpoint: Checkpoint, anew: bool) -> list[Parameter]:
    """The file's parameters, if they are this optimizer's in the same order and groups."""
    theirs = checkpoint.document
    counts = [[len(group.parameters) for group in document.groups] for document in (own, theirs)]
    if counts[0] != counts[1]:
        raise ValueError(f"the file has param groups of {counts[1]} parameters, this optimizer of {counts[0]}")
    for mine, other in zip(own.parameters, theirs.parameters, strict=True):
        named = not (mine.name.startswith("#") or other.name.startswith("#"))
        if named and mine.name != other.name:
            raise ValueError(
                f"it has {other.name!r} where this optimizer has {mine.name!r}: the model or order differs"
            )
        if other.shape is not None and other.shape != mine.shape:
            raise ValueError(f"{mine.name!r} has shape {other.shape} in the file, here {mine.shape}")
        if other.weights and other.weights != mine.weights and not anew:
            raise ValueError(f"{mine.name!r} was written by {other.weights}, here it is by {mine.weights}")
    return [replace(other, shape=mine.shape) for mine, other in zip(own.parameters, theirs.parameters, strict=True)]


def _check_sizes(checkpoint: Checkpoint, sources: Sequence[Parameter]) -> None:
    """Raise ValueError if a parameter whose shape the file does not tell cannot have this optimizer's."""
    untold = [param.shape is None for param in checkpoint.document.parameters]
    taken = tuple(source for source, unknown in zip(sources, untold, strict=True) if unknown)
    document = replace(checkpoint.document, parameters=taken, codebooks={})
    for issue in contradictions(replace(checkpoint, document=document)):
        if not issue.where.startswith("codebook "):
            raise ValueError(f"{issue.where}: {issue.what}, the shape of this optimizer's parameter")


def _groups(
    own: Document, plan: Plan, theirs: Document, sources: Sequence[Parameter]
) -> tuple[tuple[Group, ...], tuple[str, ...], tuple[str, ...]]:
    """This optimizer's groups, with the file's hyper-parameters where a group goes through the same chain; what a step
    will do otherwise where it does not; and what the file does not say."""
    groups, first, strays = [], 0, stray_keys(theirs)
    changes: dict[str, None] = {}
    missing: dict[str, None] = {}
    for mine, other in zip(own.groups, theirs.groups, strict=True):
        if mine.parameters:
            needed = {"lr", *plan.params[first].chain.hyper}
            if _same_chain(sources[first], theirs, plan.params[first]):
                said = hyper_of(theirs, other)
                known = {*mine.hyper, *strays, "initial_lr"}
                mine = replace(mine, hyper={**mine.hyper, **{k: v for k, v in said.items() if k in known}})
                missing |= dict.fromkeys(sorted(needed - said.keys()))
            else:
                changes |= dict.fromkeys(change_of_rule(sources[first], theirs, str(plan.params[first].chain)))
        groups.append(mine)
        first += len(mine.parameters)
    notes = [*doubts(theirs), *_unclipped(own, theirs)]
    if strays and not changes:
        notes.append(f"hyper-parameters that are not known here are carried along: {', '.join(map(shown, strays))}")
    if missing:
        notes.append(f"the file does not say {', '.join(missing)}: what this optimizer has stays")
    return tuple(groups), tuple(changes), tuple(notes)


def _unclipped(own: Document, theirs: Document) -> list[str]:
    """What to say if the file's run clipped gradients by a norm, as lomo-optim's groups tell, too, and this one does
    not."""
    said = [theirs.clip_grad_norm, *(group.hyper.get("clip_grad_norm") for group in theirs.groups)]
    norms = dict.fromkeys(norm for norm in said if isinstance(norm, int | float) and norm != own.clip_grad_norm)
    return [
        f"the saved run clipped gradients with clip_grad_norm={norm}: call optstate.fuse_backward(optimizer, "
        f"clip_grad_norm={norm}) to go on alike"
        for norm in norms
        if norm
    ]


def _same_chain(source: Parameter, document: Document, plan: ParamPlan) -> bool:
    """Whether a parameter went through the chain that it goes through here.

    Our own `state_dict` does not say it: there the hyper-parameters of the chain must all be in the group.
    """
    if is_own(document) and not source.chain and not document.recipe:
        return plan.chain.hyper.keys() <= document.groups[source.group].hyper.keys()
    return follows(source, document, str(plan.chain))
