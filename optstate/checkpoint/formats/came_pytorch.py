"""Files of CAME, as its authors' package and as pytorch_optimizer have it. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.formats import tables
from optstate.checkpoint.formats.parameter_reader import Meaning, hyper
from optstate.checkpoint.formats.state_dict import StateDict
from optstate.checkpoint.formats.tables import Kept, Layout
from optstate.other_libraries import libraries

__all__ = ["SLOTS", "read"]

SLOTS = {
    "exp_avg": Kept(Meaning("update", beta=hyper("betas", 0)), "exp_avg"),
    "exp_avg_sq": Kept(
        Meaning("square", signed=False, beta=hyper("betas", 1)), "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"
    ),
    "exp_avg_res": Kept(
        Meaning("distance", signed=False, beta=hyper("betas", 2)), row="exp_avg_res_row", col="exp_avg_res_col"
    ),
}

CAME = Layout("CAME", libraries.CAME, SLOTS, others=frozenset({"RMS"}))


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of came-pytorch; None if it is not its layout."""
    return tables.read(found, CAME, "came-pytorch", "came-pytorch") if CAME.fits(found) else None
