"""Files of bitsandbytes and torchao, which keep statistics in codes of few bits. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from optstate.checkpoint.document.document import Group, Parameter, SlotRecord
from optstate.checkpoint.files.torch_pickle_writer import NewTensor, Subclass
from optstate.checkpoint.formats import hyper_tables
from optstate.checkpoint.formats.meanings import ADAM, LION, SGD, check_meanings, rule_of
from optstate.checkpoint.formats.tree_writer import FLOATS, Given, LayoutError, Tree, is_full, scalar
from optstate.text import shown

__all__ = ["as_bitsandbytes", "as_torchao"]

NESTED = "__bnb_optimizer_quant_state__"
HIDDEN = ("max1", "max2", "new_max1", "new_max2", "gnorm_vec", "unorm_vec")
"""What bitsandbytes keeps there besides codes, maps and maxima."""

PLACES = {"exp_avg_sq": 2, "state2": 2}
"""Of statistics that are not the first."""

BLOCK = 256  # of bitsandbytes, fixed
IN_BITSANDBYTES = f"Block8() of {BLOCK} elements or Full()"
IN_TORCHAO = "Block8(), Block4(), Float8() or Full()"


def as_bitsandbytes(given: Given) -> Tree:
    """What bitsandbytes' AdamW, Lion and SGD keep, in 8 bits or fp32 parameter by parameter.

    Raises:
        LayoutError: for what they do not keep.
    """
    rule = "" if given.same else rule_of(given, "adam", "lion", "sgd")
    meanings = {"adam": {slot: ADAM[slot] for slot in ("exp_avg", "exp_avg_sq")}, "lion": LION}.get(rule, SGD)
    nested = given.document.source.get("nested", True)

    def state_of(param: Parameter) -> Tree:
        check_meanings(given, param, meanings)
        if not param.slots and not given.same:
            return {}
        outside = _count(given, param, rule)
        inside = _quantised(given, param)
        for key, value in given.extra(param).items():
            (inside if key in HIDDEN else outside)[key] = value
        return outside | ({NESTED: inside} if nested and inside else inside)

    def hyper_of(place: int, group: Group) -> Tree:
        words = hyper_tables.common(given, group)
        if rule == "sgd":
            words["betas"] = (words.pop("momentum", 0.0), 0)
        return hyper_tables.translated(given, place, words, hyper_tables.BITSANDBYTES[rule])

    return given.tree(state_of, hyper_of)


def _count(given: Given, param: Parameter, rule: str) -> Tree:
    if param.step is None and rule in ("lion", "sgd"):
        given.note("the file counts no steps, which these rules do not depend on after the first: they are set to 1")
        param = replace(param, step=1)
    return given.step(param, "int")


def _quantised(given: Given, param: Parameter) -> Tree:
    """Codes, maps and maxima in bitsandbytes' order; fp32 statistics without maps and maxima."""
    codes: Tree = {}
    maxima: Tree = {}
    for slot, record in sorted(param.slots.items(), key=lambda item: PLACES.get(item[0], 1)):
        n = PLACES.get(slot, 1)
        if f"state{n}" in codes:
            raise LayoutError(
                f"'{shown(param.name)}' has {', '.join(param.slots)}: AdEMAMix keeps two averages in one tensor, "
                "which cannot be put together here; write a file of optstate's own"
            )
        if "codes" in record.fields:
            _check_block8(given, param, slot, record)
            codes |= {f"state{n}": given.tensor(record.fields["codes"]), f"qmap{n}": given.map_of(record)}
            maxima[f"absmax{n}"] = given.tensor(record.fields["absmax"])
        else:
            codes[f"state{n}"] = given.full(param, slot, record, IN_BITSANDBYTES, "block8")
            if codes[f"state{n}"].dtype != "F32" and not given.same:
                raise given.misfit(param, slot, record, IN_BITSANDBYTES, "fp32")
    if maxima and len(maxima) < len(param.slots):
        stores = ", ".join(f"{slot} in {record.store}" for slot, record in param.slots.items())
        raise LayoutError(
            f"'{shown(param.name)}' has {stores}: bitsandbytes keeps both in 8 bits or both in fp32; convert both with "
            "--slot"
        )
    return codes | maxima


def _check_block8(given: Given, param: Parameter, slot: str, record: SlotRecord) -> None:
    fits = record.store.startswith("Block8(") and record.block == BLOCK
    if not fits or len(given.document.codebooks.get(record.codebook, ())) not in (0, BLOCK):
        raise given.misfit(param, slot, record, IN_BITSANDBYTES, "block8")


# --- torchao ------------------------------------------------------------------------------------------------------

_MODULE = "torchao.optim.subclass_"


def as_torchao(given: Given) -> Tree:
    """What torchao's AdamW8bit, AdamW4bit and AdamWFp8 keep: tensors of classes of its own, or plain ones.

    Raises:
        LayoutError: for what they do not keep.
    """
    if not given.same:
        rule_of(given, "adam")

    def state_of(param: Parameter) -> Tree:
        check_meanings(given, param, ADAM)
        state = given.step(param, "F32" if param.has_state else "")
        for slot in sorted(param.slots, key=lambda slot: list(ADAM).index(slot) if slot in ADAM else len(ADAM)):
            state[slot] = _wrapped(given, param, slot, param.slots[slot])
        return state | given.extra(param)

    def hyper_of(place: int, group: Group) -> Tree:
        words = hyper_tables.translated(given, place, hyper_tables.common(given, group), hyper_tables.TORCHAO)
        return words | {"lr": scalar("F32", words["lr"])}

    given.warn_of_casts()
    return given.tree(state_of, hyper_of)


def _wrapped(given: Given, param: Parameter, slot: str, record: SlotRecord) -> NewTensor | Subclass:
    if is_full(record) or "codes" not in record.fields:
        return given.full(param, slot, record, IN_TORCHAO, "block8")
    kind = re.match(r"(Block8|Block4|Float8)\(", record.store)
    scale = record.fields.get("scale", record.fields.get("absmax"))
    if kind is None or scale is None or "rank1" in record.store:
        raise given.misfit(param, slot, record, IN_TORCHAO, "block8")
    codes = given.tensor(record.fields["codes"])
    state: dict[str, Any] = {"codes": codes, "scale": given.tensor(scale)}
    shape = param.shape if kind[1] == "Block4" else codes.shape
    if shape is None or not record.block or prod(shape) % record.block:
        raise LayoutError(
            f"'{shown(param.name)}' has {prod(shape or ())} elements: torchao has whole blocks of {record.block} only; "
            f"convert with --slot {slot}=fp32"
        )
    return Subclass(*_class_of(given, param, slot, record, kind[1], shape, state))


def _class_of(
    given: Given,
    param: Parameter,
    slot: str,
    record: SlotRecord,
    store: str,
    shape: tuple[int, ...],
    state: Mapping[str, Any],
) -> tuple[str, str, tuple[int, ...], dict[str, Any]]:
    """The name, dtype, shape and attributes of the tensor that torchao makes."""
    dtype = FLOATS.get(param.dtype, "F32")
    if store == "Float8":
        if "scale" not in record.fields:
            raise LayoutError(
                f"{slot} of '{shown(param.name)}' is in {record.store} with block maxima, torchao has them divided by "
                f"448; convert with --slot {slot}=block8"
            )
        return f"{_MODULE}fp8.OptimStateFp8", dtype, shape, {**state, "block_size": record.block}
    attributes = {**state, "qmap": replace(given.map_of(record)), "signed": record.signed}  # a map for each tensor
    if store == "Block4":
        attributes["_shape"] = shape
    name = "4bit.OptimState4bit" if store == "Block4" else "8bit.OptimState8bit"
    return _MODULE + name, dtype, shape, {**attributes, "block_size": record.block}
