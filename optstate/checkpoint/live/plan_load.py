"""Plan how a checkpoint is loaded: whether it is what an optimizer keeps, and if not, what it becomes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import contradictions
from optstate.checkpoint.document.document import WEIGHT, Document, Group, Parameter, SlotRecord, tensor_key
from optstate.checkpoint.document.rules import doubts, is_own, stray_keys
from optstate.checkpoint.files.tensor_bytes import DTYPES
from optstate.checkpoint.formats import own_state_dict
from optstate.checkpoint.formats.shared.tree_writer import numbers
from optstate.checkpoint.operations.describe_optimizer import describe_optimizer, describe_slots, list_names, name_dtype
from optstate.checkpoint.operations.plan_conversion import Conversion
from optstate.checkpoint.operations.plan_recipe import (
    COUNTED_FROM,
    describe_rule_change,
    follows,
    plan_onto,
    translate_hyper,
)
from optstate.optimizer.missing_state import Gap, rule
from optstate.optimizer.optimizer import Optimizer
from optstate.optimizer.plan import ParamPlan, Plan
from optstate.text import shown

__all__ = ["is_complete", "plan_load", "refuse_differences"]


# --- the same state -----------------------------------------------------------------------------------------------


def refuse_differences(optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Raise ValueError at the first difference between what a file of optstate's own holds and what is kept here."""
    plan, document, tensors = optimizer.plan(), checkpoint.document, checkpoint.tensors
    names = list_names(optimizer, plan)
    if len(names) != len(document.parameters):
        raise ValueError(f"it was saved for {len(document.parameters)} parameters, this optimizer has {len(names)}")
    used: set[str] = set()
    for name, own, saved in zip(names, plan, document.parameters, strict=True):
        by_place = not saved.weights and saved.name.startswith("#")  # of a tool that does not name them
        if saved.name != name and not by_place:
            why = "the model or its order differs"
            if saved.name.startswith("#"):
                why = "it was saved without names, build the optimizer without names, too, or convert it with --names"
            elif name.startswith("#"):
                why = "it was saved with names, build the optimizer with model.named_parameters()"
            raise ValueError(f"it has {saved.name!r} where this optimizer has {name!r}: {why}")
        _refuse_other_state(own, saved)
        if saved.step is None:
            continue
        for key, spec in own.fields.items():
            wanted = tensor_key(saved.name, key)
            entry = tensors.get(wanted)
            if entry is None:
                raise ValueError(f"the tensor '{wanted}' is missing")
            if (entry.dtype, entry.shape) != (DTYPES[spec.dtype], spec.shape):
                there, here = f"{entry.dtype} {entry.shape}", f"{DTYPES[spec.dtype]} {spec.shape}"
                raise ValueError(f"the tensor '{wanted}' is {there}, here it is {here}")
            used.add(wanted)
    stray = next((name for name in tensors if name not in used), None)
    if stray is not None:
        raise ValueError(f"the tensor '{stray}' belongs to no statistic of this optimizer")


def _refuse_other_state(own: ParamPlan, saved: Parameter) -> None:
    """Raise ValueError if what was saved of a parameter is not what is kept of it here.

    What was converted from another tool's file may say neither dtypes nor how weights are written.
    """
    name, dtype = saved.name, name_dtype(own.spec.dtype)
    there, here = f"{saved.dtype or dtype} {saved.shape}", f"{dtype} {own.spec.shape}"
    if there != here:
        raise ValueError(f"{name!r} was {there} when it was saved, here it is {here}")
    if saved.chain != str(own.chain):
        raise ValueError(f"{name!r} went through the chain {saved.chain}, here it is {own.chain}: another recipe")
    if saved.weights and saved.weights != str(own.weights):
        raise ValueError(f"{name!r} was written by {saved.weights}, here it is by {own.weights}")
    if saved.step is None:
        return
    kept = describe_slots(name, own, {})
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


# --- other state --------------------------------------------------------------------------------------------------


def plan_load(optimizer: Optimizer, checkpoint: Checkpoint, *, anew: bool = False) -> Conversion:
    """Plan what a checkpoint becomes here: the optimizer's plan, and the file's hyper-parameters if they mean the same.

    anew: whether what is kept for writing weights may begin anew, where the file's were of another dtype or written in
    another way. It is without transfers then.

    Raises:
        ValueError: if parameters differ in number, names, shapes or groups, or a statistic cannot be made.
    """
    plan, saved = optimizer.plan(), optimizer.state_dict()
    sources = _matched(describe_optimizer(optimizer, plan, saved), checkpoint, anew)
    _check_sizes(checkpoint, sources)
    steps = _steps(optimizer, plan, checkpoint, sources)
    own = describe_optimizer(optimizer, plan, {**saved, "state": {i: {"step": step} for i, step in steps.items()}})
    groups, changes, notes = _groups(own, plan, checkpoint.document, sources)
    parameters = [
        # what averages began at zero with is said by the hyper-parameters that they go on with
        replace(param, slots=describe_slots(param.name, planned, _plain(groups[param.group]))) if param.slots else param
        for param, planned in zip(own.parameters, plan, strict=True)
    ]
    if anew:
        parameters = list(map(_without_begun, parameters, sources))
    document = replace(own, parameters=tuple(parameters), groups=groups)
    conversion = plan_onto(checkpoint, document, list(plan), sources, notes, changes)
    conversion.check()
    return conversion


def is_complete(checkpoint: Checkpoint) -> bool:
    """Tell whether there is state for all parameters that trained.

    This library keeps it from the beginning, others make it at the first update, and torch.distributed.checkpoint
    leaves out what is frozen when it is saved.
    """
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
    """Return the parameter without what is kept for writing it, if the file keeps nothing like it."""
    theirs, ours = source.slots.get(WEIGHT), own.slots.get(WEIGHT)
    same_dtype = not source.dtype or source.dtype == own.dtype  # what corrects an fp16 weight is nothing to a bf16 one
    if ours is None or (theirs is not None and theirs.store == ours.store and same_dtype):
        return own
    return replace(own, slots={slot: record for slot, record in own.slots.items() if slot != WEIGHT})


def _matched(own: Document, checkpoint: Checkpoint, anew: bool) -> list[Parameter]:
    """Return the file's parameters, if they are this optimizer's in the same order and groups."""
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
    """Give this optimizer's groups the file's hyper-parameters where they go through the same chain.

    Returns:
        The groups, what a step will do otherwise where the chain is another, and what the file does not say.
    """
    groups, first, strays = [], 0, stray_keys(theirs)
    changes: dict[str, None] = {}
    missing: dict[str, None] = {}
    for mine, other in zip(own.groups, theirs.groups, strict=True):
        if mine.parameters:
            needed = {"lr", *plan.params[first].chain.hyper}
            if _same_chain(sources[first], theirs, plan.params[first]):
                said = translate_hyper(theirs, other)
                known = {*mine.hyper, *strays, "initial_lr"}
                mine = replace(mine, hyper={**mine.hyper, **{k: v for k, v in said.items() if k in known}})
                missing |= dict.fromkeys(sorted(needed - said.keys()))
            else:
                changes |= dict.fromkeys(describe_rule_change(sources[first], theirs, str(plan.params[first].chain)))
        groups.append(mine)
        first += len(mine.parameters)
    notes = [*doubts(theirs), *_unclipped(own, theirs)]
    if strays and not changes:
        notes.append(f"hyper-parameters that are not known here are carried along: {', '.join(map(shown, strays))}")
    if missing:
        notes.append(f"the file does not say {', '.join(missing)}: what this optimizer has stays")
    return tuple(groups), tuple(changes), tuple(notes)


def _unclipped(own: Document, theirs: Document) -> list[str]:
    """Say that the file's run clipped gradients by a norm, as lomo-optim's groups tell, too, if this one does not."""
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
