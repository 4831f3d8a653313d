"""Files of pytorch_optimizer: CAME, SM3 and AdaLOMO of any document, every class of its own files. Imports no torch."""

from __future__ import annotations

from typing import Any

from optstate.checkpoint.document.document import Group, Parameter, SlotRecord
from optstate.checkpoint.formats import adafactor_rules, hyper_tables
from optstate.checkpoint.formats.full_writers import FACTORED, factors, fields_of
from optstate.checkpoint.formats.meanings import ADAFACTOR, CAME, SM3, check_meanings, rule_of
from optstate.checkpoint.formats.tree_writer import Given, LayoutError, Tree, scalar
from optstate.text import shown

__all__ = ["as_pytorch_optimizer"]

AXIS_MAX = "AxisMax()"


def as_pytorch_optimizer(given: Given) -> Tree:
    """What its classes keep.

    Raises:
        LayoutError: for what they do not keep.
    """
    if given.same:
        return _as_adalomo(given) if given.document.recipe == "adalomo" else given.tree(_its_own(given), _no_words)
    makers = {"came": _as_came, "sm3": _as_sm3, "adalomo": _as_adalomo}
    return makers[rule_of(given, *makers)](given)


def _its_own(given: Given) -> Any:
    """The state of parameters as the file had it."""

    def state_of(param: Parameter) -> Tree:
        check_meanings(given, param, {})
        state = given.step(param, "")
        for slot, record in param.slots.items():
            if slot == "accumulator":
                state |= _accumulators(given, param, record)
            else:
                state |= fields_of(given, param, slot, record, factored=record.store == FACTORED)
        return state | given.extra(param)

    return state_of


def _no_words(place: int, group: Group) -> Tree:
    raise AssertionError("the groups of its own files stay as they are")


def _as_came(given: Given) -> Tree:
    def state_of(param: Parameter) -> Tree:
        check_meanings(given, param, CAME)
        state: Tree = {}
        for slot in CAME:
            if slot in param.slots:
                state |= fields_of(given, param, slot, param.slots[slot], factored=slot != "exp_avg")
        given.extra(param)
        return state | ({"RMS": scalar("F32", 0.0)} if state else {})  # made anew at every step

    def hyper_of(place: int, group: Group) -> Tree:
        words = hyper_tables.common(given, group)
        words["eps1"], words["eps2"] = hyper_tables.pair(given, place, words, "eps")
        del words["eps"]
        clip = words.pop("clip_threshold", 1.0)
        if clip is None:
            raise LayoutError(f"param group {place} has clip_threshold=None: pytorch_optimizer's CAME always clips")
        if clip != 1.0:
            given.note(f"CAME's file does not hold clip_threshold: build it with clip_threshold={clip}")
        return hyper_tables.translated(given, place, words, hyper_tables.CAME) | _step_of_group(given, place)

    return given.tree(state_of, hyper_of)


def _as_sm3(given: Given) -> Tree:
    def state_of(param: Parameter) -> Tree:
        check_meanings(given, param, SM3)
        state: Tree = {}
        if "exp_avg" in param.slots:
            state["momentum_buffer"] = given.full(param, "exp_avg", param.slots["exp_avg"])
        if "accumulator" in param.slots:
            state |= _accumulators(given, param, param.slots["accumulator"])
        return state | given.extra(param)

    def hyper_of(place: int, group: Group) -> Tree:
        words = hyper_tables.common(given, group)
        return hyper_tables.translated(given, place, words, hyper_tables.SM3) | _step_of_group(given, place)

    return given.tree(state_of, hyper_of)


def _accumulators(given: Given, param: Parameter, record: SlotRecord) -> Tree:
    """The maxima along every dimension, each in a shape that broadcasts against the parameter."""
    if record.store != AXIS_MAX:
        whole = given.full(param, "accumulator", record)
        if len(whole.shape) > 1:
            raise given.misfit(param, "accumulator", record, "the maxima of rows and columns", "axismax")
        return {"accumulator_0": whole}
    leading = sorted(name for name in record.fields if name.startswith("axis"))
    names, state = [*leading, "row", "col"], {}
    for i, name in enumerate(names):
        size = given.entries[record.fields[name]].shape[0]
        shape = tuple(size if d == i else 1 for d in range(len(names)))
        state[f"accumulator_{i}"] = given.tensor(record.fields[name], shape)
    return state


def _step_of_group(given: Given, place: int) -> Tree:
    """The one count of steps that a group has."""
    counts = {param.step for param in given.members(place) if param.has_state}
    if len(counts) > 1 or None in counts:
        found = "unknown" if None in counts else ", ".join(map(str, sorted(filter(None, counts))))
        raise LayoutError(
            f"the parameters of group {place} were updated {found} times: {given.layout} has one count for a group"
        )
    return {"step": counts.pop() or 0} if counts else {}


# --- AdaLOMO ------------------------------------------------------------------------------------------------------


def _as_adalomo(given: Given) -> Tree:
    """AdaLOMO keeps its state beside `state`, by the names of the parameters, and one count of steps for all."""
    by_name: dict[str, Tree] = {"exp_avg_sq": {}, "exp_avg_sq_row": {}, "exp_avg_sq_col": {}}
    for param in given.document.parameters:
        check_meanings(given, param, ADAFACTOR)
        given.extra(param)
        for slot, record in param.slots.items():
            if slot == "exp_avg":
                raise LayoutError(
                    f"exp_avg of '{shown(param.name)}' has no place in AdaLOMO; convert with --recipe adalomo"
                )
            if param.name.startswith("#"):
                raise LayoutError(
                    f"the parameter {param.name} has no name, by which pytorch_optimizer's AdaLOMO keeps state; give "
                    "names with --names"
                )
            if record.store == FACTORED and len(factors(given, record)[0].shape) != 1:
                raise LayoutError(f"'{shown(param.name)}' has more than two dimensions: AdaLOMO factors matrices only")
            for key, tensor in fields_of(given, param, slot, record, factored=True).items():
                by_name[key][param.name] = tensor
    steps = given.document.steps
    if len(steps) > 1:
        raise LayoutError(f"parameters were updated {', '.join(map(str, steps))} times: AdaLOMO has one count for all")
    tree = given.tree(lambda param: {}, lambda place, group: adafactor_rules.in_adalomo(given, place, group))
    return {**tree, "num_steps": steps[0] if steps else 0, **by_name}
