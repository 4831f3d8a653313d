"""Stores by the words they are written in: `str(store)`, or short names for people."""

from __future__ import annotations

from optstate import text as describe
from optstate.stores.axes import AxisMax
from optstate.stores.base import Store
from optstate.stores.blockwise import Block4, Block8, Float8
from optstate.stores.factored import Factored
from optstate.stores.full import Full
from optstate.stores.grouped import Grouped

__all__ = ["from_words"]

STORES: dict[str, type[Store]] = {
    kind.__name__.lower(): kind for kind in (AxisMax, Block4, Block8, Factored, Float8, Full, Grouped)
}
SHORT: dict[str, Store] = {"fp32": Full(), "float32": Full(), "bf16": Full("bfloat16"), "bfloat16": Full("bfloat16")}


def from_words(text: str) -> Store:
    """The store that `text` names: "Block8(block=64)" as it is printed, "block8", "factored", "fp32", "bf16".

    Raises:
        ValueError: if there is none, or its arguments are not possible ones.
    """
    short = SHORT.get(text.strip().lower())
    return describe.from_words(text, STORES) if short is None else short
