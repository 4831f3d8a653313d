"""State of lomo-optim, read only: LOMO has none, AdaLomo keeps its own in attributes. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.state_by_name import ADALOMO, are_attributes, read_by_name
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.tables import Layout, read_table
from optstate.other_libraries import libraries

__all__ = ["FORMAT"]

NAME = "lomo-optim"
LOMO = Layout("Lomo", libraries.LOMO, {})

LOST = (
    "AdaLomo's second moments and its step count are not in the file: lomo-optim keeps them in attributes of the "
    "optimizer (exp_avg_sq, exp_avg_sq_row, exp_avg_sq_col, step_num), which state_dict() leaves out"
)
NO_GROUPS = "hyper-parameters are not in the file"


def read_lomo(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of LOMO, of AdaLomo's attributes, or of what a state_dict keeps of AdaLomo; else None."""
    if are_attributes(found.rest):
        alone = found.keys == {"params"}  # no hyper-parameters: it was no state_dict
        return read_by_name(found, "step_num", NAME, "AdaLomo", [NO_GROUPS]) if alone else None
    if found.state:
        return None
    if ADALOMO.fits(found):
        return read_table(found, ADALOMO, NAME, [LOST])
    return read_table(found, LOMO, NAME) if LOMO.fits(found) else None


FORMAT = Format(name=NAME, read=read_lomo, rules=(libraries.ADALOMO, libraries.LOMO))
