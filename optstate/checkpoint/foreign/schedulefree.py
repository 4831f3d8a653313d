"""Files of schedulefree, whose groups count the steps. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.checkpoint import Checkpoint
from optstate.checkpoint.foreign import layouts
from optstate.checkpoint.foreign.drafts import SECOND, Meaning
from optstate.checkpoint.foreign.layouts import Kept, Layout
from optstate.checkpoint.foreign.trees import StateDict
from optstate.others import libraries

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
    layout = layouts.matching(found, LAYOUTS)
    return None if layout is None else layouts.read(found, layout, "schedulefree", "schedulefree")
