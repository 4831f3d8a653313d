"""Stores by the words they are written in: `str(store)`, or short names for people."""

from __future__ import annotations

import ast
from typing import Any

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
    short = text.strip().lower()
    if short in SHORT:
        return SHORT[short]
    try:
        call = ast.parse(text.strip() if "(" in text else f"{text.strip()}()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        arguments: list[Any] = [ast.literal_eval(item) for item in call.args]
        named: dict[str, Any] = {item.arg: ast.literal_eval(item.value) for item in call.keywords if item.arg}
        kind = STORES[call.func.id.lower()]
    except (ValueError, SyntaxError, KeyError, RecursionError, MemoryError):
        known = ", ".join([*sorted(kind.__name__ for kind in STORES.values()), *SHORT])
        raise ValueError(f"{text[:60]!r} is not a store: one of {known}") from None
    try:
        return kind(*arguments, **named)
    except TypeError as error:
        raise ValueError(f"{text[:60]!r}: {error}") from None
