"""Files of torch, transformers and lion-pytorch, which keep statistics in full or factored. Imports no torch."""

from __future__ import annotations

from typing import Any

from optstate.checkpoint.document.document import Group, Parameter, SlotRecord
from optstate.checkpoint.files.torch_pickle_writer import NewTensor
from optstate.checkpoint.formats import adafactor_rules, hyper_tables
from optstate.checkpoint.formats.meanings import ADAFACTOR, ADAM, LION, SGD, check_meanings, rule_of
from optstate.checkpoint.formats.tree_writer import Given, LayoutError, Tree, scalar
from optstate.text import shown

__all__ = ["as_lion_pytorch", "as_torch", "as_transformers", "factors", "fields_of"]

FACTORED = "Factored()"

ORDER = ("square_avg", "sum", "exp_avg", "exp_avg_sq", "variance", "max_exp_avg_sq", "momentum_buffer", "grad_avg")
"""In which the libraries keep their statistics; others come after these."""


def as_torch(given: Given) -> Tree:
    """What torch.optim's classes keep: AdamW, SGD and Adafactor of any document, every class of its own files.

    Raises:
        LayoutError: for what they do not keep.
    """
    rule = "" if given.same else rule_of(given, "adam", "sgd", "adafactor", "adalomo")
    factored = rule in ("adafactor", "adalomo") or _is_adafactor(given)
    meanings = {"adam": ADAM, "sgd": SGD}.get(rule, ADAFACTOR)

    def state_of(param: Parameter) -> Tree:
        check_meanings(given, param, meanings)
        state = given.step(param, "F32" if rule != "sgd" and param.has_state else "")
        extra = given.extra(param)
        for slot in _in_order(param):
            record, key = param.slots[slot], _spelled(given, slot)
            if given.same and key in extra and "" not in record.fields:
                extra[key] = _filled(given, param, slot, extra[key])
            else:
                state |= _torch_fields(given, param, slot, record, factored)
        return state | extra

    def hyper_of(place: int, group: Group) -> Tree:
        if factored:
            return adafactor_rules.in_torch(given, place, group)
        words = hyper_tables.TORCH_SGD if rule == "sgd" else hyper_tables.TORCH_ADAMW
        common = hyper_tables.common(given, group)
        if rule == "sgd" and any("momentum(nesterov" in param.chain for param in given.members(place)):
            common["nesterov"] = True
        return hyper_tables.translated(given, place, common, words)

    given.warn_of_casts()
    return given.tree(state_of, hyper_of)


def as_transformers(given: Given) -> Tree:
    """What transformers' Adafactor keeps.

    Raises:
        LayoutError: for what it does not keep.
    """
    factored = _is_adafactor(given) if given.same else bool(rule_of(given, "adafactor", "adalomo"))

    def state_of(param: Parameter) -> Tree:
        check_meanings(given, param, ADAFACTOR)
        state = given.step(param, "int" if param.has_state else "")
        for slot in _in_order(param):
            _check_momentum(given, param, slot)
            state |= fields_of(given, param, slot, param.slots[slot], factored and slot != "exp_avg")
        if given.same:
            return state | given.extra(param)
        given.extra(param)
        return state | ({"RMS": scalar("F32", 0.0)} if state else {})  # made anew at every step

    given.warn_of_casts()
    return given.tree(state_of, lambda place, group: adafactor_rules.in_transformers(given, place, group))


def as_lion_pytorch(given: Given) -> Tree:
    """What lion-pytorch keeps: one statistic, and no steps.

    Raises:
        LayoutError: for what it does not keep.
    """
    if not given.same:
        rule_of(given, "lion")

    def state_of(param: Parameter) -> Tree:
        check_meanings(given, param, LION)
        state = given.step(param, "")
        for slot, record in param.slots.items():
            state[slot] = given.full(param, slot, record)
        return state | given.extra(param)

    def hyper_of(place: int, group: Group) -> Tree:
        return hyper_tables.translated(given, place, hyper_tables.common(given, group), hyper_tables.LION)

    given.warn_of_casts()
    return given.tree(state_of, hyper_of)


def fields_of(given: Given, param: Parameter, slot: str, record: SlotRecord, factored: bool) -> Tree:
    """The tensors of a statistic that is in full, or as `<slot>_row` and `<slot>_col`.

    factored: whether the library factors it for two dimensions and more, and only then.
    """
    if factored and record.store == FACTORED:
        row, col = factors(given, record)
        return {f"{slot}_row": row, f"{slot}_col": col}
    whole = given.full(param, slot, record)
    _refuse_full_matrix(given, param, slot, record, factored and len(whole.shape) > 1)
    return {slot: whole}


def factors(given: Given, record: SlotRecord) -> tuple[NewTensor, NewTensor]:
    """Row means `[..., m]` and column means `[..., n]`."""
    return given.tensor(record.fields["row"]), given.tensor(record.fields["col"])


def _torch_fields(given: Given, param: Parameter, slot: str, record: SlotRecord, factored: bool) -> Tree:
    """The tensors of one statistic; torch's Adafactor keeps factors in the parameter's number of dimensions."""
    if not factored:
        return {_spelled(given, slot): given.full(param, slot, record)}
    if record.store == FACTORED:
        row, col = factors(given, record)
        return {
            "row_var": given.tensor(row.key, (*row.shape, 1)),
            "col_var": given.tensor(col.key, (*col.shape[:-1], 1, col.shape[-1])),
        }
    if slot == "exp_avg":
        raise LayoutError(
            f"exp_avg of '{shown(param.name)}' has no place in {given.layout}: its Adafactor keeps no first moment; "
            "convert with --recipe adafactor, which keeps none either"
        )
    whole = given.full(param, slot, record)
    _refuse_full_matrix(given, param, slot, record, len(whole.shape) > 1)
    return {"variance": whole}


def _spelled(given: Given, slot: str) -> str:
    """The key of a statistic: as it was in the file, if that names no slot."""
    spelling = given.document.source.get("spelling") if given.same else None
    key = spelling.get(slot, slot) if isinstance(spelling, dict) else slot
    return key if isinstance(key, str) else slot


def _filled(given: Given, param: Parameter, slot: str, lists: Any) -> Any:
    """Lists that a file had, with the tensors in their places again."""
    record, left = param.slots[slot], dict(param.slots[slot].fields)

    def fill(value: Any, place: str) -> Any:
        if value is None and place in left:
            return given.tensor(left.pop(place))
        if isinstance(value, list | tuple):
            return type(value)(fill(part, f"{place}_{i}" if place else str(i)) for i, part in enumerate(value))
        return value

    filled = fill(lists, "")
    if left:
        raise given.misfit(param, slot, record, "tensors, and lists of tensors as they were", "fp32")
    return filled


def _refuse_full_matrix(given: Given, param: Parameter, slot: str, record: SlotRecord, condition: bool) -> None:
    if condition:
        raise given.misfit(param, slot, record, "row and column means of matrices", "factored")


def _check_momentum(given: Given, param: Parameter, slot: str) -> None:
    if slot == "exp_avg" and not given.same and not param.chain.endswith(adafactor_rules.AVERAGES_STEPS):
        raise LayoutError(
            f"exp_avg of '{shown(param.name)}' averages updates, transformers' averages finished steps, learning rate "
            "included; convert with --recipe adafactor, which keeps none"
        )


def _is_adafactor(given: Given) -> bool:
    return given.same and given.document.source.get("optimizer") == "Adafactor"


def _in_order(param: Parameter) -> list[str]:
    return sorted(param.slots, key=lambda slot: ORDER.index(slot) if slot in ORDER else len(ORDER))
