"""What other libraries' optimizer files hold, made from a document: where their names, shapes and numbers go.

Nothing is read or written here: `tree_of` gives what `create_torch` writes. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from optstate.checkpoint.document.document import Document
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.formats import hyper_tables
from optstate.checkpoint.formats.choose_writer import default_layout
from optstate.checkpoint.formats.full_writers import as_lion_pytorch, as_torch, as_transformers
from optstate.checkpoint.formats.lerobot_writer import LEROBOT, LeRobot, lerobot_of
from optstate.checkpoint.formats.low_bit_writers import as_bitsandbytes, as_torchao
from optstate.checkpoint.formats.pytorch_optimizer_writer import as_pytorch_optimizer
from optstate.checkpoint.formats.tree_writer import Given, LayoutError, Tree

__all__ = ["LAYOUTS", "LEROBOT", "LayoutError", "LeRobot", "default_layout", "lerobot_of", "notes_of", "tree_of"]

_MAKERS: Mapping[str, Callable[[Given], Tree]] = {
    "torch": as_torch,
    "transformers": as_transformers,
    "bitsandbytes": as_bitsandbytes,
    "torchao": as_torchao,
    "lion-pytorch": as_lion_pytorch,
    "pytorch_optimizer": as_pytorch_optimizer,
}

LAYOUTS = (*_MAKERS, LEROBOT)
"""The libraries whose files can be written: LeRobot's as `lerobot_of` says, all others by `create_torch`."""


def tree_of(layout: str, document: Document, entries: Mapping[str, NewEntry]) -> Tree:
    """The content of a library's file: `state`, `param_groups`, and what else it has at the top.

    Statistics are NewTensors under the document's keys, in the shapes that the library has. A document that came from
    this layout gives the file it came from.

    Args:
        layout: one of `LAYOUTS` but LeRobot's.
        document: what to write.
        entries: dtype and shape of every tensor the document names, by key.

    Raises:
        LayoutError: for a layout that is none, or for the first thing that it has no place for.
    """
    return _made(layout, document, entries)[0]


def notes_of(layout: str, document: Document, entries: Mapping[str, NewEntry]) -> tuple[str, ...]:
    """What a person should know about the new file: what was assumed, what is not in it.

    Raises:
        LayoutError: as they do.
    """
    if layout == LEROBOT:
        return lerobot_of(document, entries).notes
    return _made(layout, document, entries)[1]


def _made(layout: str, document: Document, entries: Mapping[str, NewEntry]) -> tuple[Tree, tuple[str, ...]]:
    if layout not in _MAKERS:
        raise LayoutError(f"no file of torch.save has the layout {layout!r}: one of {', '.join(_MAKERS)}")
    given = Given(layout, document, entries)
    if not given.same:
        hyper_tables.check(given)
    tree = _MAKERS[layout](given)
    given.warn_of_rest(tree)
    return tree, tuple(given.notes)
