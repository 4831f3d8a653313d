"""State of schedulefree, whose groups count the steps; read only. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.statistics import SECOND, UNKNOWN
from optstate.checkpoint.formats.shared.tables import Layout, read_tables, whole
from optstate.other_libraries import libraries

__all__ = ["FORMAT"]

NAME = "schedulefree"
LAYOUTS = (
    Layout("RAdamScheduleFree", libraries.RADAM_FREE, whole({"z": UNKNOWN, "exp_avg_sq": SECOND}), step="k"),
    Layout("AdamWScheduleFree", libraries.ADAMW_FREE, whole({"z": UNKNOWN, "exp_avg_sq": SECOND}), step="k"),
    Layout("SGDScheduleFree", libraries.SGD_FREE, whole({"z": UNKNOWN}), step="k"),
)


def read_schedulefree(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of schedulefree; None if it is not its layout."""
    return read_tables(found, LAYOUTS, NAME)


FORMAT = Format(name=NAME, read=read_schedulefree, rules=tuple(layout.rule for layout in LAYOUTS))
