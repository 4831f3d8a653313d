"""Files of schedulefree, whose groups count the steps. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.formats import tables
from optstate.checkpoint.formats.parameter_reader import SECOND, Meaning
from optstate.checkpoint.formats.state_dict import StateDict
from optstate.checkpoint.formats.tables import Kept, Layout
from optstate.other_libraries import libraries

__all__ = ["read"]

Z = Kept(Meaning(), "z")
SQUARE = Kept(SECOND, "exp_avg_sq")

LAYOUTS = (
    Layout("RAdamScheduleFree", libraries.RADAM_FREE, {"z": Z, "exp_avg_sq": SQUARE}, step="k"),
    Layout("AdamWScheduleFree", libraries.ADAMW_FREE, {"z": Z, "exp_avg_sq": SQUARE}, step="k"),
    Layout("SGDScheduleFree", libraries.SGD_FREE, {"z": Z}, step="k"),
)


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of schedulefree; None if it is not its layout."""
    layout = tables.matching(found, LAYOUTS)
    return None if layout is None else tables.read(found, layout, "schedulefree", "schedulefree")
