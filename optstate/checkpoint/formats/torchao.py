"""Files of torchao's Adam with 8-bit, 4-bit and fp8 moments, which are tensors of its own classes. No torch."""

from __future__ import annotations

from math import prod
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.files.pickle_machine import Global, Object
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.parameter_reader import FIRST, SECOND, Draft, Meaning, Source, checkpoint_of
from optstate.checkpoint.formats.state_dict import StateDict
from optstate.checkpoint.formats.torch_optim import read_as_adamw

__all__ = ["read"]

STORES = {"OptimState8bit": "Block8", "OptimState4bit": "Block4", "OptimStateFp8": "Float8"}
NAMES = {"Block8": "AdamW8bit", "Block4": "AdamW4bit", "Float8": "AdamWFp8"}
RECIPES = {"Block8": "adamw8bit", "Block4": "adamw4bit"}

MEANINGS = {
    "exp_avg": FIRST,
    "exp_avg_sq": SECOND,
    "max_exp_avg_sq": Meaning("square_max", signed=False),
}
HYPERS = {"lr", "betas", "eps", "weight_decay", "amsgrad"}
LARGEST_BLOCK = 1 << 16


def _store_of(value: Any) -> str | None:
    return STORES.get(value.name.rpartition(".")[2]) if isinstance(value, Object) else None


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of torchao's low-bit optimizers; None if it is not their layout.

    optimizer: "Adam8bit" and so on, which the file does not tell from "AdamW8bit".
    """
    stores = {_store_of(value) for state in found.state.values() for value in state.values()} - {None}
    # Without a low-bit moment nothing but its learning rate, a tensor, tells it from torch's before 1.12.
    plain = all(isinstance(group.get("lr"), Stored) for group in found.groups) and "maximize" not in found.keys
    if not found.keys >= HYPERS or not found.kept <= {"step", *MEANINGS} or not (stores or plain):
        return None
    store = stores.pop() if len(stores) == 1 else None
    name, notes = read_as_adamw(found, optimizer, NAMES.get(store or "", "AdamW"))
    recipe = RECIPES.get(store or "", "adamw")
    return checkpoint_of(found, Source("torchao", "torchao", name, recipe), _say, notes)


def _say(draft: Draft) -> None:
    draft.take_step()
    for slot, meaning in MEANINGS.items():
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
    """The parameter's shape: that of the codes, unless two share a byte."""
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
