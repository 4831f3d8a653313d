"""State of lion-pytorch's Lion: one momentum, and no count of steps. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.hyper_parameters import NEEDED
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.statistics import LION
from optstate.checkpoint.formats.shared.tables import Layout, by_key, read_tables, whole, write_tables
from optstate.checkpoint.formats.shared.tree_writer import Tree, TreeWriter
from optstate.other_libraries import libraries

__all__ = ["FORMAT"]

NAME = "lion-pytorch"
LAYOUT = Layout(
    "Lion",
    libraries.LION,
    whole(LION),
    hypers=by_key({"lr": NEEDED, "betas": NEEDED, "weight_decay": NEEDED}),
)


def read_lion(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of lion-pytorch; None if it is not its layout."""
    return read_tables(found, [LAYOUT], NAME)


def write_lion(writer: TreeWriter) -> Tree:
    """Return what lion-pytorch keeps."""
    return write_tables(writer, [LAYOUT], {"lion": LAYOUT})


FORMAT = Format(
    name=NAME,
    read=read_lion,
    write=write_lion,
    stores={"lion": frozenset({"Full"})},
    rules=(libraries.LION,),
)
