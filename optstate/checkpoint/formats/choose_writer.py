"""Which layout a document goes into when nobody says which. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from optstate.checkpoint.document.document import Document
from optstate.checkpoint.formats.meanings import RULES
from optstate.checkpoint.formats.tree_writer import LayoutError

__all__ = ["STORES", "default_layout"]

STORES: Mapping[str, frozenset[str]] = {
    "torch": frozenset({"Full", "Unknown"}),
    "transformers": frozenset({"Full", "Factored"}),
    "bitsandbytes": frozenset({"Full", "Block8", "Unknown"}),
    "torchao": frozenset({"Full", "Block8", "Block4", "Float8"}),
    "lion-pytorch": frozenset({"Full"}),
    "pytorch_optimizer": frozenset({"Full", "Factored", "AxisMax", "Unknown"}),
}
"""The stores that a library's files can hold, of layouts that torch.save writes; torch's Adafactor factors, too."""

_BY_RULE = {
    "adam": ("torch", "bitsandbytes", "torchao"),
    "lion": ("lion-pytorch", "bitsandbytes"),
    "sgd": ("torch", "bitsandbytes"),
    "came": ("pytorch_optimizer",),
    "sm3": ("pytorch_optimizer",),
    "adalomo": ("pytorch_optimizer",),
}


def default_layout(document: Document) -> str:
    """The layout it came from if that still has all its stores, else the first library that has its recipe and stores.

    Raises:
        LayoutError: if there is none, or several.
    """
    stores = {record.store.partition("(")[0] for param in document.parameters for record in param.slots.values()}
    library = str(document.source.get("library", document.source.get("kind", "")))
    adafactor = library == "torch" and document.source.get("optimizer") == "Adafactor"
    if library in STORES and stores <= STORES[library] | ({"Factored"} if adafactor else frozenset()):
        return library
    rule = RULES.get(document.recipe, "")
    if rule == "adafactor":
        raise LayoutError("Adafactor's state fits two libraries: give --format transformers or --format torch")
    fitting = [layout for layout in _BY_RULE.get(rule, ()) if stores <= STORES[layout]]
    if not fitting:
        what = document.recipe or str(document.source.get("optimizer") or "a chain without a name")
        kept = f" in {', '.join(sorted(stores))}" if stores else ""
        raise LayoutError(
            f"no library's file holds {what}{kept}: write a file of optstate's own, or convert with --recipe or --to"
        )
    return fitting[0]
