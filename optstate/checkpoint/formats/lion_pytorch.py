"""Files of lion-pytorch's Lion. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.formats import tables
from optstate.checkpoint.formats.parameter_reader import Meaning, hyper
from optstate.checkpoint.formats.state_dict import StateDict
from optstate.checkpoint.formats.tables import Kept, Layout
from optstate.other_libraries import libraries

__all__ = ["MOMENTUM", "read"]

MOMENTUM = Meaning("gradient", beta=hyper("betas", 1))

LION = Layout("Lion", libraries.LION, {"exp_avg": Kept(MOMENTUM, "exp_avg")})


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of lion-pytorch; None if it is not its layout."""
    return tables.read(found, LION, "lion-pytorch", "lion-pytorch") if LION.fits(found) else None
