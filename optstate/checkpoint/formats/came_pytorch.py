"""State of CAME, as its authors' package came-pytorch has it; read only. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.tables import CAME_SLOTS, Layout, read_tables
from optstate.other_libraries import libraries

__all__ = ["FORMAT"]

NAME = "came-pytorch"
LAYOUT = Layout("CAME", libraries.CAME, CAME_SLOTS, others=frozenset({"RMS"}))


def read_came(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of came-pytorch; None if it is not its layout."""
    return read_tables(found, [LAYOUT], NAME)


FORMAT = Format(name=NAME, read=read_came, rules=(libraries.CAME,))
