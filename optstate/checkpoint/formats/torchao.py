"""State of torchao's Adam with 8-bit, 4-bit and fp8 moments, which are tensors of its own classes. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Group, Parameter, SlotRecord
from optstate.checkpoint.files.dtypes import FLOATS
from optstate.checkpoint.files.pickle_machine import Global, Object
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.files.torch_pickle_writer import NewTensor, Subclass
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.hyper_parameters import NEEDED, translate
from optstate.checkpoint.formats.shared.parameter_reader import Draft, Source, build_checkpoint
from optstate.checkpoint.formats.shared.state_dict import StateDict, tell_adam_from_adamw
from optstate.checkpoint.formats.shared.statistics import ADAM, Meaning
from optstate.checkpoint.formats.shared.tree_writer import (
    LayoutError,
    Tree,
    TreeWriter,
    check_rule,
    check_statistics,
    is_full,
    scalar,
)
from optstate.other_libraries import libraries
from optstate.text import shown

__all__ = ["FORMAT"]

NAME = "torchao"

STORES = {"OptimState8bit": "Block8", "OptimState4bit": "Block4", "OptimStateFp8": "Float8"}
NAMES = {"Block8": "AdamW8bit", "Block4": "AdamW4bit", "Float8": "AdamWFp8"}
RECIPES = {"Block8": "adamw8bit", "Block4": "adamw4bit"}

HYPERS = {"lr": NEEDED, "betas": NEEDED, "eps": NEEDED, "weight_decay": NEEDED, "amsgrad": False}
"""The keys and defaults of the classes, in order (0.18)."""

LARGEST_BLOCK = 1 << 16


def _store_of(value: Any) -> str | None:
    return STORES.get(value.name.rpartition(".")[2]) if isinstance(value, Object) else None


def read_torchao(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of torchao's low-bit optimizers; None if it is not their layout.

    optimizer: "Adam8bit" and so on, which the file does not tell from "AdamW8bit".
    """
    stores = {_store_of(value) for state in found.state.values() for value in state.values()} - {None}
    # Without a low-bit moment nothing but its learning rate, a tensor, tells it from torch's before 1.12.
    plain = all(isinstance(group.get("lr"), Stored) for group in found.groups) and "maximize" not in found.keys
    if not found.keys >= HYPERS.keys() or not found.kept <= {"step", *ADAM} or not (stores or plain):
        return None
    store = stores.pop() if len(stores) == 1 else None
    name, notes = tell_adam_from_adamw(found, optimizer, NAMES.get(store or "", "AdamW"))
    recipe = RECIPES.get(store or "", "adamw")
    return build_checkpoint(found, Source(NAME, NAME, name, recipe), _say, notes)


def _say(draft: Draft) -> None:
    draft.take_step()
    for slot, meaning in ADAM.items():
        value = draft.left.get(slot)
        if _store_of(value) is not None:
            _low_bit(draft, slot, draft.left.pop(slot), meaning)
        elif value is not None:
            draft.whole(slot, draft.tensor(slot), meaning)


def _low_bit(draft: Draft, slot: str, value: Object, meaning: Meaning) -> None:
    store, state = STORES[value.name.rpartition(".")[2]], value.state if isinstance(value.state, dict) else {}
    codes, scale, qmap = (state.get(key) for key in ("codes", "scale", "qmap"))
    if not isinstance(codes, Stored) or not isinstance(scale, Stored):
        raise draft.error(f"{slot} has {'codes' if isinstance(codes, Stored) else 'no codes'} without their scale")
    shape = _shape(draft, slot, store, codes, state)
    if isinstance(dtype := value.args[1] if len(value.args) > 1 else None, Global):
        draft.dtype = dtype.name.removeprefix("torch.")
    block = _block(draft, slot, prod(shape), scale.elements)
    fields = {"codes": codes, "scale" if store == "Float8" else "absmax": scale}
    book = None
    if store != "Float8":
        if not isinstance(qmap, Stored):
            raise draft.error(f"{slot} has codes without their map")
        book = (qmap, 256 if store == "Block8" else 16)
    draft.codes(slot, store, fields, meaning, shape, block, book)


def _shape(draft: Draft, slot: str, store: str, codes: Stored, state: dict[str, Any]) -> tuple[int, ...]:
    """Return the parameter's shape: that of the codes, unless two share a byte."""
    if store != "Block4":
        return codes.shape
    shape = state.get("_shape")
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise draft.error(f"{slot} does not say the shape of the parameter")
    if 2 * codes.elements != prod(shape):
        raise draft.error(f"{slot} has {codes.elements} bytes of 4-bit codes for a parameter of shape {list(shape)}")
    return shape


def _block(draft: Draft, slot: str, count: int, scales: int) -> int:
    if not scales or count % scales or not 1 < count // scales <= LARGEST_BLOCK:
        raise draft.error(f"{slot} has {scales} scales for {count} codes: they do not divide into blocks")
    return count // scales


# --- writing ------------------------------------------------------------------------------------------------------

STORES_IN_WORDS = "Block8(), Block4(), Float8() or Full()"
_MODULE = "torchao.optim.subclass_"


def write_torchao(writer: TreeWriter) -> Tree:
    """Return what torchao's AdamW8bit, AdamW4bit and AdamWFp8 keep: tensors of classes of its own, or plain ones.

    Raises:
        LayoutError: for what they do not keep.
    """
    if not writer.same:
        check_rule(writer, "adam")

    def state_of(param: Parameter) -> Tree:
        check_statistics(writer, param, ADAM)
        state = writer.step(param, "F32" if param.has_state else "")
        for slot in sorted(param.slots, key=lambda slot: list(ADAM).index(slot) if slot in ADAM else len(ADAM)):
            state[slot] = _wrapped(writer, param, slot, param.slots[slot])
        return state | writer.extra(param)

    def hyper_of(place: int, group: Group) -> Tree:
        hyper = translate(writer, place, writer.common(group), HYPERS)
        return hyper | {"lr": scalar("F32", hyper["lr"])}

    writer.warn_of_casts()
    return writer.tree(state_of, hyper_of)


def _wrapped(writer: TreeWriter, param: Parameter, slot: str, record: SlotRecord) -> NewTensor | Subclass:
    if is_full(record) or "codes" not in record.fields:
        return writer.full(param, slot, record, STORES_IN_WORDS, "block8")
    kind = re.match(r"(Block8|Block4|Float8)\(", record.store)
    scale = record.fields.get("scale", record.fields.get("absmax"))
    if kind is None or scale is None or "rank1" in record.store:
        raise writer.misfit(param, slot, record, STORES_IN_WORDS, "block8")
    codes = writer.tensor(record.fields["codes"])
    state: dict[str, Any] = {"codes": codes, "scale": writer.tensor(scale)}
    shape = param.shape if kind[1] == "Block4" else codes.shape
    if shape is None or not record.block or prod(shape) % record.block:
        raise LayoutError(
            f"'{shown(param.name)}' has {prod(shape or ())} elements: torchao has whole blocks of {record.block} only; "
            f"convert with --slot {slot}=fp32"
        )
    return Subclass(*_class_of(writer, param, slot, record, kind[1], shape, state))


def _class_of(
    writer: TreeWriter,
    param: Parameter,
    slot: str,
    record: SlotRecord,
    store: str,
    shape: tuple[int, ...],
    state: Mapping[str, Any],
) -> tuple[str, str, tuple[int, ...], dict[str, Any]]:
    """Return the name, dtype, shape and attributes of the tensor that torchao makes."""
    dtype = FLOATS.get(param.dtype, "F32")
    if store == "Float8":
        if "scale" not in record.fields:
            raise LayoutError(
                f"{slot} of '{shown(param.name)}' is in {record.store} with block maxima, torchao has them divided by "
                f"448; convert with --slot {slot}=block8"
            )
        return f"{_MODULE}fp8.OptimStateFp8", dtype, shape, {**state, "block_size": record.block}
    attributes = {**state, "qmap": replace(writer.map_of(record)), "signed": record.signed}  # a map for each tensor
    if store == "Block4":
        attributes["_shape"] = shape
    name = "4bit.OptimState4bit" if store == "Block4" else "8bit.OptimState8bit"
    return _MODULE + name, dtype, shape, {**attributes, "block_size": record.block}


_HELD = frozenset({"Full", "Block8", "Block4", "Float8"})
FORMAT = Format(
    name=NAME,
    read=read_torchao,
    names_itself=True,
    write=write_torchao,
    stores={"": _HELD, "adam": _HELD},
    rules=(libraries.AO_ADAMW, libraries.AO_ADAM),
)
