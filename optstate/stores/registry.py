"""Stores by the words they are written in: `str(store)`, or short names for people.

A package adds stores by entry points of the group `optstate.stores`, named as the class in lower case:

    [project.entry-points."optstate.stores"]
    rounded = "my_package:Rounded"
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from typing import Any

from optstate.plugins import PluginError, Plugins
from optstate.stores.axes import AxisMax
from optstate.stores.base import Store
from optstate.stores.block_codes import Block4, Block8, Float8
from optstate.stores.factored import Factored
from optstate.stores.full import Full
from optstate.stores.grouped import Grouped
from optstate.stores.low_rank import LowRank
from optstate.stores.sign_rank1 import SignRank1
from optstate.text import parse_item, parsed_call

__all__ = ["known_also", "parse_store", "store_names"]

OWN: dict[str, type[Store]] = {
    kind.__name__.lower(): kind
    for kind in (AxisMax, Block4, Block8, Factored, Float8, Full, Grouped, LowRank, SignRank1)
}
SHORT: dict[str, Store] = {"fp32": Full(), "float32": Full(), "bf16": Full("bfloat16"), "bfloat16": Full("bfloat16")}


def _problem(name: str, kind: Any) -> str:
    """Why an object cannot be the store class of this name, "" if it can."""
    if not (isinstance(kind, type) and issubclass(kind, Store)):
        return "it is no subclass of optstate.stores.Store"
    if not (is_dataclass(kind) and kind.__dataclass_params__.frozen):
        return "it is no frozen dataclass, so its words would not be what it is"
    if kind.__name__.lower() != name:
        return f"files name a store by its class, so that its entry point must be called {kind.__name__.lower()!r}"
    return ""


PLUGINS: Plugins[type[Store]] = Plugins("store", "optstate.stores", _problem, frozenset(OWN) | frozenset(SHORT))


def known_also(kind: type[Store]) -> AbstractContextManager[None]:
    """Return a context in which files may name a store that is not installed: for tests of one.

    Raises:
        ValueError: when entered, if it is none that could be installed.
    """
    name = kind.__name__.lower()
    return nullcontext() if OWN.get(name) is kind else PLUGINS.holding(name, kind)


def store_names() -> list[str]:
    """Return the names of all stores that files may name, sorted: class names in lower case."""
    return sorted({*OWN, *PLUGINS.names()})


def parse_store(text: str) -> Store:
    """Return the store that `text` names: "Block8(block=64)" as it is printed, "block8", "factored", "fp32", "bf16".

    Only stores of this library and of entry points are built, with constants, and nothing else is called.

    Raises:
        ValueError: if there is none, its package cannot be used, or its arguments are not possible ones.
    """
    short = SHORT.get(text.strip().lower())
    if short is not None:
        return short
    kinds = dict(OWN)
    try:
        name = parsed_call(text)[0]
        if name not in kinds and name in PLUGINS:
            kinds[name] = PLUGINS.get(name)
    except PluginError as error:
        raise ValueError(str(error)) from None
    except ValueError:
        pass  # said below, with what there is
    try:
        return parse_item(text, kinds)
    except ValueError:
        raise
    except Exception as error:  # the class of another package may raise anything
        raise ValueError(f"{text[:60]!r}: {type(error).__name__}: {error}") from None
