"""State of one recipe as another keeps it: a conversion onto the plan of a real optimizer."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optstate.checkpoint.document.chain_words import parse_chain
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import WEIGHT, Document, Group, Parameter
from optstate.checkpoint.document.rules import base_recipe, is_own, other_chains, reasons
from optstate.checkpoint.formats.shared.adafactor import find_arguments
from optstate.checkpoint.formats.shared.statistics import RULES
from optstate.checkpoint.formats.shared.tree_writer import numbers
from optstate.checkpoint.operations.describe_optimizer import describe_optimizer, restore_tensors
from optstate.checkpoint.operations.plan_conversion import Conversion, Transfer, copy_statistic, take_over_statistic
from optstate.checkpoint.operations.read_values import make_spec
from optstate.optimizer.optimizer import Optimizer
from optstate.optimizer.param_groups import check_values
from optstate.optimizer.plan import ParamPlan
from optstate.recipes import registry
from optstate.text import shown
from optstate.weights import Weights, as_weights, parse_weights

__all__ = [
    "COUNTED_FROM",
    "describe_rule_change",
    "follows",
    "is_same_rule",
    "list_arguments",
    "parse_settings",
    "plan_onto",
    "plan_recipe",
    "translate_hyper",
]

NO_SETTINGS = frozenset({"params", "weights", "fused_backward"})
"""Arguments of recipes that are no hyper-parameters."""

NOT_HYPER = frozenset({"params", "param_names", "role", "head_size"})
"""What else a param group holds."""

COUNTED_FROM = 1
"""The step of state whose updates nobody counted: at least one has been made."""


def plan_recipe(checkpoint: Checkpoint, name: str, settings: Mapping[str, str] = {}) -> Conversion:
    """Plan what a checkpoint becomes when its run goes on with another recipe.

    Statistics are matched by what they are averages of, and corrected for beginning at zero as each recipe does it;
    steps stay. Hyper-parameters stay where both recipes go through the same chain, as one and the same recipe does
    unless a setting changes it; else they are the new recipe's defaults: a learning rate of one says nothing about the
    other's.

    Args:
        checkpoint: the source.
        name: of the recipe.
        settings: arguments of the new recipe and their values as Python writes them, for all groups.

    Raises:
        UnknownRecipeError: if no recipe has this name.
        ValueError, TypeError: if a statistic cannot be made from the source's, a shape is unknown, or a setting is
            not possible.
    """
    sources = checkpoint.document.parameters
    params = [_on_meta(param) for param in sources]
    given = parse_settings(name, settings)
    optimizer = _built(name, checkpoint, params, given)
    place = {id(param): i for i, param in enumerate(params)}
    order = [place[id(p)] for group in optimizer.param_groups for p in group["params"]]
    said, changes = _keep_hyper(optimizer, name, checkpoint.document, order, set(given))
    if given and is_same_rule(name, checkpoint.document.recipe):  # the settings say so themselves
        said, changes = (*said, *(f"as it was asked for: {change}" for change in changes)), ()
    notes = (*said, *_left_out(checkpoint.document))
    plan, saved = optimizer.plan(), optimizer.state_dict()
    for new, old in enumerate(order):
        if new in saved["state"]:
            step = sources[old].step
            saved["state"][new]["step"] = COUNTED_FROM if step is None else step
    if any(param.step is None and param.has_state for param in sources):
        notes = (*notes, f"the file counts no steps: they are counted from {COUNTED_FROM} on")
    document = replace(describe_optimizer(optimizer, plan, saved), recipe=name, history=checkpoint.document.history)
    return plan_onto(checkpoint, document, list(plan), [sources[i] for i in order], notes, changes)


def plan_onto(
    checkpoint: Checkpoint,
    document: Document,
    plans: Sequence[ParamPlan],
    sources: Sequence[Parameter],
    notes: tuple[str, ...] = (),
    changes: tuple[str, ...] = (),
) -> Conversion:
    """Plan a conversion onto the plans of an optimizer, whose parameters `document` describes in the same order.

    changes: what a step will do otherwise, see `Conversion`.

    Raises:
        ValueError: if a statistic cannot be made from the source's.
    """
    transfers: dict[str, tuple[Transfer, ...]] = {}
    parameters, dropped = [], []
    for new, plan, source in zip(document.parameters, plans, sources, strict=True):
        made = tuple(_transfers(checkpoint, new, plan, source))
        used = {transfer.source for transfer in made}
        dropped += [(source.name, slot) for slot in source.slots if slot not in used]
        transfers[source.name] = made
        parameters.append(
            replace(
                new,
                dtype=source.dtype,
                weights=source.weights,
                tied=source.tied,
                slots={transfer.name: transfer.record for transfer in made},
            )
        )
    carried = any(transfer.source is not None for made in transfers.values() for transfer in made)
    if dropped and not carried:
        kept = ", ".join(dict.fromkeys(slot for _, slot in dropped))
        raise ValueError(f"nothing that the file keeps, {kept}, can be used by it: begin with a fresh optimizer")
    document = replace(document, parameters=tuple(parameters))
    return Conversion(checkpoint, document, transfers, tuple(dropped), notes, changes)


def _transfers(checkpoint: Checkpoint, new: Parameter, plan: ParamPlan, source: Parameter) -> Iterator[Transfer]:
    stored = {slot: checkpoint.fields_of(record) for slot, record in source.slots.items()}
    by_name = is_own(checkpoint.document)  # in other libraries a name says nothing of what is averaged
    for name, record in new.slots.items():
        if name == WEIGHT:
            if name not in source.slots or source.slots[name].store != record.store:
                raise ValueError(f"{source.name!r}: what {record.store} keeps for the weight is not in the file")
            yield copy_statistic(source, name, stored[name], as_param=new.name)
        else:
            slot = plan.slots[name]
            yield take_over_statistic(source, stored, name, record, slot.store, slot.fields, by_name)


# --- the new recipe's optimizer, without memory for it ------------------------------------------------------------


def _on_meta(param: Parameter) -> nn.Parameter:
    spec = make_spec(param)
    return nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype, device="meta"), requires_grad=param.has_state)


def parse_settings(name: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings as a recipe's arguments.

    Raises:
        UnknownRecipeError: if no recipe has this name.
        ValueError: for one that it does not have, or a value that is none.
    """
    known = _parameters(name)
    for key in settings:
        if key not in known:
            raise ValueError(f"{name} has no hyper-parameter {key!r}: it has {', '.join(known)}")
    return {key: _literal(key, words) for key, words in settings.items()}


def _parameters(name: str) -> list[str]:
    return [key for key in inspect.signature(registry.get(name)).parameters if key not in NO_SETTINGS]


def _built(name: str, checkpoint: Checkpoint, params: Sequence[nn.Parameter], given: Mapping[str, Any]) -> Optimizer:
    """Build the recipe's optimizer for parameters of these shapes, in the source's groups."""
    document, groups, first = checkpoint.document, [], 0
    for group in document.groups:
        members: Sequence[Any] = params[first : first + len(group.parameters)]
        if checkpoint.named:
            members = list(zip(group.parameters, members, strict=True))
        first += len(members)
        declared = {"role": group.role, "head_size": group.head_size}
        groups.append({"params": members} | {key: value for key, value in declared.items() if value})
    written = _weights(document.parameters)
    weights = {} if written is None else {"weights": written}
    kept = _own_arguments(name, document) if is_same_rule(name, document.recipe) else {}
    try:
        return registry.get(name)(groups, **weights, **{**kept, **given})
    except (ValueError, TypeError):
        if not kept:
            raise
        return registry.get(name)(groups, **weights, **given)  # what is asked for rules out what was


def _own_arguments(name: str, document: Document) -> dict[str, Any]:
    """Return what the file's own rule is, as arguments of a recipe that has it."""
    first = next(iter(document.parameters), None)
    if first is None:
        return {}
    arguments, known = list_arguments(document, document.groups[first.group], first.chain), _parameters(name)
    return {key: value for key, value in arguments.items() if key in known}


def _weights(parameters: Sequence[Parameter]) -> Weights | None:
    """How the source writes weights, None if it is the way that is chosen for them anyway.

    Raises:
        ValueError: if parameters are written in several ways, which no recipe can be asked for.
    """
    chosen = {
        param.weights: parse_weights(param.weights)
        for param in parameters
        if param.weights and param.weights != str(as_weights("auto", make_spec(param)))
    }
    if len(chosen) > 1:
        raise ValueError(f"weights are written in several ways, {' and '.join(sorted(chosen))}: one recipe has one way")
    return next(iter(chosen.values()), None)


def _keep_hyper(
    optimizer: Optimizer, name: str, document: Document, order: Sequence[int], given: set[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give the new groups the source's hyper-parameters where they mean the same and no others were asked for.

    Returns:
        What to say of it, and what a step will do otherwise.
    """
    sources, plan, first = document.parameters, optimizer.plan(), 0
    left_out: dict[str, Any] = {}
    new_rule: dict[str, Any] = {}
    changes: dict[str, None] = {}
    expressed = set(_parameters(name)) if is_same_rule(name, document.recipe) else set()
    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        source = sources[order[first]]
        chain, old = plan.params[first].chain, document.groups[source.group]
        if follows(source, document, str(chain)):
            theirs = translate_hyper(document, old)
            same = {key: value for key, value in theirs.items() if key in group or key == "initial_lr"}
            group.update({key: restore_tensors(same[key], group.get(key)) for key in same.keys() - given})
            left_out |= {key: value for key, value in theirs.items() if key not in same.keys() | expressed}
            check_values(group, chain)
        else:
            new_rule |= {key: group[key] for key in sorted(group.keys() - NOT_HYPER)}
            left_out |= old.hyper
            changes |= dict.fromkeys(describe_rule_change(source, document, str(chain)))
        first += len(group["params"])
    notes = [f"hyper-parameters are the new recipe's: {_listed(new_rule)}"] if new_rule else []
    if left_out:
        notes.append(f"hyper-parameters of the file that are left out: {_listed(left_out)}")
    return tuple(notes), tuple(changes)


def _listed(hyper: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={numbers(value)!r}" for key, value in sorted(hyper.items()))


def _left_out(document: Document) -> list[str]:
    """List what the file has besides statistics and hyper-parameters, which no new recipe takes over."""
    kept = dict.fromkeys(key for param in document.parameters for key in param.extra)
    found = [", ".join(names) for names in (kept, document.extra) if names]
    if document.clip_grad_norm is not None:
        found.append(f"clip_grad_norm={document.clip_grad_norm} of the fused backward pass")
    return [f"left out: {what}" for what in found]


def _literal(key: str, words: str) -> Any:
    try:
        return ast.literal_eval(words)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{key}={words}: give a number, a tuple, True, False or None") from None


# --- the rule of a file -------------------------------------------------------------------------------------------


def follows(param: Parameter, document: Document, chain: str) -> bool:
    """Whether a parameter went through this chain, which is in words, as far as the file tells."""
    if param.chain:
        return param.chain == chain
    by_recipe, others = other_chains(document, param.group)
    return chain in others or (by_recipe and find_chain(param, document, document.groups[param.group]) == chain)


def describe_rule_change(param: Parameter, document: Document, chain: str) -> list[str]:
    """Describe what a parameter's step will do otherwise in a chain that it did not go through, clause by clause."""
    found = [] if param.chain else reasons(document, param.group)
    if not found:
        try:
            theirs = _chain_of(param, document, document.groups[param.group])
            was = f"went through {theirs or 'a chain that the file does not tell'}"
        except (ValueError, TypeError) as error:
            was = f"has values that {base_recipe(document)} does not take: {shown(str(error))}"
        found = [f"param group {param.group} {was}"]
    return [f"{clause}; the new chain is {chain}" for clause in found]


def find_chain(param: Parameter, document: Document, group: Group) -> str:
    """Find the chain that a parameter went through, in words.

    Of other tools' files it is that of the recipe they are said to be; "" where they do not tell it, or it is none that
    the recipe makes.
    """
    try:
        return _chain_of(param, document, group)
    except (ValueError, TypeError):
        return ""  # nothing that our recipe can do


def _chain_of(param: Parameter, document: Document, group: Group) -> str:
    """Find the same chain; raise ValueError or TypeError where the recipe does not take the group's values."""
    recipe = base_recipe(document)
    if param.chain or recipe not in registry.names():
        return param.chain
    document, known = replace(document, recipe=recipe), _parameters(recipe)
    arguments = {key: value for key, value in list_arguments(document, group, "").items() if key in known}
    members = {"params": [(param.name, _on_meta(param))], "role": group.role, "head_size": group.head_size}
    made = registry.get(recipe)([{k: v for k, v in members.items() if v}], **arguments)
    return str(made.plan().params[0].chain)


def is_same_rule(recipe: str, other: str) -> bool:
    """Whether two recipes do the same with statistics that may be kept differently."""
    return bool(recipe) and RULES.get(recipe, recipe) == RULES.get(other, other)


def translate_hyper(document: Document, group: Group) -> dict[str, Any]:
    """Return a group's hyper-parameters with the keys and values that groups of the document's recipe have.

    What our recipe does not have stays as it is. lr of a relative step is 1, a factor.
    """
    hyper = dict(group.hyper)
    if not is_own(document):
        from optstate.checkpoint.formats.registry import translate_group  # imports all formats

        hyper = translate_group(document, group)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in hyper.items()}


def list_arguments(document: Document, group: Group, chain: str) -> dict[str, Any]:
    """List what the document's recipe is built with for parameters to go through the chain that a group's did.

    chain: in words, "" where the file does not tell it. Hyper-parameters that the recipe does not have are there, too.
    """
    hyper = {key: numbers(value) for key, value in translate_hyper(document, group).items()}
    rule, transforms = RULES.get(document.recipe, ""), parse_chain(chain)
    if rule == "sgd" and chain:
        hyper["nesterov"] = transforms.has("momentum", "nesterov")
    if rule == "adafactor":
        hyper |= find_arguments(hyper, transforms, of_torch="beta2_decay" in group.hyper)
    return hyper
